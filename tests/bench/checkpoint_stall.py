"""How long a save stalls training: asynchronous against blocking, and against DeepSpeed's own `save_checkpoint`.

    python tests/bench/checkpoint_stall.py --rounds 3 --dim 384

One engine, one process, ZeRO 1, the three turn by turn within one run. The stall is what a save adds to the time of a
step; while an asynchronous save is being written, the steps beside it are timed, too. Torch writes DeepSpeed's files
without bringing them to the disk or counting a checksum; both of ours do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.exports import export_of
from pretrain.checkpoints.folder import FORM, CheckpointFolder, ResumeState
from pretrain.checkpoints.saving import Saver
from pretrain.config.load import parse_config
from pretrain.engines import live_state
from pretrain.engines.engine import build_engine, initialise_distributed
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.registry import build_method

SIZE, BATCH = 32, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=384, help="of the ViT, 12 blocks: 384 is ViT-S")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    initialise_distributed(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        measure(Path(folder), arguments.rounds, arguments.dim)


def measure(folder: Path, rounds: int, dim: int) -> None:
    """Print the table."""
    config = parse_config(
        {
            "name": "bench",
            "runs": str(folder),
            "data": {"train": "unused"},
            "views": {"global_crops": [{"size": SIZE}]},
            "encoder": {"family": "vit", "dim": dim, "depth": 12, "heads": dim // 64, "patch": 8},
            "method": {"name": "mim", "mask": {"kind": "random", "ratio": 0.5, "unit": 8}},
            "optim": {"lr": 1e-4},
            "train": {"steps": 10**6, "batch_size": BATCH},
            "engine": {"zero_stage": 1},
        }
    )
    torch.manual_seed(0)
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3)
    method = build_method(config, normalisation, Timeline(10**6, 10.0))
    engine = build_engine(config, method, torch.device("cpu"), 1)
    batch: Any = {
        "global_crops": torch.randint(0, 256, (BATCH, 1, 3, SIZE, SIZE), dtype=torch.uint8),
        "local_crops": None,
        "token_mask": torch.arange(BATCH * (SIZE // 8) ** 2).view(BATCH, SIZE // 8, SIZE // 8) % 2 == 0,
    }
    step = 0
    saver = Saver(CheckpointFolder(folder / "run", config.checkpoint), torch.device("cpu"))
    print(f"{live_state.num_bytes(engine) / 1e6:.0f} MB of state; {rounds} rounds; seconds")

    def train() -> float:
        nonlocal step
        began, step = time.perf_counter(), step + 1
        engine.backward(engine(batch, step)["loss"])
        engine.step()
        return time.perf_counter() - began

    def save(wait: bool) -> float:
        began = time.perf_counter()
        state = ResumeState(step, 1, 1, {}, form=FORM, counters=live_state.counters(engine))
        saver.save(engine, state, export_of(method, config, normalisation, step, 0.0), wait)
        return time.perf_counter() - began

    def theirs() -> float:
        began = time.perf_counter()
        engine.save_checkpoint(str(folder / "theirs"), tag="last")
        return time.perf_counter() - began

    for _ in range(3):
        train()
    save(wait=True)  # the memory of the copy is taken once
    stalls: dict[str, list[float]] = {"asynchronous": [], "blocking": [], "DeepSpeed's save_checkpoint": []}
    alone, beside, written = [], [], []
    for _ in range(rounds):
        alone += [train() for _ in range(4)]
        began = time.perf_counter()
        stalls["asynchronous"].append(save(wait=False))
        while saver._save is not None:
            beside.append(train())
            saver.hear([saver.status])
        written.append(time.perf_counter() - began)
        alone += [train() for _ in range(4)]
        stalls["blocking"].append(save(wait=True))
        train()
        stalls["DeepSpeed's save_checkpoint"].append(theirs())
    ours = statistics.median(stalls["asynchronous"])
    for name, seconds in stalls.items():
        middle = statistics.median(seconds)
        print(f"{name:30} stall {middle:7.3f}  (all: {', '.join(f'{s:.3f}' for s in seconds)})  {middle / ours:6.1f} x")
    print(
        f"a step: {statistics.median(alone):.3f} alone, {statistics.median(beside):.3f} while a checkpoint is written, "
        f"which takes {statistics.median(written):.3f} and {len(beside) / rounds:.1f} steps"
    )


if __name__ == "__main__":
    main()
