"""Jobs as SLURM tells of them: those it still has, and those that ended (imports no torch)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.cluster.slurm import ask

_AT_ONCE = 300  # jobs named on one command line
_FIELDS = ("%i", "%A", "%T", "%S", "%M", "%l", "%D", "%N", "%P", "%u", "%r")  # the reason last: it may hold anything
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
FAILED = ("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


@dataclass(frozen=True)
class Job:
    """A job that waits or runs; an element of an array has an `id` like 12_0 and a `number` of its own."""

    id: str
    number: str
    state: str
    start: str | None  # ISO, local time: when it started, or is expected to
    elapsed: float  # seconds
    limit: str
    num_nodes: int
    nodes: str
    partition: str
    user: str
    reason: str | None

    @property
    def waits(self) -> bool:
        """Whether it is yet to start, or to start again."""
        return self.state in WAITING


def has_slurm() -> bool:
    """Whether SLURM's commands are installed here."""
    return shutil.which("squeue") is not None


def ask_about(command: Sequence[str]) -> str:
    """`ask` about jobs some of which SLURM may have forgotten: if it has forgotten all, the answer is empty."""
    try:
        return ask(command)
    except OSError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def queued(jobs: Iterable[str]) -> list[Job]:
    """Those of `jobs` that wait or run; of an array named by its number, all elements. Raises OSError."""
    names, found = list(dict.fromkeys(jobs)), []
    for first in range(0, len(names), _AT_ONCE):
        some = ",".join(names[first : first + _AT_ONCE])
        command = ["squeue", "--noheader", "--array", "--jobs", some, "--format", "|".join(_FIELDS)]
        found += parse_queue(ask_about(command))
    return found


def parse_queue(text: str) -> list[Job]:
    """squeue's lines; those that are cut are left out."""
    jobs = []
    for line in text.splitlines():
        parts = line.strip().split("|", len(_FIELDS) - 1)
        if len(parts) < len(_FIELDS):
            continue
        name, number, state, start, elapsed, limit, num_nodes, nodes, partition, user, reason = parts
        jobs.append(
            Job(
                id=name,
                number=number,
                state=state,
                start=None if start in ("N/A", "") else start,
                elapsed=seconds_of(elapsed),
                limit=limit,
                num_nodes=int(num_nodes) if num_nodes.isdigit() else 0,
                nodes=nodes,
                partition=partition,
                user=user,
                reason=None if reason in ("None", "") else reason,
            )
        )
    return jobs


def seconds_of(clock: str) -> float:
    """`1-02:03:04`, `02:03:04` or `3:04` in seconds; 0 for what is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", clock)
    if match is None:
        return 0.0
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def ended(jobs: Iterable[str]) -> dict[str, str]:
    """The last states of jobs that are in the queue no more, as far as SLURM still knows: its accounting's, where
    there is one, else what the controller remembers. `CANCELLED by 1000`, `FAILED 137:0`."""
    names = list(dict.fromkeys(jobs))
    found = _accounted(names)
    for job in [name for name in names if name not in found][:50]:  # a call each
        try:
            text = ask_about(["scontrol", "--oneliner", "show", "job", job])
        except OSError:
            break
        for line in text.splitlines():
            fields = dict(word.partition("=")[::2] for word in line.split())
            if job in (fields.get("JobId"), f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"):
                code = fields.get("ExitCode", "0:0")
                found[job] = fields.get("JobState", "") + (f" {code}" if code != "0:0" else "")
    return found


def _accounted(jobs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if shutil.which("sacct") is None:
        return found
    for first in range(0, len(jobs), _AT_ONCE):
        some = ",".join(jobs[first : first + _AT_ONCE])
        command = ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", some]
        try:
            text = ask([*command, "--format", "JobID,State,ExitCode"])
        except OSError:  # no accounting on this cluster
            return found
        for line in text.splitlines():
            name, _, rest = line.partition("|")
            state, _, code = rest.partition("|")
            if name in jobs:
                found[name] = state + (f" {code}" if code not in ("", "0:0") else "")
    return found


def user_name() -> str:
    """Of whoever runs this."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
