"""No encoder's forward pass waits for the device or copies to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import CUDA, OnHost, WaitError, trace_on_fake_gpu
from test_supported import UNITS
from torch import Tensor, nn

from data_pipelines.rng import Stream
from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.registry import FAMILIES
from pretrain.encoders.supported import EXAMPLES, cell
from pretrain.stream.masking import one_in_2x2, random_units

ROWS = {
    row: (spec, spec.config(**example.settings, **example.small), example.side)
    for row, (spec, example) in zip(
        EXAMPLES, [(spec, example) for spec in FAMILIES.values() for example in spec.examples], strict=True
    )
}
HEAVY = {  # a second one of its family, or code that is timm's own
    row for row, (spec, _, _) in ROWS.items() if spec.name == "timm" and row != "timm:resnet50"
} | {"swin_moe, router=cosine", "swin, version=2", "visual_transformer, tokenizer=filter", "pvt_v2, linear"}
HEAVY |= {
    "local_attention, stem=conv",
    "t2t, tokens=transformer",
    "timesformer, attention=joint",
    "pvt, reduction=pool",
}


class Waits(nn.Module):
    """Does what a forward pass must not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = torch.arange(3.0)  # no buffer: it stays on the CPU

    def forward(self, values: Tensor, other: Tensor | None = None) -> Any:
        match self.how:
            case "item":
                return values.sum().item()
            case "list":
                return values.tolist()
            case "if":
                return values if values.sum() > 0 else -values
            case "int":
                return values[: int(values.sum())]
            case "nonzero":
                return values.nonzero()
            case "boolean index":
                return values[values > 0]
            case "to the host":
                return values.cpu()
            case "to the device":
                return values + self.table.to(values.device)
            case "a new number":
                return values + torch.tensor([1.0, 2.0, 3.0], device=values.device)
            case "copy_":
                return values.copy_(other)
        return values * 2 + torch.arange(3, device=values.device) + torch.zeros(3, device=values.device).fill_(4)


@pytest.mark.parametrize(
    "how", ["item", "list", "if", "int", "nonzero", "boolean index", "to the host", "to the device", "copy_"]
)
def test_what_waits_is_caught(how: str) -> None:
    with pytest.raises((WaitError, AssertionError)):
        trace_on_fake_gpu(Waits(how), torch.ones(3), OnHost(torch.ones(3)))


def test_what_does_not_wait_passes() -> None:
    assert trace_on_fake_gpu(Waits("nothing"), torch.ones(3)).device == CUDA


def masks(kind: str, grid: tuple[int, int]) -> Tensor:
    draw = {"one_in_2x2": one_in_2x2, "any": lambda stream, grid: random_units(stream, grid, grid[0] * grid[1] // 2)}
    return torch.from_numpy(np.stack([draw[kind](Stream(seed), grid) for seed in range(2)]))


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow) if row in HEAVY else row for row in ROWS])
def test_no_encoder_waits(row: str) -> None:
    spec, config, side = ROWS[row]
    replaces = cell(EXAMPLES[row], "mim") == "yes"
    torch.manual_seed(0)
    encoder = build_encoder(config, (side, side), mask_token=replaces).train()
    unit = UNITS.get(side, 16)
    images, grid = torch.zeros(2, 3, side, side), (side // 2 // unit, side // 2 // unit)
    layers = (-1,) if encoder.blocks() else ()
    shown: list[tuple[Tensor, Mask | None]] = [(images, None)]
    if replaces:
        shown.append((images, Mask(token=masks("any", grid))))
    if cell(EXAMPLES[row], "mae") == "yes":
        dropped = masks(spec.drop_layout, (side // unit, side // unit))
        shown.append((images, Mask(drop=dropped, num_visible=int((~dropped[0]).sum()))))
    if spec.name != "timm":  # whose models do the same at every size
        shown.append((images[..., :32, :32], None))
    for seen, mask in shown:
        features = trace_on_fake_gpu(encoder, seen, mask, layers=layers)
        assert features.pooled.shape == (2, encoder.dim)
        assert {part.device for part in (features.tokens, features.pooled)} == {CUDA}
