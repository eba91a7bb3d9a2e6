"""What lies in the files that wandb writes beside a run: read back to know what it has, and what it lost.

A `.wandb` file is a log in LevelDB's format: a header of 7 bytes, then blocks of 32 KiB that hold records in parts,
each part with a checksum, a length and a kind. A record is one of wandb's own messages. wandb itself has no reader in
Python, and its command that prints such files reads nothing of a run that was killed before its first flush.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER = b":W&B"
MAGIC = 0xBEE1
BLOCK = 32 * 1024
_PART = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _LAST = 1, 2, 4


class NotAWandbFile(ValueError):
    """A file that is none of wandb's, or of a version whose format is not known here."""


@dataclass
class WandbFile:
    """One life of a run, as wandb wrote it down."""

    path: Path
    id: str = ""
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

    Raises NotAWandbFile.
    """
    from wandb.proto import wandb_internal_pb2

    read = WandbFile(path)
    for payload in _payloads(path):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(payload)
        except Exception as error:
            raise NotAWandbFile(f"{path} holds a record that wandb {_version()} can't read: {error}") from error
        _add(read, record)
    return read


def steps_in(path: Path, metric: str = "step") -> set[int]:
    """The steps of which a file has rows; only that number of each row is looked at."""
    from wandb.proto import wandb_internal_pb2

    steps = set()
    for payload in _payloads(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            steps.update(int(json.loads(item.value_json)) for item in record.history.item if _key(item) == metric)
    return steps


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
    return item.key or ".".join(item.nested_key)


def _update(values: dict[str, Any], items: Any) -> None:
    values.update({_key(item): json.loads(item.value_json) for item in items})


def _payloads(path: Path) -> Iterator[bytes]:
    """The records of a file, put together from their parts; one that is torn at the end is left out."""
    content = path.read_bytes()
    if content and (len(content) < 7 or content[:4] != HEADER or struct.unpack("<H", content[4:6])[0] != MAGIC):
        raise NotAWandbFile(f"{path} is no .wandb file (it begins with {content[:7]!r})")
    position, parts = 7, b""
    while position + _PART.size <= len(content):
        left = BLOCK - position % BLOCK
        if left < _PART.size:  # too small for a part: filled with zeros
            position += left
            continue
        _, length, kind = _PART.unpack_from(content, position)
        position += _PART.size
        if kind == 0 or position + length > len(content):
            return
        parts = (
            content[position : position + length] if kind in (_FULL, _FIRST) else parts + content[position:][:length]
        )
        position += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def _version() -> str:
    import wandb

    return wandb.__version__
