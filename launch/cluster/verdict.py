"""What becomes of a job whose training has ended: from its exit code and its earlier ends (imports no torch)."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.survival.stopping import EXIT_HUNG, EXIT_NOT_SAVED, EXIT_STOPPED, EXIT_TROUBLE, EXIT_USER_ERROR

EXIT_SICK = 3  # of launch.cluster.preflight: nodes that should not be used
CEILING = 20  # times the failures in a row
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
        ends = [event for event in history if event["event"] in ("requeued", "restarted") and event.get("job") == job]
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
