"""The settings of positions that several families share (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from data_pipelines.transforms.config import section


@section
class RotaryPositions:
    """Rotary positions as DINOv3 has them (Simeoni et al. 2025, section 3): every head's queries and keys are turned by
    angles that their patch's row and column give.

    A patch's coordinates lie in -1 .. 1 over the image, whatever its size. In training they may be moved, stretched by
    a factor for each axis and by one for both, in this order; drawn anew for every block and size of crop, the same
    for all images of a step.
    """

    base: PositiveFloat | None = 100.0  # periods rise from 1 to near it
    periods: tuple[PositiveFloat, PositiveFloat] | None = None  # the least and the largest, in place of base
    normalise: Literal["separate", "max", "min"] = "separate"  # rows by height and columns by width, or both by one
    shift: NonNegativeFloat = 0.0  # coordinates are moved by up to this much
    jitter: Annotated[float, Field(ge=1)] = 1.0  # and stretched, an axis by itself, by 1 / this .. this
    rescale: Annotated[float, Field(ge=1)] = 1.0  # and both axes alike; 2 in DINOv3's recipe
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the angles and of the turning

    @property
    def varies(self) -> bool:
        """Whether coordinates are drawn in training."""
        return self.shift > 0 or self.jitter > 1 or self.rescale > 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.base is None) == (self.periods is None):
            raise ValueError("rotary positions need base or periods (least, largest), and not both; set one to null")
        return self


def check_rotary(dim: int, heads: int) -> None:
    """ValueError where heads are of a width that rotary positions do not divide."""
    if dim // heads % 4:
        raise ValueError(
            f"a head is {dim // heads} wide; rotary positions need a multiple of 4 (rows and columns, in pairs); "
            "choose dim and heads so"
        )
