"""A DINOv2 step, shaped as ViT-L/16 but with fewer blocks, at drop path .3: skipping against multiplying by zero.

Both draw the same; of the students alone, forward and backward, two global crops of 224 px and eight local ones of 96.
With `--shares`, what skipping is worth at other shares of kept rows, from which `drop_path.SKIP_BELOW` was chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _compare import compare
from timm.layers import DropPath
from torch import Tensor

from pretrain.encoders import Encoder, build_encoder, drop_path
from pretrain.encoders.vit.config import VitConfig

ROWS = 2


def student(rate: float, depth: int = 2) -> Encoder:
    torch.manual_seed(0)
    config = VitConfig(size="large", depth=depth, layer_scale=1e-5, drop_path=rate)
    encoder = build_encoder(config, (224, 224)).train()
    for block in encoder.blocks():  # the same in all, as in DINOv2's recipe (drop_path_uniform)
        block.drop_path1 = block.drop_path2 = DropPath(rate)
    return encoder


def step_of(encoder: Encoder, crops: list[Tensor], skip_below: float) -> Callable[[], None]:
    steps = iter(range(10**6))

    def step() -> None:
        drop_path.SKIP_BELOW = skip_below
        encoder.zero_grad()
        with drop_path.drawn(0, next(steps), torch.arange(ROWS)):
            torch.cat([encoder(images).pooled for images in crops]).square().mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", action="store_true", help="measure rates from .02 to .5 instead")
    args = parser.parse_args()
    chosen = drop_path.SKIP_BELOW
    crops = [torch.randn(2 * ROWS, 3, 224, 224), torch.randn(8 * ROWS, 3, 96, 96)]
    if args.shares:
        for rate in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
            encoder = student(rate, depth=1)
            skip, mask = step_of(encoder, crops, 1.0), step_of(encoder, crops, 0.0)
            compare(f"drop path {rate:g}, skipping against masking", "crops", 10 * ROWS, skip, mask)
        return
    encoder = student(0.3)
    skip, mask = step_of(encoder, crops, chosen), step_of(encoder, crops, 0.0)
    compare("DINOv2 ViT-L step of 2 blocks, drop path .3", "crops", 10 * ROWS, skip, mask, target=1.2)


if __name__ == "__main__":
    main()
