"""The folder `checkpoints/` of a run: what is whole in it, what may be continued from, what goes (imports no torch).

A checkpoint `checkpoints/step-N/` is the state after N optimizer steps: `piece-R-of-W.safetensors`, one of each rank
that wrote it; `state.json` (what a resume must agree on, and the size and checksum of every file); and `encoder/` (or
`tokenizer/`), what the run is for as of that step. It is written under a temporary name, synced to disk, renamed, and
only then named by `checkpoints/latest`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipelines.cores import cores_per_process
from data_pipelines.files import sync, write_text
from data_pipelines.retry import patiently
from pretrain.config import CheckpointConfig
from pretrain.config.load import ConfigError

#: Of the files of a checkpoint; 0 are DeepSpeed's own, which the first versions wrote.
FORM = 1


@dataclass(frozen=True)
class ResumeState:
    """What was true when a checkpoint was written."""

    step: int
    world_size: int
    zero_stage: int
    order: dict[str, Any]  # the sampler's state, and what else the batches and the method depend on
    milestone: bool = False
    best: bool = False  # of a run that is compared with its start, the best until then
    form: int = 0
    counters: dict[str, int] = field(default_factory=dict)  # DeepSpeed's, of the engine


@dataclass(frozen=True)
class Written:
    """A file as it was meant to be written."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Written:
        """What a file holds now."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


class CheckpointFolder:
    """The `checkpoints/` folder of one run."""

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self.run = run
        self.folder = run / "checkpoints"
        self.config = config

    def last(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, read to the last byte, and a line for each newer one that is not."""
        passed_over = []
        for path in reversed(self.all()):
            problem = damage(path, contents=True)
            if problem is None:
                return path, passed_over
            passed_over.append(f"checkpoint {path} is damaged ({problem}); looking for the one before it")
        return None, passed_over

    def all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:08d}"

    def temporary(self, step: int) -> Path:
        """Where it lies until it is whole."""
        return self.folder / f".{self.path(step).name}.tmp"

    def tidy(self) -> None:
        """Remove what saves left behind that a kill ended; only while nobody saves."""
        for remains in (*self.folder.glob(".step-*.tmp"), *self.folder.glob(".step-*.old")):
            shutil.rmtree(remains, ignore_errors=True)

    def admit(self, step: int, files: dict[str, Written], state: ResumeState) -> Path:
        """Give a checkpoint of which all `files` are on the disk its name: from here on it is there.

        Raises OSError if it is not; once it is, what fails (pointing at it, removing those no longer kept) is printed.
        """
        temporary, final = self.temporary(step), self.path(step)
        for path in temporary.rglob("*"):  # a rank of an earlier start, on a node that was lost, may write here yet
            if path.is_file() and str(path.relative_to(temporary)) not in files:
                path.unlink()
        listed = {name: asdict(written) for name, written in sorted(files.items())}
        described = json.dumps({"state": asdict(state), "files": listed}, indent=2) + "\n"
        (temporary / "state.json").write_text(described, encoding="utf-8")
        sync(temporary / "state.json")
        sync(temporary)
        if final.exists():  # damaged, or the run would have gone on from it
            _remove(final)
        temporary.rename(final)
        try:
            sync(self.folder)
            pointed = self._points_at(final)  # before others go: it never names one that is gone
            self._prune(just_saved=final)
            if not pointed:  # for want of room, which there may be now
                write_text(self.folder / "latest", final.name + "\n")
        except OSError as error:
            print(f"{final} is saved; tidying up after it failed: {error}", flush=True)
        return final

    def publish(self, path: Path, target: Path) -> None:
        """Copy a checkpoint's folder of that name to `target`, replacing what is there as a whole."""
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file in (path / target.name).iterdir():
            shutil.copyfile(file, temporary / file.name)
            sync(temporary / file.name)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _points_at(self, final: Path) -> bool:
        try:
            write_text(self.folder / "latest", final.name + "\n")
        except OSError:
            return False
        return True

    def _prune(self, just_saved: Path) -> None:
        """Remove what is no longer kept; damaged checkpoints do not count, and go.

        One that can't be read does not count either, but stays: it may be as good as any when the disk is back.
        """
        good, going = [], []
        for path in self.all():
            try:
                (good if _damage(path) is None else going).append(path)
            except OSError as error:
                print(f"checkpoint {path} can't be read now and is left as it is: {error}", flush=True)
        best = [path for path in good if read_state(path).best][-1:]
        old = [path for path in good[: -self.config.keep_last] if path not in best]
        going += [path for path in old if not read_state(path).milestone]
        for path in going:
            if path != just_saved:
                _remove(path)


def _remove(path: Path) -> None:
    """At no time is there a half-removed checkpoint under a good name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_state(path: Path) -> ResumeState:
    """The state written beside a checkpoint."""
    return ResumeState(**json.loads(_described(path))["state"])


def damage(path: Path, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None: each file must have its size and, with `contents`, its checksum.

    What the file system fails at for a moment is tried again.
    """
    try:
        return _damage(path, contents)
    except OSError as error:
        return f"it can't be read: {error}"


def _damage(path: Path, contents: bool = False) -> str | None:
    """As `damage`; raises OSError where the file system does not let it tell."""
    try:
        files = json.loads(_described(path))["files"]
        expected = {name: Written(int(written["bytes"]), str(written["sha256"])) for name, written in files.items()}
        read_state(path)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json: {type(error).__name__}: {error}"
    for name, written in expected.items():
        size = patiently(path / name, "reading", partial(_size, path / name))
        if size is None:
            return f"{name} is missing"
        if size != written.bytes:
            return f"{name} has {size} bytes instead of {written.bytes}"
    if not contents:
        return None
    with ThreadPoolExecutor(min(8, cores_per_process())) as readers:  # hashing lets other threads run
        found = readers.map(lambda name: patiently(path / name, "reading", lambda: Written.of(path / name)), expected)
        for (name, written), now in zip(expected.items(), found, strict=True):
            if now != written:
                return f"{name} is not what was written: its checksum differs"
    return None


def _described(path: Path) -> str:
    return patiently(path / "state.json", "reading", lambda: (path / "state.json").read_text(encoding="utf-8"))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def check_resume(path: Path, saved: ResumeState, order: dict[str, Any] | None = None) -> None:
    """Raise ConfigError where a run can't continue from a checkpoint: files of another form, or another order.

    The ranks and the ZeRO stage may be others than those that wrote it. `order` is what the run would see, as far as
    it is known; `growth` looks at the data.
    """
    if saved.form != FORM:
        raise ConfigError(
            f"{path} holds the files of {'DeepSpeed itself' if saved.form == 0 else f'form {saved.form}'}, and this "
            f"version reads form {FORM} only. Finish the run with the version of selfsight that wrote it, or start a "
            f"run of another name from its weights: name=... init_from={path}"
        )
    for key, now in (order or {}).items():
        if key == "segments":
            continue
        if key not in saved.order:
            raise ConfigError(
                f"{path} was written by an earlier version of selfsight, which kept no {key} (now {now}): the run "
                "would see other batches. Finish it with that version, or start a run of another name from its "
                f"weights: name=... init_from={path}"
            )
        before = saved.order[key]
        if before != now:
            raise ConfigError(
                f"{path} was reached with {key} = {before}, now it is {now}: the run would see other batches. "
                "Use the data and settings it was started with, or start a run of another name"
            )


def check_continues(run: Path, config: CheckpointConfig) -> None:
    """Raise ConfigError where the newest checkpoint of a run is of another form; reads its `state.json` alone."""
    for path in CheckpointFolder(run, config).all()[-1:]:
        if damage(path) is None:  # else training takes the one before it, and says so
            check_resume(path, read_state(path))
