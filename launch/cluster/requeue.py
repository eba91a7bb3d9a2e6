"""Whether a job that ended goes back into the queue; `slurm/pretrain.sbatch` asks (imports no torch).

    python -m launch.cluster.requeue started PRESET key=value ...    before training
    python -m launch.cluster.requeue CODE PRESET key=value ...       after it, with the exit code of srun

The exit code is the answer: BACK (0: go on, or back into the queue), GIVEN_UP (4), ALREADY_BACK (5: SLURM itself has
put the job back), FINISHED (6: the run says so, whatever its processes died of afterwards), AGAIN (7: start training
once more in this job). Any other means that the question could not be asked. The reason, with the rank that failed
first, is printed to stderr and recorded in the run's history, as `requeued`, `given_up` or `restarted`; printed to
stdout are the nodes that the job should be kept from. What all ranks said is gathered in the run's `errors.log`.

A job that was preempted, or stopped near its time limit, goes back; unless the time limit leaves it too little time to
get anywhere: STANDSTILLS stops in a row without a newer checkpoint. What would go wrong again never does. Everything
else, a crash, a hang, a lost node, is a failure: back as long as there were fewer than SELFSIGHT_MAX_FAILURES (3) in a
row without a newer checkpoint, and fewer than CEILING times as many in all. Only this job's ends count: whoever submits
anew starts anew. As long as all of its nodes are there, a job that failed keeps them and starts training again,
SELFSIGHT_RESTARTS (2) times in a row without a newer checkpoint; only then it goes through the queue.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.files import read_json
from launch.cluster.queue import WAITING
from launch.cluster.verdict import CONTINUES, EXIT_SICK, NEVER, Event, Failures, Verdict, judge
from launch.run_facts import CANCELLED
from pretrain.config.load import load_config
from pretrain.survival.failures import first_to_fail, forget_signs_of_life, gather_errors, start_of
from pretrain.survival.history import read_history, record
from pretrain.survival.stopping import EXIT_HUNG, EXIT_STOPPED, EXIT_USER_ERROR

BACK, GIVEN_UP, ALREADY_BACK, FINISHED, AGAIN = 0, 4, 5, 6, 7
STANDSTILLS = 3  # stops in a row, other than by preemption, after the one that wrote the newest checkpoint
RESTARTS = 2  # of training within a job, in a row without a newer checkpoint


@dataclass(frozen=True)
class Queued:
    """What SLURM knows of a job while its script is still running."""

    restarts: int = 0
    state: str = "RUNNING"
    reason: str = "None"
    excluded: str = ""  # nodes it is already kept from
    preempted: bool = False  # since it has started

    def is_back(self, restart: int) -> bool:
        """Whether SLURM has put it back already: then its next start is counted before its nodes are free."""
        return self.restarts > restart or self.state in WAITING

    def is_ended(self) -> bool:
        """Whether somebody has ended it, other than its time limit: to put it back would be against their will."""
        return self.state in ("COMPLETING", "CANCELLED", "DEADLINE") and self.reason != "TimeLimit"


def newest_checkpoint(run: Path) -> int:
    """The step of the newest finished checkpoint, damaged or not; -1 without any."""
    steps = [path.name[5:] for path in (run / "checkpoints").glob("step-*")]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


class Requeue:
    """The decision about one start of one job."""

    def __init__(self, run: Path, environ: Mapping[str, str]) -> None:
        self.run, self.environ = run, environ
        self.job = environ.get("SLURM_JOB_ID")
        self.restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
        limit = _whole(environ, "SELFSIGHT_MAX_FAILURES", 3, "0 to never come back")
        self.restarts = _whole(environ, "SELFSIGHT_RESTARTS", RESTARTS, "0 to go through the queue every time")
        self.history = read_history(run)
        self.checkpoint = newest_checkpoint(run)
        self.failures = Failures.of(self.history, self.job, self.checkpoint, limit)

    def at_start(self) -> int:
        """Before training: judge the start before this one, if it ended without being judged."""
        if (by := cancelled_by(self.run, self.environ)) is not None:
            return self.answer(None, Verdict(False, False, f"cancelled by {by}", CONTINUES))
        if self.restart == 0 or self.of("requeued", self.restart - 1):
            return BACK
        code, said = self.ended(None, self.restart - 1)
        if code == 0:  # finished, and then lost its node; this start will find nothing to do
            return BACK
        return self.answer(code, judge(code, said, self.failures), of_restart=self.restart - 1)

    def at_end(self, highest: int, queued: Queued | None) -> int:
        """After it: `highest` is srun's code, `queued` what SLURM knows, None if it could not be asked."""
        code, said = self.ended(highest, self.restart)
        if code == 0:
            print(f"the run is finished; exit code {highest}, of what came after, does not count", file=sys.stderr)
            return FINISHED
        if (by := cancelled_by(self.run, self.environ)) is not None:
            return self.answer(code, Verdict(False, False, f"cancelled by {by}", CONTINUES))
        if queued is not None and queued.is_back(self.restart):
            failure = code != EXIT_STOPPED and bool(lost := lost_nodes(self.environ.get("SLURM_JOB_NODELIST", "")))
            reason = f"lost nodes: {', '.join(lost)}" if failure else "preempted, or requeued by hand"
            self.answer(code, Verdict(True, failure, f"SLURM has put the job back itself ({reason})"))
            return ALREADY_BACK
        if queued is not None and queued.is_ended():
            return self.answer(code, Verdict(False, False, "cancelled by scancel", CONTINUES))
        sick = [node for event in self.of("preflight", self.restart)[-1:] for node in event.get("sick", ())]
        exclude = self.environ.get("SELFSIGHT_EXCLUDE_SICK") == "1"
        start = start_of(self.environ)
        if start is not None and code not in (EXIT_STOPPED, EXIT_HUNG, EXIT_SICK, *NEVER):
            said = first_to_fail(self.run, start) or said
        verdict = judge(code, said, self.failures, sick, exclude)
        preempted = queued is None or queued.preempted  # where nobody knows, it is not held against the job
        if code == EXIT_STOPPED and not preempted and self.failures.stops > STANDSTILLS:
            times = f"asked to stop {self.failures.stops + 1} times in a row without a newer checkpoint"
            advice = f"a start and its first steps have to fit: give it more --time; {CONTINUES}"
            verdict = Verdict(False, True, f"{times}: too little time", advice)
        if verdict.back and code == EXIT_SICK and sick:
            known = [queued.excluded] if queued is not None and queued.excluded else []  # n[1,3] is not to be cut
            print(",".join([*known, *sick]))
        if start is not None and code != EXIT_STOPPED:
            gather_errors(self.run, start, verdict.reason)
            forget_signs_of_life(self.run)
        return self.answer(code, verdict, self.can_start_again(code, verdict, queued), preempted=preempted)

    def can_start_again(self, code: int | None, verdict: Verdict, queued: Queued | None) -> bool:
        """Whether training may start again in this job, on the nodes that it has."""
        if not (verdict.back and verdict.failure) or code == EXIT_SICK or self.environ.get("SELFSIGHT_ASKED") == "1":
            return False
        if queued is not None and queued.state != "RUNNING":
            return False
        done = [event for event in self.all_of("restarted", self.restart) if event["checkpoint"] >= self.checkpoint]
        return len(done) < self.restarts and not lost_nodes(self.environ.get("SLURM_JOB_NODELIST", ""))

    def ended(self, code: int | None, restart: int) -> tuple[int | None, str]:
        """The code and reason of a start. srun's code is the highest of all ranks', killed ones too, so the run's own
        word counts where it is one that decides."""
        last = self.of("ended", restart)[-1:]
        for event in last:
            own = event.get("code")
            said = str(event.get("reason") or "") if own else ""
            return own if code is None or own in (0, EXIT_STOPPED, EXIT_HUNG, *NEVER) else code, said
        return code, ""

    def of(self, event: str, restart: int) -> list[Event]:
        """The events of a name that one start of this job left, since it last started training."""
        return self.all_of(event, restart, since_restarted=True)

    def all_of(self, event: str, restart: int, since_restarted: bool = False) -> list[Event]:
        found: list[Event] = []
        for row in self.history:
            if row.get("job") != self.job or row.get("of_restart", row["restart"]) != restart:
                continue
            if since_restarted and row["event"] == "restarted":
                found = []
            elif row["event"] == event:
                found.append(row)
        return found

    def answer(self, code: int | None, verdict: Verdict, again: bool = False, **details: Any) -> int:
        """Say and record it; `again`: training starts anew in this job."""
        about = {"failure": verdict.failure, "checkpoint": self.checkpoint, **details}
        at = f"step {self.checkpoint}" if self.checkpoint >= 0 else "the start"
        if verdict.back:
            where = "training starts again in this job" if again else "back into the queue"
            print(f"{where}: {verdict.reason}; it continues from {at}", file=sys.stderr)
        else:
            print(f"given up: {verdict.reason}.\nWhat to do: {verdict.advice}.", file=sys.stderr)
        try:
            event = "restarted" if again else "requeued" if verdict.back else "given_up"
            record(self.run, event, code=code, reason=verdict.reason, **about)
        except OSError as error:
            print(f"this could not be written to {self.run}: {error}", file=sys.stderr)
            return BACK if verdict.back else GIVEN_UP  # uncounted, it could start again for ever
        return AGAIN if again else BACK if verdict.back else GIVEN_UP


def ask_queue(environ: Mapping[str, str]) -> Queued | None:
    """What SLURM knows of this job; None if it does not answer.

    In a container there may be no scontrol: then what it told the batch script counts, SELFSIGHT_JOB_FACTS.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in environ:  # of an array's last element, SLURM_JOB_ID names the whole array
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID')}"
    text = _ask(["scontrol", "show", "job", "--oneliner", job]) or environ.get("SELFSIGHT_JOB_FACTS", "")
    if "JobState=" not in text:
        return None
    fields = dict(re.findall(r"([\w:/]+)=(\S*)", text.splitlines()[0]))
    excluded = fields.get("ExcNodeList", "")
    return Queued(
        restarts=int(fields.get("Restarts", "0")),
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        excluded="" if excluded == "(null)" else excluded,
        # times are ISO 8601, and None or Unknown where there is none
        preempted="0" < fields.get("StartTime", "") < fields.get("PreemptTime", "") < "A",
    )


def cancelled_by(run: Path, environ: Mapping[str, str]) -> str | None:
    """Who has ended this job by `selfsight cancel`, or None."""
    note = read_json(run / CANCELLED)
    if not isinstance(note, dict) or not isinstance(note.get("jobs"), list):
        return None
    element = f"{environ.get('SLURM_ARRAY_JOB_ID')}_{environ.get('SLURM_ARRAY_TASK_ID')}"
    return str(note.get("by")) if {environ.get("SLURM_JOB_ID"), element} & set(note["jobs"]) else None


def lost_nodes(names: str) -> list[str]:
    """Those of a job's nodes that SLURM has lost: down, or without an answer."""
    text = _ask(["sinfo", "--noheader", "--Node", "--nodes", names, "--format", "%N %T"]) or ""
    pairs = [line.split() for line in text.splitlines() if line.count(" ") == 1]
    return sorted({node for node, state in pairs if state.endswith("*") or state.startswith(("down", "fail", "error"))})


def _whole(environ: Mapping[str, str], name: str, default: int, hint: str) -> int:
    given = environ.get(name, str(default))
    if not given.isdigit():
        raise ValueError(f"{name} is {given!r}; give a whole number, {hint}")
    return int(given)


def _ask(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(given) < 2 or not (given[0] == "started" or given[0].isdigit()):
            raise ValueError("usage: python -m launch.cluster.requeue started|CODE PRESET key=value ...")
        config = load_config(given[1], given[2:])
        decision = Requeue(Path(config.runs) / config.name, os.environ)
        if given[0] == "started":
            return decision.at_start()
        return decision.at_end(int(given[0]), ask_queue(os.environ))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
