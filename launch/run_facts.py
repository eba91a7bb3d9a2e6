"""What a run's folder tells of it, read in milliseconds however long the run is (imports no torch).

Everything may be half-written, or not there yet: what can't be read is left out.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from pretrain.config import TrainConfig
from pretrain.engines.schedules import Timeline
from pretrain.survival.history import read_history, standing_alarms

CANCELLED = "cancelled"  # JSON, written by `selfsight cancel`: the run is not to be put back into the queue
_TAIL_BYTES = 1 << 14
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast, where it is there
_SECTIONS = re.compile(r"^(\w+):", re.MULTILINE)
_SIGNS = ("config.yaml", "history.jsonl", "metrics.jsonl")


@dataclass
class RunFacts:
    """A run as of now; None for what is not known."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)  # the sections that are needed here
    history: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] | None = None  # the last of metrics.jsonl
    row_time: float | None = None  # when it was written
    total_steps: int | None = None
    checkpoint: tuple[int, float] | None = None  # step, when
    holder: dict[str, Any] | None = None  # of the run's lock: host, pid, job
    held: bool | None = None  # by a process that lives; None: on another host, so not known
    published: int | None = None  # the step of the encoder or tokenizer that the run ended with
    cancelled: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def jobs(self) -> list[str]:
        """Of training, oldest first, by the names that SLURM gave them."""
        named = [str(job) for event in self.history if event["event"] == "submitted" for job in event.get("jobs") or ()]
        ran = [str(event["job"]) for event in self.history if event["event"] != "submitted" and event.get("job")]
        holder = [str(self.holder["job"])] if self.holder and self.holder.get("job") else []
        return list(dict.fromkeys([*named, *ran, *holder]))

    @property
    def probes(self) -> list[str]:
        """Jobs that probe it."""
        return list(
            dict.fromkeys(
                str(job) for event in self.history if event["event"] == "submitted" for job in event.get("probes") or ()
            )
        )

    @property
    def log(self) -> str | None:
        """The file that the last submitted job writes its output to."""
        return next((event["log"] for event in reversed(self.history) if event.get("log")), None)

    def last(self, *events: str) -> dict[str, Any] | None:
        """The last event of these kinds."""
        return next((event for event in reversed(self.history) if event["event"] in events), None)

    def alarms(self) -> list[str]:
        """Troubles that are not over: their names and since when."""
        lasting = standing_alarms(self.history)
        return [f"{name} since step {event.get('step')}: {event.get('text')}" for name, event in lasting.items()]

    def seconds_left(self) -> float | None:
        """At the speed of the last row."""
        row, batch = self.row or {}, (self.config.get("train") or {}).get("batch_size")
        speed = row.get("images_per_second")
        if self.total_steps is None or not batch or not speed or "step" not in row:
            return None
        return max(0, self.total_steps - row["step"]) * batch / speed


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The runs that these folders are or hold, or whose sweep they are; a folder that is not there is refused."""
    found: list[Path] = []
    for place in map(resolve, places):
        if not place.is_dir():
            raise FileNotFoundError(f"there is no folder {place}; name a run, as in runs/NAME, or the folder of many")
        if is_run(place):
            found.append(place)
        elif (swept := runs_of_sweep(place)) is not None:
            found += swept
        else:
            found += sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir() and is_run(entry.path))
    return list(dict.fromkeys(found))


def runs_of_sweep(folder: Path) -> list[Path] | None:
    """The runs of the sweep whose folder it is, as far as they are there; None where it is no sweep's."""
    listed = (_json(folder / "sweep.json") or {}).get("runs")
    if not isinstance(listed, list):
        return None
    names = [run["name"] for run in listed if isinstance(run, dict) and isinstance(run.get("name"), str)]
    return [place for name in names if is_run(place := folder.parent / name)]


def resolve(place: Path) -> Path:
    """A folder, or the run of that name in `runs/`."""
    beside = Path("runs") / place
    return beside if not place.exists() and len(place.parts) == 1 and beside.is_dir() else place


def is_run(folder: Path | str) -> bool:
    """Whether a folder holds a run, or one that has been submitted."""
    return any(os.path.lexists(os.path.join(folder, sign)) for sign in _SIGNS)  # noqa: PTH118 - thousands of them


def read_facts(folder: Path) -> RunFacts:
    """Everything above, of one run."""
    facts = RunFacts(folder, config=_sections(folder / "config.yaml", ("name", "train", "tracking")))
    with suppress(OSError):  # somebody else's, and not for us to read
        facts.history = read_history(folder)
    facts.row, facts.row_time = _last_row(folder / "metrics.jsonl")
    facts.total_steps = total_steps(facts.config.get("train"), facts.row)
    facts.checkpoint = _last_checkpoint(folder / "checkpoints")
    facts.holder = _json(folder / ".lock")
    facts.held = _is_held(folder / ".lock", facts.holder)
    step = published_card(folder).get("step")
    facts.published = step if isinstance(step, int) else None
    facts.cancelled = _cancelled(facts)
    return facts


def overrides_of(places: Iterable[Path]) -> dict[Path, list[str]]:
    """Of the runs of sweeps that lie in these folders, what each was given that not all of its sweep were."""
    found: dict[Path, list[str]] = {}
    for place in dict.fromkeys(places):
        for file in (place / "sweep.json", *place.glob("*/sweep.json")):
            listed = (_json(file) or {}).get("runs") or ()
            runs = [run for run in listed if isinstance(run, dict) and isinstance(run.get("name"), str)]
            words = [[str(word) for word in run.get("arguments") or () if "=" in str(word)] for run in runs]
            of_all = set(words[0]).intersection(*words) if len(words) > 1 else set()
            for run, given in zip(runs, words, strict=True):
                hidden = of_all | {f"name={run['name']}"}
                found[file.parent.parent / run["name"]] = [word for word in given if word not in hidden]
    return found


def _sections(path: Path, wanted: Iterable[str]) -> dict[str, Any]:
    """Some top-level sections of a YAML file of ours; the rest, far longer, is not parsed."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    starts = [*((match[1], match.start()) for match in _SECTIONS.finditer(text)), ("", len(text))]
    found: dict[str, Any] = {}
    for (name, start), (_, end) in pairwise(starts):
        if name in wanted:
            try:
                found |= yaml.load(text[start:end], Loader=_Loader)
            except (yaml.YAMLError, TypeError):
                continue
    return found


def _last_row(path: Path) -> tuple[dict[str, Any] | None, float | None]:
    try:
        with path.open("rb") as file:
            size, written = os.fstat(file.fileno()).st_size, os.fstat(file.fileno()).st_mtime
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None, None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # cut, at the end by a kill and at the start by us
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row, written
    return None, None


def published_card(folder: Path) -> dict[str, Any]:
    """What the encoder, or tokenizer, that a run ended with says of itself; empty before."""
    return _json(folder / "encoder" / "config.json") or _json(folder / "tokenizer" / "config.json") or {}


def total_steps(section: Any, row: dict[str, Any] | None) -> int | None:
    """How many steps a run shall have: from its section `train`, where that is in steps; else by how many steps an
    epoch has had in its last `row`."""
    row = row or {}
    if not isinstance(section, dict):
        return None
    try:
        train = TrainConfig(**section)
        if train.steps is None and not row.get("epoch"):
            return None
        return Timeline.of(train, row["step"] / row["epoch"] if row.get("epoch") else 1.0).total_steps
    except (ValueError, TypeError, KeyError):
        return None


def _cancelled(facts: RunFacts) -> dict[str, Any] | None:
    """The note of `selfsight cancel`, unless it is about earlier jobs than the last one: a command that was itself
    interrupted leaves it behind."""
    note, last = _json(facts.folder / CANCELLED), facts.last("submitted", "started", "requeued")
    if note is None or last is None or not isinstance(note.get("jobs"), list):
        return note
    return note if {last.get("job"), *(last.get("jobs") or ())} & set(note["jobs"]) else None


def _last_checkpoint(folder: Path) -> tuple[int, float] | None:
    try:
        steps = [entry for entry in os.scandir(folder) if re.fullmatch(r"step-\d+", entry.name)]
        newest = max(steps, key=lambda entry: int(entry.name[5:]))
        return int(newest.name[5:]), newest.stat().st_mtime
    except (OSError, ValueError):
        return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _is_held(lock: Path, holder: dict[str, Any] | None) -> bool | None:
    """Whether a process holds the lock; taking it to find out would get in the way of a run that starts."""
    if holder is None:
        return False
    if holder.get("host") != socket.gethostname():
        return None
    try:
        pid, status = int(holder["pid"]), lock.stat()
        os.kill(pid, 0)
    except PermissionError:
        return True  # somebody else's
    except (OSError, KeyError, ValueError, TypeError):
        return False
    try:
        locks = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return True
    return re.search(rf"^.*FLOCK.*:{status.st_ino} ", locks, re.MULTILINE) is not None


def age(since: float | None) -> float | None:
    """Seconds since then."""
    return None if since is None else max(0.0, time.time() - since)
