"""Whether a job that ended goes back into the queue; `slurm/pretrain.sbatch` asks (imports no torch).

    python -m launch.cluster.requeue started PRESET key=value ...    before training
    python -m launch.cluster.requeue CODE PRESET key=value ...       after it, with the exit code of srun

The exit code is the answer: BACK (0: go on, or back into the queue), GIVEN_UP (4), ALREADY_BACK (5: SLURM itself has
put the job back), FINISHED (6: the run says so, whatever its processes died of afterwards). Any other means that the
question could not be asked. The reason is printed to stderr and recorded in the run's history, as `requeued` or
`given_up`; printed to stdout are the nodes that the job should be kept from.

A job that was preempted, or stopped near its time limit, goes back; unless the time limit leaves it too little time to
get anywhere: STANDSTILLS stops in a row without a newer checkpoint. What would go wrong again never does. Everything
else, a crash, a hang, a lost node, is a failure: back as long as there were fewer than SELFSIGHT_MAX_FAILURES (3) in a
row without a newer checkpoint, and fewer than CEILING times as many in all. Only this job's ends count: whoever submits
anew starts anew.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.files import read_json
from launch.cluster.queue import WAITING
from launch.run_facts import CANCELLED
from pretrain.config.load import load_config
from pretrain.survival.history import read_history, record
from pretrain.survival.stopping import EXIT_HUNG, EXIT_NOT_SAVED, EXIT_STOPPED, EXIT_TROUBLE, EXIT_USER_ERROR

BACK, GIVEN_UP, ALREADY_BACK, FINISHED = 0, 4, 5, 6
EXIT_SICK = 3  # of launch.cluster.preflight: nodes that should not be used
CEILING = 20  # times the failures in a row
STANDSTILLS = 3  # stops in a row, other than by preemption, after the one that wrote the newest checkpoint
CONTINUES = "the same command, submitted again, continues from the last checkpoint"

Event = Mapping[str, Any]

NEVER = {
    EXIT_USER_ERROR: ("what was asked for can't be run", "the message is in the log above; correct it"),
    EXIT_TROUBLE: (
        "training went wrong, and would again",
        "look at the alarms in the log above, change what they name",
    ),
    EXIT_NOT_SAVED: ("no checkpoint could be written", "make room where the run folder lies"),
}


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job, and why."""

    back: bool
    failure: bool
    reason: str
    advice: str = ""


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


def judge(code: int | None, said: str, failures: Failures, sick: Sequence[str] = (), exclude: bool = False) -> Verdict:
    """What becomes of a job whose training ended with `code`, or without a word (None).

    said: the reason that the run itself gave, if it did. sick: nodes that the preflight named; `exclude`: they may be
    left out. `failures` are those before this end.
    """
    if code == EXIT_STOPPED:
        return Verdict(True, False, said or "stopped after a checkpoint, as asked")
    if code in NEVER:
        reason, advice = NEVER[code]
        return Verdict(False, True, f"{reason}: {said}" if said else reason, f"{advice} and submit again")
    if code == EXIT_SICK and sick and not exclude:
        advice = f"submit again with --exclude={','.join(sick)}, or have sick nodes left out: SELFSIGHT_EXCLUDE_SICK=1"
        return Verdict(False, True, f"sick nodes: {', '.join(sick)}", advice)
    reason = describe(code, sick) + (f"; the run says: {said}" if said else "")
    if spent := failures.spent():
        return Verdict(False, True, f"{reason}; {spent}", f"find the first error in the log above; {CONTINUES}")
    return Verdict(True, True, f"{reason}; failure {failures.in_a_row + 1} of at most {failures.limit} in a row")


@dataclass(frozen=True)
class Failures:
    """How often a job has failed: since the checkpoint it has now, and in all."""

    in_a_row: int
    in_all: int
    limit: int
    stops: int = 0  # as asked, in a row without a newer checkpoint, preemptions left out

    @classmethod
    def of(cls, history: Iterable[Event], job: str | None, checkpoint: int, limit: int) -> Failures:
        """Count the failed ends in a run's history; `checkpoint` is the step of its newest one, -1 without."""
        ends = [event for event in history if event["event"] == "requeued" and event.get("job") == job]
        here = [event for event in ends if event.get("checkpoint", -1) >= checkpoint]
        failed, failed_here = (sum(bool(event.get("failure")) for event in some) for some in (ends, here))
        stops = sum(event.get("code") == EXIT_STOPPED and not event.get("preempted", True) for event in here)
        return cls(failed_here, failed, limit, stops)

    def spent(self) -> str:
        """Why the job may not fail once more; empty if it may."""
        if self.in_a_row + 1 > self.limit:
            return f"more than {self.limit} failures in a row without a newer checkpoint"
        if self.in_all + 1 > CEILING * self.limit:
            return f"more than {CEILING * self.limit} failures of this job"
        return ""


def describe(code: int | None, sick: Sequence[str] = ()) -> str:
    """The exit code of a job step in words."""
    if code is None:
        return "the job ended without a word: its first node was lost, or it was killed before it could save"
    if code == EXIT_SICK and sick:
        return f"sick nodes, left out from now on: {', '.join(sick)}"
    if code == EXIT_HUNG:
        return "a rank hung and ended itself (86)"
    if code == 128 + signal.SIGKILL:
        return "a rank was killed (137): by hand, out of memory, or because another one was lost"
    if code > 128 and code - 128 in set(signal.Signals):
        return f"a rank died of {signal.Signals(code - 128).name} ({code})"
    return f"training crashed ({code})" if code == 1 else f"training ended with exit code {code}"


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
        limit = environ.get("SELFSIGHT_MAX_FAILURES", "3")
        if not limit.isdigit():
            raise ValueError(f"SELFSIGHT_MAX_FAILURES is {limit!r}; give a whole number, 0 to never come back")
        self.history = read_history(run)
        self.checkpoint = newest_checkpoint(run)
        self.failures = Failures.of(self.history, self.job, self.checkpoint, int(limit))

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
        verdict = judge(code, said, self.failures, sick, exclude)
        preempted = queued is None or queued.preempted  # where nobody knows, it is not held against the job
        if code == EXIT_STOPPED and not preempted and self.failures.stops > STANDSTILLS:
            times = f"asked to stop {self.failures.stops + 1} times in a row without a newer checkpoint"
            advice = f"a start and its first steps have to fit: give it more --time; {CONTINUES}"
            verdict = Verdict(False, True, f"{times}: too little time", advice)
        if verdict.back and code == EXIT_SICK and sick:
            known = [queued.excluded] if queued is not None and queued.excluded else []  # n[1,3] is not to be cut
            print(",".join([*known, *sick]))
        return self.answer(code, verdict, preempted=preempted)

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
        """The events of a name that one start of this job left."""
        return [
            row
            for row in self.history
            if row["event"] == event and row.get("job") == self.job and row.get("of_restart", row["restart"]) == restart
        ]

    def answer(self, code: int | None, verdict: Verdict, **details: Any) -> int:
        """Say and record it."""
        about = {"failure": verdict.failure, "checkpoint": self.checkpoint, **details}
        at = f"step {self.checkpoint}" if self.checkpoint >= 0 else "the start"
        if verdict.back:
            print(f"back into the queue: {verdict.reason}; it continues from {at}", file=sys.stderr)
        else:
            print(f"given up: {verdict.reason}.\nWhat to do: {verdict.advice}.", file=sys.stderr)
        try:
            record(self.run, "requeued" if verdict.back else "given_up", code=code, reason=verdict.reason, **about)
        except OSError as error:
            print(f"this could not be written to {self.run}: {error}", file=sys.stderr)
        return BACK if verdict.back else GIVEN_UP


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
