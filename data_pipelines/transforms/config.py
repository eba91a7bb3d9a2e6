"""What each recipe sees of an image: the crops it asks for, and the parameters drawn for one sample.

The dataclasses are the `views:` section of a preset. They name what is drawn; an backend carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

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

    size: Size  # px; one number is a square; under shape=native it follows from max_tokens
    shape: Literal["fixed", "native"] = "fixed"  # fixed: each crop is resized to size; native: it keeps its own shape
    patch: PositiveInt | None = None  # native: px; the sides of a crop are multiples of it
    max_tokens: PositiveInt | None = None  # native: the most patches that a crop has
    area: tuple[PositiveInt, PositiveInt] | None = None  # native: patches, drawn; default: max_tokens / 4 and on
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, drawn log-uniformly; native: over the image's, 1 .. 1
    interpolation: Interpolation = "bicubic"  # when resizing
    flip: Share = 0.5  # probability of a mirrored crop
    jitter: tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] = (0, 0, 0, 0)
    """Strength of brightness, contrast, saturation (factor drawn from 1 -+ value) and hue (turns)."""
    jitter_prob: Share = 1.0  # probability of any
    grayscale: Share = 0.0  # probability of greyscale
    blur: Share = 0.0  # probability of blur
    blur_radius: tuple[float, float] = (0.1, 2.0)  # px, the Gaussian's standard deviation
    solarise: Share = 0.0  # probability of inverting what is bright

    @model_validator(mode="before")
    @classmethod
    def _of_native_shape(cls, given: Any) -> Any:
        """Under shape=native: the square of max_tokens as size, for which encoders are built, and the image's ratio."""
        settings = given.kwargs if isinstance(given, ArgsKwargs) else given
        if not isinstance(settings, Mapping) or settings.get("shape") != "native":
            return given
        tokens, patch = settings.get("max_tokens"), settings.get("patch")
        filled = {"ratio": (1.0, 1.0), **settings}
        if isinstance(tokens, int) and isinstance(patch, int) and tokens > 0:
            filled.setdefault("size", (1 + math.isqrt(tokens - 1)) * patch)
            filled["area"] = settings.get("area") or (max(1, tokens // 4), tokens)
        filled.setdefault("size", 1)  # for `_check_native` to say what is missing
        return ArgsKwargs((), filled) if isinstance(given, ArgsKwargs) else filled

    @model_validator(mode="after")
    def _check_native(self) -> Crop:
        own = {"patch": self.patch, "max_tokens": self.max_tokens, "area": self.area}
        if self.shape == "fixed":
            named = [name for name, value in own.items() if value is not None]
            if named:
                raise ValueError(f"{named[0]} is about crops of their own shape; set shape=native, or leave it out")
            return self
        if self.patch is None or self.max_tokens is None or self.area is None:
            raise ValueError("shape=native needs patch (px) and max_tokens, such as patch=16 max_tokens=256")
        if not self.area[0] <= self.area[1] <= self.max_tokens:
            raise ValueError(f"area is {self.area[0]} .. {self.area[1]} patches; it must rise, to at most max_tokens")
        side = (1 + math.isqrt(self.max_tokens - 1)) * self.patch
        if self.size != (side, side):
            raise ValueError(
                f"size is {self.size[0]}x{self.size[1]} px; of crops of their own shape it follows from max_tokens "
                f"({side} px): leave it out"
            )
        return self

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
class TeacherCrops:
    """Every global crop once more, same region and flip, at the size that a frozen teacher sees."""

    size: Size  # px; one number is a square
    interpolation: Interpolation = "bicubic"  # when resizing
    colours: bool = False  # whether the crop's colour operations are done here, too


@section
class MixedSizes:
    """Sizes that the crops of some steps have, all images alike; px, one number is a square."""

    share: Annotated[float, Field(gt=0)] = 1.0  # of the steps, by ratio
    global_crops: Size  # theirs, and so that of what is masked
    local_crops: Size | None = None  # null: as views.local_crops has it
    teacher_crops: Size | None = None  # null: as views.teacher_crops has it


@section
class Views:
    """All crops of one image: `v` global, `u` local, and perhaps some for a tokenizer or a teacher."""

    global_crops: Annotated[tuple[Crop, ...], Field(min_length=1)]  # of one size: one, or DINO's two
    local_crops: LocalCrops | None = None  # small crops, of DINO
    target_crop: TargetCrop | None = None  # for a tokenizer
    teacher_crops: TeacherCrops | None = None  # for a teacher that sees more, or other, pixels than the student
    mixed_sizes: tuple[MixedSizes, ...] = ()
    """Sizes between which steps change, drawn by step; the sizes above are the largest, which the loader makes."""

    @model_validator(mode="after")
    def _check(self) -> Views:
        sizes = {crop.size for crop in self.global_crops}
        if len(sizes) > 1:
            raise ValueError(f"global crops have the sizes {sorted(sizes)}; they are stacked, so all must be equal")
        kinds = {(crop.shape, crop.patch) for crop in (*self.global_crops, *filter(None, [self.local_crops]))}
        if len(kinds) > 1 or len({crop.max_tokens for crop in self.global_crops}) > 1:
            raise ValueError(
                "crops of their own shape (shape=native) and others, of several patches, or global crops of several "
                "max_tokens don't go together; give all of them shape=native and one patch"
            )
        for name in ("target_crop", "teacher_crops"):
            if self.native and getattr(self, name) is not None:
                raise ValueError(f"{name} have one size; they go with no crops of their own shape (shape=native)")
        self._check_mixed()
        height, width = self.global_size
        seen = None if self.teacher_crops is None else self.teacher_crops.size
        if seen is not None and seen[0] * width != seen[1] * height:
            raise ValueError(
                f"teacher_crops are {seen[0]}x{seen[1]} px and global_crops {height}x{width} px; they show the same "
                "region, so their sides must be in one proportion"
            )
        return self

    def _check_mixed(self) -> None:
        if self.mixed_sizes and self.native:
            raise ValueError("mixed_sizes are of crops of one size; they go with no crops of their own shape")
        for number, sizes in enumerate(self.mixed_sizes):
            for name in ("global_crops", "local_crops", "teacher_crops"):
                size, crops = getattr(sizes, name), getattr(self, name)
                if size is None:
                    continue
                if crops is None:
                    raise ValueError(f"mixed_sizes.{number}.{name} is set, and views.{name} is null: set both or none")
                most = self.global_size if name == "global_crops" else crops.size
                if size[0] > most[0] or size[1] > most[1] or size[0] * most[1] != size[1] * most[0]:
                    raise ValueError(
                        f"mixed_sizes.{number}.{name} is {size[0]}x{size[1]} px and views.{name} {most[0]}x{most[1]}; "
                        "it must be smaller, and in the same proportion"
                    )

    @property
    def native(self) -> bool:
        """Whether crops keep their own shape."""
        return self.global_crops[0].shape == "native"

    @property
    def most_tokens(self) -> int:
        """Of a row, all of its crops of their own shape together; 0 where they are of fixed size."""
        local = self.local_crops
        tokens = [crop.max_tokens or 0 for crop in self.global_crops]
        return sum(tokens) + (0 if local is None else local.count * (local.max_tokens or 0))

    @property
    def global_size(self) -> tuple[int, int]:
        """Height and width of the global crops in pixels."""
        return self.global_crops[0].size
