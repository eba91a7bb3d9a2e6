"""Checkpoints that are either whole or not there, and finding the last good one.

A checkpoint `checkpoints/step-N/` is the state after N optimizer steps: DeepSpeed's files, `state.json` (what a resume
must agree on, and the size and checksum of every file), and `encoder/` (or `tokenizer/`), what the run is for as of
that step. It is written under a temporary name, synced to disk, renamed, and only then named by `checkpoints/latest`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipelines.files import sync, write_text
from pretrain.config import ConfigError
from pretrain.engine import whole_state_dict
from pretrain.exports import Export
from pretrain.schema import CheckpointConfig


@dataclass(frozen=True)
class ResumeState:
    """What was true when a checkpoint was written."""

    step: int
    world_size: int
    zero_stage: int
    order: dict[str, Any]  # the sampler's state, and what else the batches and the method depend on
    milestone: bool = False


class Checkpoints:
    """The `checkpoints/` folder of one run. `save` and `load` are collective: every rank calls them."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self.folder = run / "checkpoints"
        self.config = config

    def last(self) -> tuple[Path, ResumeState] | None:
        """The newest checkpoint that is whole; damaged ones are named on the way. None when there is none."""
        for path in reversed(self.all()):
            problem = damage(path, contents=True)
            if problem is None:
                return path, read_state(path)
            print(f"checkpoint {path} is damaged ({problem}); looking for the one before it", flush=True)
        return None

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:08d}"

    def save(self, engine: Any, state: ResumeState, export: Export) -> Path:
        """Write the checkpoint of `state.step`, make it the latest, and remove those no longer kept."""
        final = self.path(state.step)
        temporary = self.folder / f".{final.name}.tmp"
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save_checkpoint(str(self.folder), tag=temporary.name, save_latest=False)
        weights = whole_state_dict(export.module, state.zero_stage)
        for path in _files_written_by_this_rank(temporary, first):
            sync(path)
        dist.barrier()
        if first:
            export.write(temporary / export.folder, weights)
            _write_state(temporary, state)
            if final.exists():  # damaged, or the run would have gone on from it
                shutil.rmtree(final)
            temporary.rename(final)
            sync(self.folder)
            write_text(self.folder / "latest", final.name + "\n")
            self._prune(just_saved=final)
        dist.barrier()
        return final

    def load(self, engine: Any, path: Path) -> None:
        """Restore model, optimizer and buffers into the engine."""
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name)
        if loaded is None:
            raise FileNotFoundError(f"DeepSpeed found no checkpoint in {path}")

    def publish(self, path: Path, target: Path) -> None:
        """Copy a checkpoint's folder of that name to `target`, replacing what is there as a whole."""
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(path / target.name, temporary)
        for file in temporary.iterdir():
            sync(file)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _prune(self, just_saved: Path) -> None:
        """Remove what is no longer kept; damaged checkpoints do not count, and go."""
        damaged = [path for path in self.all() if damage(path) is not None]
        good = [path for path in self.all() if path not in damaged]
        passing = [path for path in good[: -self.config.keep_last] if not read_state(path).milestone]
        for path in [*damaged, *passing]:
            if path == just_saved:
                continue
            doomed = path.with_name(f".{path.name}.old")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)  # at no time is there a half-removed checkpoint under a good name
            shutil.rmtree(doomed)


def read_state(path: Path) -> ResumeState:
    """The state written beside a checkpoint."""
    data = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return ResumeState(**data["state"])


def agree_on(state: ResumeState | None, device: torch.device) -> ResumeState | None:
    """Rank 0's state on every rank: on a shared filesystem the others may not see the same files yet."""
    text = json.dumps(None if state is None else asdict(state)).encode()
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, src=0)
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(content, src=0)
    found = json.loads(content.cpu().numpy().tobytes())
    return None if found is None else ResumeState(**found)


def damage(path: Path, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None: each file must have its size and, with `contents`, its checksum."""
    try:
        files = json.loads((path / "state.json").read_text(encoding="utf-8"))["files"]
        expected = {name: (int(written["bytes"]), str(written["sha256"])) for name, written in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json: {type(error).__name__}: {error}"
    for name, (size, checksum) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if contents and _sha256(file) != checksum:
            return f"{name} is not what was written: its checksum differs"
    return None


def check_resume(path: Path, saved: ResumeState, world_size: int, zero_stage: int, order: dict[str, Any]) -> None:
    """Refuse to continue in another order, or where DeepSpeed's files can't be read; `growth` looks at the data."""
    for key, now in order.items():
        if key == "segments":
            continue
        before = saved.order.get(key)
        if before != now:
            raise ConfigError(
                f"{path} was reached with {key} = {before}, now it is {now}: the run would see other batches. "
                "Use the data and settings it was started with, or start a run of another name"
            )
    if zero_stage > 0 and saved.world_size != world_size:
        raise ConfigError(
            f"{path} was written by {saved.world_size} ranks under ZeRO stage {zero_stage} and there are {world_size} "
            f"now; DeepSpeed restores it on {saved.world_size} ranks only (ZeRO stage 0 restores on any number)"
        )


def _write_state(folder: Path, state: ResumeState) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"state": asdict(state), "files": files}, indent=2) + "\n"
    (folder / "state.json").write_text(text, encoding="utf-8")
    exported = [path for place in folder.iterdir() if place.is_dir() for path in (*place.iterdir(), place)]
    for path in [*exported, folder / "state.json", folder]:
        sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_written_by_this_rank(folder: Path, first: bool) -> list[Path]:
    """Optimizer pieces carry their rank in the name; the rest is rank 0's."""
    mine = f"zero_pp_rank_{dist.get_rank()}_"
    return [
        path
        for path in folder.iterdir()
        if path.is_file() and (mine in path.name or (first and "zero_pp_rank_" not in path.name))
    ]
