"""A run's saving without the run: a layer and its optimizer. `python saving.py FOLDER POINT` is killed there."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

from pretrain.checkpoints import folder as folders
from pretrain.checkpoints import pieces
from pretrain.checkpoints.exports import Export
from pretrain.checkpoints.folder import FORM, CheckpointFolder, ResumeState
from pretrain.checkpoints.saving import Saver
from pretrain.config import CheckpointConfig
from pretrain.engines import live_state
from pretrain.engines.adamw import AdamW

POINTS = (
    "in the piece",
    "before its record",
    "in the export",
    "before the name",
    "before old ones go",
    "while they go",
)


class Engine:
    """As much of a DeepSpeed engine under ZeRO 0 as a checkpoint looks at."""

    global_steps = global_samples = skipped_steps = micro_steps = 0

    def __init__(self, width: int = 64) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(width, width)
        groups = [{"params": [*self.module.parameters()], "lr": 1e-3, "weight_decay": 0.01}]
        self.optimizer = AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def zero_optimization_stage(self) -> int:
        return 0

    def gradient_accumulation_steps(self) -> int:
        return 1

    def step(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.global_steps += 1


def begin(run: Path, **settings: Any) -> Saver:
    """The saver of a run, in a process group of one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Saver(CheckpointFolder(run, CheckpointConfig(**settings)), torch.device("cpu"))


def write_export(folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(weights))


def save_step(saver: Saver, engine: Engine, wait: bool = True) -> None:
    """One more step, and its checkpoint."""
    engine.step()
    state = ResumeState(engine.global_steps, 1, 0, {}, form=FORM, counters=live_state.counters(engine))
    saver.save(engine, state, Export("encoder", engine.module, write_export), wait)


def kill_at(point: str) -> None:
    """From now on, the process is killed with signal 9 when it comes there."""

    def killing(real: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        def instead(*arguments: Any, **named: Any) -> Any:
            if after:
                real(*arguments, **named)
            os.kill(os.getpid(), signal.SIGKILL)

        return instead

    if point == "in the piece":
        pieces.os.fsync = killing(os.fsync)  # all is written, nothing is on the disk for sure
    elif point == "before its record":
        pieces.HostCopy.write = killing(pieces.HostCopy.write, after=True)  # type: ignore[method-assign]
    elif point == "in the export":
        globals()["write_export"] = killing(write_export, after=True)
    elif point == "before the name":
        Path.rename = killing(Path.rename)  # type: ignore[method-assign]
    elif point == "before old ones go":
        CheckpointFolder._prune = killing(CheckpointFolder._prune)  # type: ignore[method-assign]
    else:
        folders.shutil.rmtree = lambda path, ignore_errors=False: (
            killing(shutil.rmtree)() if not ignore_errors else None
        )


if __name__ == "__main__":
    a_saver, an_engine = begin(Path(sys.argv[1])), Engine()
    for _ in range(2):
        save_step(a_saver, an_engine)
    kill_at(sys.argv[2])
    save_step(a_saver, an_engine)
    sys.exit("was not killed")
