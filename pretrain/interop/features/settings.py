"""What a multi-scale backbone is made like (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from data_pipelines.transforms.config import Size, section

Level = Annotated[int, Field(ge=0, le=7)]


@section
class FeatureSettings:
    """Of `selfsight export --to features`, as key=value."""

    levels: tuple[Level, ...] | None = None  # 2 is the map of stride 4; default [2,3,4,5], of a pyramid those it has
    width: PositiveInt = 256  # channels of every map
    window: NonNegativeInt | None = None  # side in tokens, 0: none; default 14 where the encoder takes windows
    global_blocks: NonNegativeInt | tuple[NonNegativeInt, ...] = 4  # how many, evenly spaced and the last, or which
    relative_positions: bool | None = None  # that start at zero; default: with windows
    filler: Literal["masked", "seen"] = "masked"  # what fills up the last windows; seen is ViTDet's and SAM's way
    class_token: bool = True  # and registers stay beside the patches; false: left out, as in ViTDet and SAM
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None  # of the last block; default: the encoder's
    patch: PositiveInt | None = None  # px; resamples the patch embedding, such as 14 to 16; default: the encoder's
    image_size: Size | None = None  # px that global relative positions are made for; default: the encoder's
    seed: NonNegativeInt = 0  # of what starts at random

    @model_validator(mode="after")
    def _check(self) -> FeatureSettings:
        levels = self.levels
        if levels is not None and (not levels or list(levels) != list(range(levels[0], levels[0] + len(levels)))):
            raise ValueError(f"levels are {levels}; name neighbours in ascending order, such as levels=[2,3,4,5]")
        return self


def evenly_spaced(count: int, depth: int) -> tuple[int, ...]:
    """Numbers of `count` of `depth` blocks, at the ends of as many equal parts: 2, 5, 8, 11 of 12 (ViTDet)."""
    return tuple(sorted({-(-depth * (part + 1) // count) - 1 for part in range(count)}))
