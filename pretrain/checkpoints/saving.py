"""Saving while training goes on: a copy in memory, written by a thread of each rank, agreed on by all of them.

A save stalls training for the copy to host memory only. Then each rank's thread writes its piece; what became of it is
one number of what ranks tell each other each step (`status`, heard by `hear`), so that no further collective is
needed. When all have written, rank 0's thread writes the export, which it reads from the pieces, and gives the
checkpoint its name. Whatever kills the run before that moment leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.files import sync
from data_pipelines.retry import PASSING, patiently
from pretrain.checkpoints.exports import Export
from pretrain.checkpoints.folder import CheckpointFolder, ResumeState, Written, read_state
from pretrain.checkpoints.pieces import HostCopy, Pieces
from pretrain.engines import live_state
from pretrain.engines.collectives import all_gather_scalars
from pretrain.survival.history import record

#: What a rank says of the save in flight.
BUSY, WRITTEN, FINISHED, FAILED = 0.0, 1.0, 2.0, -1.0
#: On a network's file system, another node's files may take a moment to be seen.
_UNSEEN = PASSING | {errno.ENOENT}
_MARGIN = 1.1  # of free disk, beyond the size of a checkpoint


class NotSavedError(OSError):
    """A checkpoint could not be written, and the run is to end for it; on all ranks alike."""


@dataclass(frozen=True)
class _Save:
    """A save in flight: the same on every rank."""

    state: ResumeState
    export: Export
    names: dict[str, str]  # of the export's tensors: how the pieces call them
    others: dict[str, Tensor]  # those that the pieces don't hold


class Saver:
    """Writes the checkpoints of one run. `save`, `settle` and `restore` are called by all ranks together."""

    def __init__(self, folder: CheckpointFolder, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.last: Path | None = None  # the last checkpoint that is there
        self.status = WRITTEN
        #: Counts what becomes of saves, alike on all ranks: a status that was told in an earlier phase says nothing.
        self.phase = 0
        self._copy = HostCopy()
        self._save: _Save | None = None
        self._thread = threading.Thread()
        self._problem: Exception | None = None

    def restore(self, engine: Any, path: Path, state: ResumeState) -> None:
        """Bring a fresh engine to the state of a checkpoint."""
        paths = [path / piece_name(rank, state.world_size) for rank in range(state.world_size)]
        for piece in paths:
            patiently(piece, "finding", piece.stat, None, _UNSEEN)
        with Pieces(paths) as pieces:
            live_state.restore(engine, pieces, state.counters)
        self.last = path

    def save(self, engine: Any, state: ResumeState, export: Export, wait: bool = False) -> None:
        """Begin the checkpoint of `state.step`; with `wait`, or if saving is not asynchronous, finish it, too.

        A save that is still in flight is waited for: nothing that was asked for is left out, and there is one copy in
        memory at most.
        """
        if self._save is not None:
            slow = "" if wait else ": the disk is slower than checkpoint.every_steps asks for"
            self._say(f"waiting for the checkpoint of step {self._save.state.step}, which is still being written{slow}")
            self.settle()
        self._copy.take(live_state.own_parts(engine), self.device)
        known = live_state.tensor_names(engine.module)
        tensors = export.module.state_dict(keep_vars=True)
        names = {key: known[id(tensor)] for key, tensor in tensors.items() if id(tensor) in known}
        others = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items() if key not in names}
        self._save = _Save(state, export, names, others)
        self.phase += 1
        self._start(self._write_piece)
        if wait or not self.folder.config.asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait until the save in flight has ended, well or not."""
        while self._save is not None:
            self._thread.join()
            self.hear(all_gather_scalars({"saving": self.status}, self.device).by_rank["saving"])

    def hear(self, statuses: Sequence[float], phase: int | None = None) -> None:
        """What all ranks said of the save in flight: when each has written, rank 0 finishes; after that it is there.

        `phase`: that in which they said so; default: the present one.
        Raises NotSavedError on all ranks where it failed on one and `checkpoint.on_failure` is stop.
        """
        if self._save is None or BUSY in statuses or phase not in (None, self.phase):
            return
        self.phase += 1
        failing = [rank for rank, status in enumerate(statuses) if status == FAILED]
        if failing:
            self._give_up(failing)
        elif statuses[0] == FINISHED:
            self.last = self.folder.path(self._save.state.step)
            self._save = None
        elif self.rank == 0:
            self._start(self._finish)

    def check_room(self, engine: Any) -> None:
        """Print a warning where the disk has clearly no room for one more checkpoint; by rank 0."""
        if self.rank != 0:
            return
        self.folder.folder.mkdir(parents=True, exist_ok=True)
        needed, free = live_state.num_bytes(engine), shutil.disk_usage(self.folder.folder).free
        if free < _MARGIN * needed:
            print(
                f"WARNING: a checkpoint takes about {needed / 1e9:.2f} GB and {self.folder.folder} has "
                f"{free / 1e9:.2f} GB free. Make room; checkpoint.keep_last is {self.folder.config.keep_last}",
                flush=True,
            )

    def _start(self, job: Callable[[], None]) -> None:
        self.status, self._problem = BUSY, None
        # a daemon: a run that ends for another reason does not wait for a disk that hangs
        self._thread = threading.Thread(target=job, name="checkpoint", daemon=True)
        self._thread.start()

    def _write_piece(self) -> None:
        try:
            assert self._save is not None
            folder = self.folder.temporary(self._save.state.step)
            path = folder / piece_name(self.rank, self.world_size)

            def write() -> None:
                folder.mkdir(parents=True, exist_ok=True)
                written = self._copy.write(path)
                path.with_suffix(".json").write_text(json.dumps(asdict(written)), encoding="utf-8")
                sync(path.with_suffix(".json"))

            patiently(path, "writing", write)
            self.status = WRITTEN
        except Exception as error:  # told to all ranks, and raised by `hear` if the disk is not to blame
            self._problem, self.status = error, FAILED

    def _finish(self) -> None:
        try:
            assert self._save is not None
            save, folder = self._save, self.folder.temporary(self._save.state.step)
            paths = [folder / piece_name(rank, self.world_size) for rank in range(self.world_size)]
            files = {path.name: patiently(path, "finding", partial(_recorded, path), None, _UNSEEN) for path in paths}

            def export() -> dict[str, Written]:
                exported = folder / save.export.folder
                shutil.rmtree(exported, ignore_errors=True)
                with Pieces(paths) as pieces:
                    weights = {key: pieces.whole(name) for key, name in save.names.items()}
                save.export.write(exported, weights | save.others)
                for path in (*exported.iterdir(), exported):
                    sync(path)
                return {f"{exported.name}/{path.name}": Written.of(path) for path in exported.iterdir()}

            files |= patiently(folder / save.export.folder, "writing", export)
            for path in paths:
                path.with_suffix(".json").unlink()
            patiently(folder, "naming", lambda: self.folder.admit(save.state.step, files, save.state))
            self.status = FINISHED
        except Exception as error:
            self._problem, self.status = error, FAILED

    def _give_up(self, failing: list[int]) -> None:
        assert self._save is not None
        step, self._save, self.status = self._save.state.step, None, WRITTEN
        if self.rank == 0:
            shutil.rmtree(self.folder.temporary(step), ignore_errors=True)
        problem, self._problem = self._problem, None
        if problem is not None and not isinstance(problem, OSError):
            raise problem
        before = f"the checkpoint before it stays: {self.last}" if self.last else "there is no checkpoint before it"
        if self.rank == failing[0]:
            print(f"CHECKPOINT NOT SAVED: step {step}: {problem}; {before}", flush=True)
            _record(self.folder.run, "saved_not", step=step, reason=str(problem), ranks=failing)
        if self.folder.config.on_failure == "stop":
            raise NotSavedError(f"the checkpoint of step {step} could not be written; {before}")

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def piece_name(rank: int, world_size: int) -> str:
    """The file that a rank writes."""
    return f"piece-{rank:05d}-of-{world_size:05d}.safetensors"


def _recorded(path: Path) -> Written:
    """What another rank wrote, once all of it can be seen here."""
    try:
        written = Written(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise OSError(errno.EIO, f"its record can't be read ({error})", str(path)) from error
    size = path.stat().st_size
    if size != written.bytes:
        raise OSError(errno.EIO, f"{size} bytes are seen of {written.bytes}", str(path))
    return written


def last_of_all(folder: CheckpointFolder, device: torch.device) -> ResumeState | None:
    """Rank 0's newest whole checkpoint, told to every rank: on a shared file system the others may not see the same
    files yet. What is damaged is named and recorded, what a killed save left is removed. Collective.
    """
    state = None
    if dist.get_rank() == 0:
        folder.tidy()
        path, passed_over = folder.last()
        for line in passed_over:
            print(line, flush=True)
            _record(folder.run, "alarm", name="damaged_checkpoint", text=line)
        state = None if path is None else read_state(path)
    text = json.dumps(None if state is None else asdict(state)).encode()
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, src=0)
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(content, src=0)
    found = json.loads(content.cpu().numpy().tobytes())
    return None if found is None else ResumeState(**found)


def _record(run: Path, event: str, **details: Any) -> None:
    try:
        record(run, event, **details)
    except OSError as error:  # as on a full disk; what matters is printed
        print(f"the run's history could not be written: {error}", flush=True)
