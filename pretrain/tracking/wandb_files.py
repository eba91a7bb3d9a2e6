"""What lies in the files that wandb writes beside a run: read back to know what it has, and what it lost.

A `.wandb` file is a log in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB that hold records in parts,
each part with a checksum, a length and a kind. A record is one of wandb's own messages. wandb itself has no reader in
Python, and its command that prints such files reads nothing of a run that was killed before its first flush.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.tracking.console import say

HEADER = b":W&B"
MAGIC = 0xBEE1
BLOCK = 32 * 1024
_HEADER_BYTES = 7
_PART = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _LAST = 1, 2, 4


class WandbFileError(ValueError):
    """A file that is none of wandb's, or of a version whose format is not known here."""


@dataclass
class WandbFile:
    """One life of a run, as wandb wrote it down."""

    path: Path
    id: str = ""  # empty, as all else, of a life that was killed before anything was written
    project: str = ""
    entity: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, str]] = field(default_factory=list)  # {"name" or "glob": ..., "step_metric": ...}
    files: list[str] = field(default_factory=list)
    ended: bool = False  # by a call to finish, not by a death

    @property
    def offline(self) -> bool:
        """Written without a server: all that is in it is still to be sent, unless `synced`."""
        return self.path.parent.name.startswith("offline-run-")

    @property
    def synced(self) -> bool:
        """Whether `wandb sync` has sent it."""
        return self.path.with_name(self.path.name + ".synced").exists()


def wandb_files(folder: Path, run_id: str | None = None) -> list[Path]:
    """The files that wandb wrote in the folder of a run, oldest first; of one run id only, if it is given."""
    name = run_id or "*"
    found = [*folder.glob(f"wandb/offline-run-*/run-{name}.wandb"), *folder.glob(f"wandb/run-*/run-{name}.wandb")]
    return sorted(found, key=lambda path: (path.parent.name.removeprefix("offline-"), path))


def read_wandb_file(path: Path) -> WandbFile:
    """Everything in a file up to where it ends or is torn, as a run that is still going or was killed leaves it.

    Raises WandbFileError.
    """
    from wandb.proto import wandb_internal_pb2

    read = WandbFile(path)
    for payload in _payloads(path):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(payload)
        except Exception as error:
            raise WandbFileError(f"{path} holds a record that wandb {_version()} can't read: {error}") from error
        _add(read, record)
    return read


@dataclass
class Had:
    """Of which steps wandb has rows, by their kind, and what its summary says.

    online: rows that were given to a server, which may have got all but the last. all_to: the step up to which a
    server says it has them, where one was asked. named: the metrics whose axis this life has told.
    """

    offline: set[tuple[str, int]] = field(default_factory=set)
    online: set[tuple[str, int]] = field(default_factory=set)
    all_to: int | None = None
    named: set[str] = field(default_factory=set)
    summary: dict[str, Any] = field(default_factory=dict)

    def has(self, kind: str, step: int) -> bool:
        if (kind, step) in self.offline:
            return True
        if self.all_to is None or kind.startswith("probe"):  # which come when they like
            return (kind, step) in self.online
        return step <= self.all_to

    def add(self, kind: str, step: int) -> bool:
        """Count a row as sent; False if it was before."""
        new = not self.has(kind, step)
        self.offline.add((kind, step))
        return new


def kind_of(row: Iterable[str]) -> str:
    """What a row is about, by its keys: `pictures/NAME`, `system`, `probe` or, of all others, `metrics`."""
    for key in row:
        section = key.partition("/")[0]
        if section in ("system", "probe"):
            return section
        if section == "pictures":
            return key
    return "metrics"


def key_of(row: Mapping[str, Any]) -> tuple[str, int] | None:
    """By which a row is known: its kind and step; of probes, of which a checkpoint may have several, the numbers too.
    None for a row of neither."""
    if "step" in row:
        return kind_of(row), int(row["step"])
    if "probe/step" in row:
        numbers = sorted((name, float(value)) for name, value in row.items() if name.startswith("probe/"))
        return f"probe {numbers}", int(row["probe/step"])
    return None


def what_wandb_has(folder: Path, run_id: str, project: str) -> Had:
    """Read back all that wandb has written of a run in its folder; a file that can't be read counts for nothing."""
    from wandb.proto import wandb_internal_pb2

    had, summary = Had(), {}
    for path in wandb_files(folder, run_id):
        rows: set[tuple[str, int]] = set()
        its_project = project
        record = wandb_internal_pb2.Record()
        try:
            for payload in _payloads(path):
                record.ParseFromString(payload)
                kind = record.WhichOneof("record_type")
                if kind == "run":
                    its_project = record.run.project or project
                elif kind == "history":
                    texts = {_key(item): item.value_json for item in record.history.item}
                    if "step" in texts:
                        rows.add((kind_of(texts), int(json.loads(texts["step"]))))
                    elif "probe/step" in texts:
                        probe = {name: json.loads(text) for name, text in texts.items() if name.startswith("probe/")}
                        rows.update(filter(None, [key_of(probe)]))
                    summary.update(texts)  # of its own rows only: the rest of a summary is copied from lives before it
        except Exception as error:
            say(f"{path} can't be read ({error}); what it holds is sent again")
        if its_project == project:
            (had.offline if path.parent.name.startswith("offline-") else had.online).update(rows)
    copied = {key: text for key, text in summary.items() if not key.startswith(("_", "pictures/", "tables/"))}
    had.summary = {key: json.loads(text) for key, text in copied.items()}
    return had


def _add(read: WandbFile, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        read.id, read.project, read.entity, read.name = run.run_id, run.project, run.entity, run.display_name
        read.group, read.job_type, read.notes, read.tags = run.run_group, run.job_type, run.notes, list(run.tags)
        _update(read.config, run.config.update)
    elif kind == "config":
        _update(read.config, record.config.update)
    elif kind == "history":
        row: dict[str, Any] = {}
        _update(row, record.history.item)
        read.history.append(row)
        read.summary.update(row)  # as the server does
    elif kind == "summary":
        _update(read.summary, record.summary.update)
    elif kind == "metric":
        named = {"name": record.metric.name} if record.metric.name else {"glob": record.metric.glob_name}
        read.metrics.append({**named, "step_metric": record.metric.step_metric})
    elif kind == "files":
        read.files += [file.path for file in record.files.files]
    elif kind == "exit":
        read.ended = True


def _key(item: Any) -> str:
    """The name of a value; of one that belongs to a mapping, that of the mapping."""
    return item.key or item.nested_key[0]


def _update(values: dict[str, Any], items: Any) -> None:
    for item in items:
        path, value = list(item.nested_key) or [item.key], json.loads(item.value_json)
        inner = values
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value


def mend(path: Path) -> int:
    """Cut off the record in the midst of which a killed life's file ends; the number of bytes.

    `wandb sync` takes such a file for one that is still written to, and never for done.
    """
    torn = path.stat().st_size - max((end for end, _ in _records(path)), default=_HEADER_BYTES)
    if torn > 0:
        os.truncate(path, path.stat().st_size - torn)
        return torn
    return 0


def _payloads(path: Path) -> Iterator[bytes]:
    """The records of a file; one that is torn at the end is left out."""
    return (payload for _, payload in _records(path))


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each record of a file ends, and what is in it, put together from its parts."""
    content = path.read_bytes()
    magic = content[4:6]
    if content and (content[:4] != HEADER or len(magic) < 2 or struct.unpack("<H", magic)[0] != MAGIC):
        raise WandbFileError(f"{path} is no .wandb file (it begins with {content[:7]!r})")
    position, parts = _HEADER_BYTES, b""
    while position + _PART.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < _PART.size:  # too small for a part: filled with zeros
            position += left
            continue
        _, length, kind = _PART.unpack_from(content, position)
        position += _PART.size
        if kind == 0 or position + length > len(content):
            return
        part = content[position : position + length]
        parts = part if kind in (_FULL, _FIRST) else parts + part
        position += length
        if kind in (_FULL, _LAST):
            yield position, parts
            parts = b""


def _version() -> str:
    import wandb

    return wandb.__version__
