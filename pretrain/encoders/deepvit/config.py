"""DeepViT's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout

# dim, depth, heads, blocks with re-attention, whether what they attend with is scaled once more
DEEPVIT_SIZES = {
    "small": (396, 16, 12, 5, True),
    "large": (420, 32, 12, 12, False),
}


@section
class DeepVitConfig(EncoderSettings):
    """DeepViT (Zhou et al. 2021); `size` names dim, depth, heads, reattention and reattention_scaled.

    In the last `reattention` blocks the heads' attention maps are mixed with each other after the softmax, and brought
    to one variance by a norm over the batch. So in training an image's features depend on who shares its micro-batch.
    """

    family: Literal["deepvit"] = "deepvit"
    decisive = ("dim", "depth", "heads", "reattention", "reattention_scaled", "branch_scale", "stem")
    size: Literal["small", "large"] = "small"  # names those that are null below
    dim: PositiveInt | None = None  # width
    depth: PositiveInt | None = None  # blocks
    heads: PositiveInt | None = None  # of attention
    reattention: NonNegativeInt | None = None  # blocks with re-attention, the last ones
    reattention_scaled: bool | None = None  # its maps by head width^-.5
    branch_scale: PositiveFloat = 0.5  # each branch reads states times this, and what it adds is divided by it
    mlp_ratio: PositiveFloat = 3.0  # hidden width of the MLPs over dim
    stem: Literal["conv", "patch"] = "conv"  # conv: two convolutions before the patches, as published; patch: none
    patch: PositiveInt = 16  # side in px
    pool: Literal["class", "mean"] = "class"  # what stands for the image: class token, or mean of the patch tokens
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, number of blocks, number of attention heads."""
        dim, depth, heads, _, _ = DEEPVIT_SIZES[self.size]
        return self.dim or dim, self.depth or depth, self.heads or heads

    @property
    def mixed(self) -> tuple[int, bool]:
        """Number of blocks with re-attention, and whether its maps are scaled."""
        *_, blocks, scaled = DEEPVIT_SIZES[self.size]
        return (
            blocks if self.reattention is None else self.reattention,
            scaled if self.reattention_scaled is None else self.reattention_scaled,
        )

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch

    @model_validator(mode="after")
    def _check(self) -> Self:
        dim, depth, heads = self.shape
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        if self.mixed[0] > depth:
            raise ValueError(f"reattention is {self.mixed[0]} blocks of {depth}; set reattention too, up to depth")
        if self.stem == "conv" and self.patch % 2:
            raise ValueError(f"patch is {self.patch}; the convolutional stem halves the image, so it must be even")
        return self


_READ = "pretrain.encoders.deepvit.layouts:read_deepvit"

SPEC = EncoderSpec(
    name="deepvit",
    title="DeepViT",
    description="DeepViT (Zhou et al. 2021), whose heads exchange their attention maps",
    config=DeepVitConfig,
    build="pretrain.encoders.deepvit.encoder:DeepVitEncoder",
    drop_layout="any",
    headline=lambda config: "class",
    has_sequence=lambda config: True,
    layouts={"deepvit": Layout(_READ)},
    examples=(Example(small={"dim": 32, "depth": 2, "heads": 2, "reattention": 1}),),
)
