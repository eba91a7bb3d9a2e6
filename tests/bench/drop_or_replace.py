"""MAE that drops three quarters of the units against SimMIM that replaces them, on pyramids of the same size.

Whole training steps (forward, backward, AdamW) of Swin-T and PVT-S at 256 px, as UM-MAE compares them (Li et al. 2022,
table 1: 1.97 and 1.78 times). The peak memory of a step, beyond weights, gradients and the optimizer's state, is
measured in a process of its own for each side: of resident memory on a CPU, of what torch allocated on a GPU.

    python tests/bench/drop_or_replace.py [--batch 32] [--turns 5] [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _compare import compare
from _memory import last_number, peak_of

from pretrain.config.load import parse_config
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.registry import build_method, draw_fields_for

SIZE = 256
ENCODERS: dict[str, dict[str, Any]] = {
    "Swin-T": {"family": "swin", "size": "tiny", "window": 8},
    "PVT-S": {"family": "pvt", "size": "small", "reduction": "pool"},
}
METHODS: dict[str, dict[str, Any]] = {
    "drop": {
        "name": "mae",
        "mask": {"kind": "one_in_2x2", "unit": 16, "secondary": 0.25},
        "decoder_dim": 512,
        "decoder_depth": 2,
        "decoder_heads": 16,
    },
    "replace": {"name": "mim", "mask": {"kind": "random", "ratio": 0.6, "unit": 32}, "target": "pixels"},
}


def training_step(encoder: str, method: str, batch_size: int, device: torch.device) -> Callable[[], None]:
    """One optimizer step of a method on an encoder, on a fixed batch of noise."""
    config = parse_config(
        {
            "name": "bench",
            "runs": tempfile.gettempdir(),
            "data": {"train": "unused"},
            "views": {"global_crops": [{"size": SIZE}]},
            "encoder": ENCODERS[encoder],
            "method": METHODS[method],
            "optim": {"lr": 1e-4},
            "train": {"steps": 100, "batch_size": batch_size},
        }
    )
    torch.manual_seed(0)
    module = build_method(config, Normalisation((0.5,) * 3, (0.25,) * 3), Timeline(100, 10.0)).to(device)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-4, fused=True)
    draw = draw_fields_for(config)
    assert draw is not None
    drawn = [draw(0, 0, row) for row in range(batch_size)]
    masks = {name: torch.from_numpy(np.stack([row[name] for row in drawn])).to(device) for name in drawn[0]}
    crops = torch.randint(0, 256, (batch_size, 1, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    batch: Any = {"global_crops": crops, **masks}

    def step() -> None:
        loss = module(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(encoder: str, method: str, batch_size: int, device: torch.device) -> float:
    """MB that a step needs at most, beyond weights, gradients and the optimizer's state."""
    return peak_of(training_step(encoder, method, batch_size, device), device)


def in_own_process(encoder: str, method: str, arguments: argparse.Namespace) -> float:
    """`peak_memory` in a fresh process, whose freed tensors go back to the system."""
    command = [sys.executable, __file__, "--memory-of", encoder, method]
    command += ["--batch", str(arguments.batch), "--device", arguments.device]
    return last_number(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", nargs=2, metavar=("ENCODER", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.memory_of:
        print(peak_memory(*arguments.memory_of, arguments.batch, device))
        return
    for encoder in ENCODERS:
        sides = [training_step(encoder, method, arguments.batch, device) for method in ("drop", "replace")]
        compare(f"{encoder}, MAE drop against SimMIM replace", "images", arguments.batch, *sides, arguments.turns)
        drop, replace = (in_own_process(encoder, method, arguments) for method in ("drop", "replace"))
        print(f"{encoder}, peak memory of a step: {drop:,.0f} against {replace:,.0f} MB = {replace / drop:.2f} x less")


if __name__ == "__main__":
    main()
