"""Focal Transformer's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import SWIN_SIZES, EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout


@section
class FocalConfig(EncoderSettings):
    """The Focal Transformer (Yang et al. 2021), not FocalNet; `size` names dim, depths and heads, as of Swin.

    The tokens of a window attend to each other, to the `expand` tokens around it, and to the windows around it, each
    pooled to one token (on further levels, in parts).
    """

    family: Literal["focal"] = "focal"
    decisive = ("dim", "depths", "heads", "windows", "expand", "levels", "focal_windows", "overlapping")
    size: Literal["tiny", "small", "base"] = "tiny"  # names dim, depths and heads
    dim: PositiveInt | None = None  # of the first stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    heads: tuple[PositiveInt, ...] | None = None  # of each stage
    patch: PositiveInt = 4  # side in px
    windows: tuple[PositiveInt, ...] = (7, 7, 7, 7)  # side in tokens, by stage
    expand: tuple[NonNegativeInt, ...] = (3, 3, 3, 0)  # tokens seen on each side of a window, by stage
    levels: PositiveInt = 2  # 1: no pooled windows; 2: whole ones; 3: also their quarters; ...
    focal_windows: tuple[PositiveInt, ...] = (7, 5, 3, 1)  # side in pooled windows, the window's own in the middle
    overlapping: bool = False  # embeddings of 7x7 px and 3x3 tokens (the authors' useconv), else of 4x4 and 2x2
    layer_scale: PositiveFloat | None = None  # what the branches are multiplied by at the start; None: nothing
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block

    @property
    def shape(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Width of the first stage, blocks per stage, heads per stage."""
        dim, depths, heads = SWIN_SIZES[self.size]
        return self.dim or dim, self.depths or depths, self.heads or heads

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.shape[1]) - 1)

    @model_validator(mode="after")
    def _check(self) -> FocalConfig:
        dim, depths, heads = self.shape
        lengths = {"depths": depths, "heads": heads, "windows": self.windows, "expand": self.expand}
        lengths["focal_windows"] = self.focal_windows
        if len({len(values) for values in lengths.values()}) > 1:
            listed = ", ".join(f"{name} {tuple(values)}" for name, values in lengths.items())
            raise ValueError(f"each stage needs one value of every list, but they differ in length: {listed}")
        for stage, (num_heads, window, expand, focal) in enumerate(
            zip(heads, self.windows, self.expand, self.focal_windows, strict=True)
        ):
            if dim * 2**stage % num_heads:
                raise ValueError(
                    f"stage {stage} is {dim * 2**stage} wide, which does not divide into {num_heads} heads"
                )
            if expand > window:
                raise ValueError(f"expand of stage {stage} is {expand}; it is at most the window's {window} tokens")
            if focal % 2 == 0:
                raise ValueError(f"focal_windows of stage {stage} is {focal}; the window in the middle makes it odd")
            if self.levels > 1 and 2 ** (self.levels - 2) > window:
                raise ValueError(f"levels is {self.levels}: windows of {window} tokens don't divide so often")
        if self.overlapping and self.patch != 4:
            raise ValueError(f"patch is {self.patch}; overlapping embeddings are of 7x7 px at every 4th: set patch=4")
        return self


SPEC = EncoderSpec(
    name="focal",
    title="the Focal Transformer",
    description="the Focal Transformer (Yang et al. 2021)",
    config=FocalConfig,
    build="pretrain.encoders.focal.encoder:FocalEncoder",
    drop_layout="one_in_2x2",
    layouts={"focal": Layout("pretrain.encoders.focal.layouts:read_focal")},
    examples=(
        Example(
            small={
                "dim": 8, "depths": (1, 1), "heads": (1, 2), "patch": 8, "windows": (2, 2), "expand": (1, 0),
                "focal_windows": (3, 1),
            }
        ),
    ),
)  # fmt: skip
