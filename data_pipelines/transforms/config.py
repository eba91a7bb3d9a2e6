"""What each recipe sees of an image: the crops it asks for, and the parameters drawn for one sample.

The dataclasses are the `views:` section of a preset. They name what is drawn; an backend carries it out.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass

#: Every section of a preset is one of these: frozen, keyword-only, no unknown keys.
section = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))


def _pair(value: object) -> object:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


#: Height and width in pixels; a single number stands for a square.
Size = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_pair)]
#: Who makes the crops. `native`: the kernel in C. `opencv`: libraries that need no compiler. `device`: one of those
#: cuts and resizes, the GPU does the colours. `auto`: native where it is built, else opencv.
BackendName = Literal["auto", "native", "opencv", "device"]
Share = Annotated[float, Field(ge=0, le=1)]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]


def _check_range(name: str, low: float, high: float) -> None:
    if not 0 < low <= high:
        raise ValueError(f"{name} is {low:g} .. {high:g}; it must be two positive numbers, the smaller one first")


@section
class Crop:
    """A random resized crop and the colour operations that follow it."""

    size: Size  # px; one number is a square
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn log-uniformly
    interpolation: Interpolation = "bicubic"  # when resizing
    flip: Share = 0.5  # probability of a mirrored crop
    jitter: tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] = (0, 0, 0, 0)
    """Strength of brightness, contrast, saturation (factor drawn from 1 -+ value) and hue (turns)."""
    jitter_prob: Share = 1.0  # probability of any
    grayscale: Share = 0.0  # probability of greyscale
    blur: Share = 0.0  # probability of blur
    blur_radius: tuple[float, float] = (0.1, 2.0)  # px, the Gaussian's standard deviation
    solarise: Share = 0.0  # probability of inverting what is bright

    @model_validator(mode="after")
    def _check(self) -> Crop:
        _check_range("scale", *self.scale)
        _check_range("ratio", *self.ratio)
        _check_range("blur_radius", *self.blur_radius)
        if self.scale[1] > 1:
            raise ValueError(f"scale ends at {self.scale[1]:g}; a crop covers at most the whole image (1.0)")
        return self


@section
class LocalCrops(Crop):
    """`count` crops of one small size: what the student of DINO sees beside the global crops."""

    count: PositiveInt = 8  # of each image


@section
class TargetCrop:
    """The first global crop once more, same region and colours, at the tokenizer's size."""

    size: Size  # px; one number is a square
    interpolation: Interpolation = "lanczos"  # when resizing


@section
class Views:
    """All crops of one image: `v` global, `u` local, and perhaps one for a tokenizer."""

    global_crops: Annotated[tuple[Crop, ...], Field(min_length=1)]  # of one size: one, or DINO's two
    local_crops: LocalCrops | None = None  # small crops, of DINO
    target_crop: TargetCrop | None = None  # for a tokenizer

    @model_validator(mode="after")
    def _check(self) -> Views:
        sizes = {crop.size for crop in self.global_crops}
        if len(sizes) > 1:
            raise ValueError(f"global crops have the sizes {sorted(sizes)}; they are stacked, so all must be equal")
        return self

    @property
    def global_size(self) -> tuple[int, int]:
        """Height and width of the global crops in pixels."""
        return self.global_crops[0].size
