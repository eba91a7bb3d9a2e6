"""Look at every node before training: `python -m launch.cluster.preflight PRESET key=value ...`, one task a rank.

Run as training will be: under srun with the same tasks, torchrun, `selfsight launch`, or by itself. First all tasks
leave reports in the run folder, and the first one waits for them, so that a node that never comes is named and no
collective waits for it; then, if all came, numbers are added up over all ranks. Each wait has a limit.

The exit code is 0 if training can start, 3 if nodes are sick, which are named on a line `sick: NODE ...`, 1 for what
all nodes share, 2 if the configuration is wrong, and 85 if it was asked to end before it knew. srun's own exit code is
the highest of all tasks', killed ones too, so that a batch script asks afterwards, without srun:

    python -m launch.cluster.preflight --result PRESET key=value ...

which ends with the code of the verdict that stands in `runs/NAME/preflight/JOB-RESTART/result.json`. With --quick in
front of the preset nothing is added up: where training was running a moment ago. The step wants
`srun --kill-on-bad-exit=0`: a node that cannot even start Python then ends nobody before it is named. Tasks that hang
are killed, with the rest of the step, once they are named; `--wait=300` does so where there is no scancel.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.cluster.diagnose import Findings, judge_facts, judge_presence, judge_sums
from launch.cluster.rendezvous import DONE, FAILED, REDUCED, Meeting, Report, names_of_start, wait_until
from launch.ranks import Ranks, rank_environment, tasks_of_nodes
from pretrain.config import Config
from pretrain.config.load import load_config
from pretrain.survival.history import record
from pretrain.survival.run_folder import begun_config, check_run_folder
from pretrain.survival.stopping import EXIT_STOPPED, EXIT_USER_ERROR, StopRequest

EXIT_SHARED, EXIT_SICK = 1, 3
#: How long a task may take to come, Python's start from a cold file system included. SELFSIGHT_PREFLIGHT_SECONDS.
JOIN_SECONDS = 120.0
#: What the others wait beyond the first task's own limit before one of them judges in its place.
MARGIN_SECONDS = 10.0
#: With others already failed, a rank that is silent for so long is stuck.
SILENT_SECONDS = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    only_result, quick = given[:1] == ["--result"], given[:1] == ["--quick"]
    given = given[only_result or quick :]
    stop = StopRequest.install()
    ranks = None
    try:
        if not given or given[0].startswith("-"):
            raise ValueError("usage: python -m launch.cluster.preflight [--quick | --result] PRESET key=value ...")
        ranks = rank_environment(os.environ)
        config = load_config(given[0], given[1:])
        if only_result:
            return result_of(config, ranks)
        if begun_config(config) is None:  # of a run that has begun, training compares what its settings came to
            check_run_folder(config)
        return Preflight(config, ranks, stop, quick).run()
    except (ValueError, OSError) as error:
        if os.environ.get("SELFSIGHT_TRACEBACK") == "1":
            raise
        _complain(f"error: {error}")
        # of one task among many, the first one says what is wrong with it, and with nobody else
        return EXIT_USER_ERROR if ranks is None or ranks.rank == 0 else 0


def result_of(config: Config, ranks: Ranks) -> int:
    """The exit code that the last preflight of this job ended with, or 1 with a message where none came to an end."""
    path = Path(config.runs) / config.name / "preflight" / names_of_start(os.environ, ranks)[0] / "result.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["code"])
    except (OSError, ValueError, TypeError, KeyError):
        _complain(f"error: the preflight left no verdict in {path}: it ended before it came to one; see the log above")
        return EXIT_SHARED


class Preflight:
    """One task's part."""

    def __init__(self, config: Config, ranks: Ranks, stop: StopRequest, quick: bool = False) -> None:
        self.config, self.ranks, self.stop, self.quick = config, ranks, stop, quick
        self.run_folder = Path(config.runs) / config.name
        place, start = names_of_start(os.environ, ranks)
        self.meeting = Meeting(self.run_folder / "preflight" / place, start)
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        local = ranks.local_rank, ranks.local_world_size
        self.report = Report(start, ranks.rank, node, *local, nonce=secrets.token_hex(8))
        self.limit = _seconds("SELFSIGHT_PREFLIGHT_SECONDS", JOIN_SECONDS)
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    def run(self) -> int:
        """Look, compare, add up, and say so; the exit code of this task."""
        try:
            self.report.facts["clock"] = round(self.meeting.leave(self.report), 3)
        except OSError as error:
            return self.without_a_folder(error)
        from launch.cluster.checks import look

        look(self.config, self.run_folder, self.ranks, self.report, self.at)
        self.at(DONE)
        self.seconds["looking"] = time.monotonic() - self.began
        reports = self.wait_for_all() if self.ranks.rank == 0 else self.wait_for_word()
        if isinstance(reports, int):
            return reports
        found = Findings()
        judge_presence(reports, self.ranks.world_size, self.expected(), time.monotonic() - self.began, found)
        judge_facts(reports, found)
        self.seconds["waiting for all"] = time.monotonic() - self.began - self.seconds["looking"]
        if found.code == 0 and not self.quick:
            nodes = [reports[rank].node for rank in range(self.ranks.world_size)]
            self.meeting.tell("go", {"to": [report.nonce for report in reports.values()], "nodes": nodes})
            self.add_up(nodes)
            reports = self.wait_for_sums()
            judge_sums(reports, self.limit, found)
        return self.finish(reports, found)

    def at(self, phase: str) -> None:
        """Let the others know what this task is at; if they can't be told any more, they will see that, too."""
        self.report.phase = phase
        try:
            self.meeting.leave(self.report)
        except OSError as error:
            _complain(f"preflight on {self.report.node}: {error}")

    def wait_for_all(self) -> dict[int, Report] | int:
        """The reports of all, or of those who came in time; the exit code where it was asked to end before."""

        def all_there() -> bool:
            return self.stop.requested or len(self.done()) == self.ranks.world_size

        wait_until(all_there, self.limit)
        return EXIT_STOPPED if self.stop.requested else self.meeting.reports()

    def wait_for_word(self) -> dict[int, Report] | int:
        """Do as the first task says and return the exit code; or return the reports, to be judged by this task
        because it is the first that is there."""

        def word() -> bool:
            return self.stop.requested or self.told("go") is not None or self.told("result") is not None

        wait_until(word, self.limit + MARGIN_SECONDS)
        go = self.told("go")
        if go is not None:
            self.add_up(go["nodes"])
            return _leave(0)
        if self.stop.requested:
            return EXIT_STOPPED
        if self.told("result") is None and self.ranks.rank == min(self.done(), default=0):
            return self.meeting.reports()
        wait_until(lambda: self.told("result") is not None, MARGIN_SECONDS)
        return 0

    def add_up(self, nodes: list[str]) -> None:
        """The all-reduce, in a thread of its own: this one goes on whatever happens there."""
        from launch.cluster.allreduce import add_up

        def at(what: str) -> None:
            self.report.reduce["at"] = what
            self.at("adding up over all ranks")

        def work() -> None:
            try:
                self.report.reduce |= add_up(self.config, self.ranks, nodes, self.limit, at)
                self.at(REDUCED)
            except Exception as error:
                self.report.reduce["error"] = " ".join(str(error).split())[:500] or type(error).__name__
                self.at(FAILED)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(2 * self.limit)
        if thread.is_alive():
            _complain(f"preflight on {self.report.node}: rank {self.ranks.rank} is stuck; its stacks:")
            faulthandler.dump_traceback(sys.stderr)
            self.report.reduce["error"] = f"stuck for {2 * self.limit:.0f} s"
            self.at(FAILED)

    def wait_for_sums(self) -> dict[int, Report]:
        """All reports, in the end or when the others have failed and some stay silent."""
        failed_at: list[float] = []

        def over() -> bool:
            phases = [report.phase for report in self.meeting.reports().values()]
            if FAILED in phases and not failed_at:
                failed_at.append(time.monotonic())
            waited = bool(failed_at) and time.monotonic() - failed_at[0] > SILENT_SECONDS
            return waited or all(phase in (REDUCED, FAILED) for phase in phases)

        before = time.monotonic()
        wait_until(over, 2 * self.limit)
        self.seconds |= self.report.reduce.get("seconds", {})
        self.seconds.setdefault("adding up", time.monotonic() - before)
        return self.meeting.reports()

    def finish(self, reports: Mapping[int, Report], found: Findings) -> int:
        """Say what came out, write it down, let the others go."""
        from launch.cluster.preflight_report import verdict

        self.seconds["in all"] = time.monotonic() - self.began
        text = verdict(self.run_folder, reports, self.ranks.world_size, found, self.seconds)
        print(text, flush=True)
        result: dict[str, Any] = {
            "code": found.code,
            "sick": list(found.sick),
            "reasons": found.sick,
            "findings": [list(line) for line in found.lines],
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "text": text,
            "to": [report.nonce for report in reports.values()],
            "reports": [asdict(reports[rank]) for rank in sorted(reports)],
        }
        self.meeting.tell("result", result)
        shared = [f"{check}: {text}" for check, level, text in found.lines if level == "bad"]
        reasons = [f"{node}: {reason}" for node, its in found.sick.items() for reason in its] or shared
        record(self.run_folder, "preflight", sick=list(found.sick), text="; ".join(reasons) or "all nodes are fine")
        if found.code:
            time.sleep(1.5)  # a launcher may kill the others as soon as this one fails: let them read and go
        self.meeting.tidy()
        if len(reports) < self.ranks.world_size or any(
            r.phase not in (DONE, REDUCED, FAILED) for r in reports.values()
        ):
            self.end_the_step()
        return _leave(found.code)

    def end_the_step(self) -> None:
        """Kill those who hang, and this task with them: srun would wait for them for ever."""
        step = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
        if "SLURM_STEP_ID" in os.environ and shutil.which("scancel"):
            sys.stdout.flush()
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["scancel", "--signal=KILL", step], capture_output=True, timeout=30)

    def without_a_folder(self, error: OSError) -> int:
        """The run folder can't be written to from here: a fault of this node only if others can."""
        _complain(f"preflight on {self.report.node}: can't write to {self.run_folder}: {error.strerror or error}")
        if self.ranks.rank > 0:
            return 0  # is missed, and named
        if not wait_until(lambda: bool(self.meeting.reports()) or self.stop.requested, MARGIN_SECONDS):
            _complain(f"preflight: no task can write to {self.run_folder}; give the run another folder by runs=...")
            return EXIT_SHARED
        wait_until(lambda: self.stop.requested, self.limit + 2 * MARGIN_SECONDS)
        return EXIT_SICK

    def expected(self) -> dict[str, int] | None:
        """The tasks of every node, where the launcher tells."""
        try:
            return tasks_of_nodes(os.environ)
        except (OSError, ValueError, subprocess.SubprocessError):
            return None

    def done(self) -> dict[int, Report]:
        return {rank: report for rank, report in self.meeting.reports().items() if report.phase in (DONE, REDUCED)}

    def told(self, name: str) -> dict[str, Any] | None:
        return self.meeting.told(name, self.report.nonce)


def _leave(code: int) -> int:
    """End at once: threads that are stuck in a collective would keep the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        os._exit(code)
    return code


def _seconds(name: str, default: float) -> float:
    given = os.environ.get(name)
    try:
        seconds = default if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{name} is {given!r}; give seconds, such as {default:g}")
    return seconds


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
