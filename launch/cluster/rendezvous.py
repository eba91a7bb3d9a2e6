"""Where the tasks of a preflight leave their reports: a folder they share, before any of them talks to another.

A task that hangs, or was never started, leaves none; those who wait for it do so for a bounded time and can name it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipelines.files import write_json
from launch.ranks import Ranks
from pretrain.survival.failures import ATTEMPT

#: Reports that are older than one's own by so much, in seconds of the file system's clock, are of an earlier start
#: under the same name, as launchers other than SLURM may give one twice.
STALE_SECONDS = 600.0
DONE, REDUCED, FAILED = "done", "reduced", "failed"


@dataclass
class Report:
    """What one task says."""

    start: str  # the same for all tasks of one start
    rank: int
    node: str
    local_rank: int
    local_tasks: int
    nonce: str  # of this task alone
    phase: str = "starting"  # what it is at: a word of its own, then DONE (looked), then REDUCED or FAILED
    facts: dict[str, Any] = field(default_factory=dict)  # to be compared between nodes
    troubles: list[list[str]] = field(default_factory=list)  # check, level, text
    reduce: dict[str, Any] = field(default_factory=dict)  # what came of the all-reduce
    seconds: dict[str, float] = field(default_factory=dict)

    def trouble(self, check: str, level: str, text: str) -> None:
        """Something is wrong: `launch.cluster.checks` says what the levels are."""
        self.troubles.append([check, level, text])

    @classmethod
    def read(cls, data: Any) -> Report:
        """From JSON; raises ValueError or TypeError for what is none."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in dict(data).items() if name in known})


class Meeting:
    """The folder of one start."""

    def __init__(self, folder: Path, start: str) -> None:
        self.folder, self.start = folder, start
        self._read: dict[str, tuple[tuple[int, int], Report]] = {}
        self._mine: float | None = None

    def leave(self, report: Report) -> float:
        """Write this task's report, whole or not at all; returns by how many seconds this clock is ahead of the
        file system's. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, before = self._path(report.rank), time.time()
        write_json(path, asdict(report))
        self._mine = path.stat().st_mtime
        return (before + time.time()) / 2 - self._mine

    def reports(self) -> dict[int, Report]:
        """The reports that can be seen now, by rank. Those already read are read again only when they changed."""
        found: dict[int, Report] = {}
        for entry in self._entries():
            if not (entry.name.startswith("rank-") and entry.name.endswith(".json")):
                continue
            try:
                status = entry.stat()
                if self._mine is not None and status.st_mtime < self._mine - STALE_SECONDS:
                    continue
                known, state = self._read.get(entry.name), (status.st_ino, status.st_mtime_ns)
                if known is None or known[0] != state:
                    text = Path(entry.path).read_text(encoding="utf-8")
                    self._read[entry.name] = (state, Report.read(json.loads(text)))
            except (OSError, ValueError, TypeError):
                continue  # replaced while it was read, or an NFS handle of yesterday: the next look will show
            report = self._read[entry.name][1]
            if report.start == self.start:
                found[report.rank] = report
        return found

    def tell(self, name: str, value: Mapping[str, Any]) -> None:
        """Write what all are to read; raises OSError."""
        write_json(self.folder / f"{name}.json", dict(value))

    def told(self, name: str, nonce: str) -> dict[str, Any] | None:
        """What was told under that name to the task of this nonce, and not to one of an earlier start."""
        if not any(entry.name == f"{name}.json" for entry in self._entries()):
            return None
        try:
            value = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return value if nonce in value["to"] else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def tidy(self) -> None:
        """Remove the single reports, once they are all in the result: of many tasks and restarts they are many."""
        for entry in self._entries():
            if entry.name.startswith("rank-") or entry.name == "go.json":
                Path(entry.path).unlink(missing_ok=True)

    def _entries(self) -> list[os.DirEntry[str]]:
        # opening the folder makes an NFS client ask the server anew; looking for a name alone would not
        try:
            with os.scandir(self.folder) as entries:
                return list(entries)
        except OSError:
            return []

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"


def names_of_start(environ: Mapping[str, str], ranks: Ranks) -> tuple[str, str]:
    """The name of the folder, and what all tasks of one start call it without asking each other."""
    if "SLURM_JOB_ID" in environ:
        folder = f"{environ['SLURM_JOB_ID']}-{environ.get('SLURM_RESTART_COUNT') or 0}"
        if (attempt := environ.get(ATTEMPT) or "0") != "0":  # of an earlier one, the verdict is none
            folder += f"-{attempt}"
        return folder, f"{folder}-{environ.get('SLURM_STEP_ID')}"
    if ranks.world_size == 1:
        return "local", f"local-{os.getpid()}"
    run = environ.get("TORCHELASTIC_RUN_ID", "")
    return "local", f"{run}-{ranks.master_addr}-{ranks.master_port}-{environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again, less and less often, for so long; whether it became true."""
    end, pause = time.monotonic() + seconds, 0.02
    while not true():
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.3, 1.0)
    return True


def free_bytes(folder: Path) -> int:
    """Room for this user in the file system of a folder that may be still to be made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
