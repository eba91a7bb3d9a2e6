"""The section that says which units of an image are hidden, shared by methods (imports no torch)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.methods.mask_counts import check_mask_counts
from pretrain.methods.spec import Tokens


@section
class MaskConfig:
    """Which units of an image are hidden."""

    kind: Literal["random", "blockwise", "one_in_2x2"] = "random"
    """`blockwise`: rectangles (BEiT). `one_in_2x2`: one visible unit in each 2x2 (UM-MAE)."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of hidden units
    unit: PositiveInt = 16  # px
    min_block: PositiveInt = 16  # blockwise: units in the smallest block
    min_aspect: Annotated[float, Field(gt=0, le=1)] = 0.3  # blockwise: aspect is log-uniform in a .. 1/a
    secondary: Annotated[float, Field(ge=0, lt=1)] = 0.0  # one_in_2x2: share of VISIBLE units that become a mask token

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if self.kind == "one_in_2x2" and not math.isclose(self.ratio, 0.75):
            raise ValueError(f"mask ratio is {self.ratio:g}; one visible unit in 2x2 hides exactly 0.75")
        if self.secondary and self.kind != "one_in_2x2":
            raise ValueError(f"secondary masking goes with kind one_in_2x2, not {self.kind}")
        return self


def check_mask(mask: MaskConfig, image_size: tuple[int, int], tokens: Tokens | None) -> None:
    """Raise ValueError unless a mask's units fit the image (h, w px) and, where they are known, an encoder's tokens."""
    for side in image_size:
        if side % mask.unit:
            raise ValueError(f"method.mask.unit is {mask.unit} px and does not divide the image's side of {side} px")
    check_mask_counts(mask, image_size)
    if tokens is None:
        return
    unit, (stride, patch) = mask.unit, tokens
    if unit % patch:
        raise ValueError(f"method.mask.unit is {unit} px; it must be a multiple of the encoder's patch ({patch} px)")
    if unit % stride and stride % unit:
        raise ValueError(f"method.mask.unit {unit} px and the encoder's stride {stride} px: one must divide the other")
    coarsest = max(unit, stride)
    for side in image_size:
        if mask.kind == "one_in_2x2" and side % (2 * coarsest):
            raise ValueError(
                f"the image's side is {side} px; with one visible unit in 2x2 it must be a multiple of "
                f"{2 * coarsest} px (twice the larger of mask unit {unit} and encoder stride {stride})"
            )
