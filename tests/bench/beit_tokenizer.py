"""A BEiT v2 step whose frozen tokenizer computes at the run's precision, bf16, against one that computes in fp32.

    python tests/bench/beit_tokenizer.py [--device cuda] [--batch 128] [--turns 9] [--small]

ViT-B/16 with a tokenizer of its size, untrained, forward and backward. To be stated on a GPU: without bf16 instructions
a CPU is slower in bf16. Then the share of the codes that agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrain"))
from tiny import random_batch

from data_pipelines.buffers import map_batch
from pretrain.config.load import load_config
from pretrain.encoders import build_encoder
from pretrain.encoders.vit.config import VitConfig
from pretrain.engines.precision import allow_fast_products
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.frozen import Frozen
from pretrain.methods.registry import build_method
from pretrain.methods.vqkd.config import VqkdConfig
from pretrain.methods.vqkd.network import TaskHead, VqkdTokenizer
from pretrain.tokenizers.card import TokenizerCard
from pretrain.tokenizers.saved import save_tokenizer


class InFp32(Frozen):
    """As it was: whatever the run's precision is."""

    def __call__(self, inputs: torch.Tensor) -> Any:
        with torch.autocast(inputs.device.type, enabled=False):
            return super().__call__(inputs)


def write_tokenizer(folder: Path, vit: VitConfig, side: int) -> None:
    """An untrained tokenizer of VQ-KD."""
    vqkd, statistics_ = VqkdConfig(teacher="unused"), ((0.5,) * 3, (0.25,) * 3)
    encoder = build_encoder(vit, (side, side))
    codebook = torch.nn.functional.normalize(torch.randn(vqkd.vocab_size, vqkd.code_dim), dim=-1)
    tokenizer = VqkdTokenizer(encoder, TaskHead(encoder.dim, vqkd.code_dim), codebook, *statistics_)
    card = TokenizerCard(
        "vqkd", vqkd.vocab_size, vit.patch, 3, (side, side), *statistics_, vqkd, vit, step=1, epoch=1.0, run="bench"
    )
    save_tokenizer(folder, tokenizer.state_dict(), card)


def measure(device: str, batch: int, turns: int, small: bool) -> dict[str, float]:
    """Milliseconds of a step with the tokenizer in bf16 and in fp32, their ratio, and the share of equal codes."""
    where, side = torch.device(device), 32 if small else 224
    vit = VitConfig(dim=48, depth=2, heads=2, patch=4) if small else VitConfig(size="base", patch=16)
    changes = ["encoder.dim=48", "encoder.depth=2", "encoder.heads=2", "method.aggregation=null"] if small else []
    preset = "beitv2_vit_cifar_cpu" if small else "beitv2_vitb16_in1k_300"
    allow_fast_products(where)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(Path(place, "tokenizer"), vit, side)
        config = load_config(preset, ["data.train=unused", f"method.tokenizer={place}/tokenizer", *changes])
        method = build_method(config, Normalisation((0.5,) * 3, (0.25,) * 3), Timeline(100, 10.0)).to(where).train()
    shown = map_batch(random_batch(config, batch), lambda tensor: tensor.to(where))
    network = method.target.tokenizer.network
    sides: dict[str, Frozen] = {"bf16": Frozen(network), "fp32": InFp32(network)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    codes: dict[str, torch.Tensor] = {}
    for turn in range(turns + 2):
        for name, frozen in sides.items():
            method.target.tokenizer = frozen
            _wait(where)
            start = time.perf_counter()
            with torch.autocast(where.type, torch.bfloat16):
                loss = method(dict(shown), 0)["loss"]
            loss.backward()
            _wait(where)
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    for name, frozen in sides.items():
        with torch.autocast(where.type, torch.bfloat16):
            codes[name] = frozen(shown["target_crops"])
    found = {f"ms a step, tokenizer in {name}": 1000 * statistics.median(times) for name, times in seconds.items()}
    found["times as fast"] = statistics.median(seconds["fp32"]) / statistics.median(seconds["bf16"])
    found["codes that agree"] = float((codes["bf16"] == codes["fp32"]).float().mean())
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a tiny encoder at 32 px; default on a CPU")
    given = parser.parse_args()
    small = given.small or given.device == "cpu"
    for what, value in measure(given.device, given.batch or (8 if small else 128), given.turns, small).items():
        print(f"{what}: {value:.4g}")


if __name__ == "__main__":
    main()
