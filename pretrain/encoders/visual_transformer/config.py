"""The settings of visual transformers of tokens, and what is known of them without building one (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings, SpatialTransformerConfig
from pretrain.encoders.spec import EncoderSpec, Example

# blocks of the three stages of convolutions
RESNET_DEPTHS = {18: (2, 2, 2), 34: (3, 4, 6)}


@section
class VisualTransformerConfig(EncoderSettings):
    """A ResNet whose last stage is made of visual tokens (Wu et al. 2020): a few, which the map is summed up in."""

    family: Literal["visual_transformer"] = "visual_transformer"
    decisive = ("dim", "depths", "tokens", "token_blocks", "tokenizer")
    size: Literal[18, 34] = 18  # the ResNet whose last stage is replaced; names depths
    dim: PositiveInt = 64  # width of the first stage, doubled from stage to stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage of convolutions
    tokens: PositiveInt = 16  # visual tokens
    token_blocks: PositiveInt = 2  # blocks with visual tokens, after the convolutions
    tokenizer: Literal["recurrent", "filter"] = "recurrent"  # of the blocks after the first, whose tokenizer is filters
    straightened: SpatialTransformerConfig | None = None  # a spatial transformer on the map that tokens are made of
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Blocks of each stage of convolutions."""
        return self.depths or RESNET_DEPTHS[self.size]

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.shape) - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % 2:
            raise ValueError(f"dim is {self.dim}; keys of visual tokens are half as wide, so it must be even")
        return self


_SMALL = {"dim": 8, "depths": (1, 1, 1), "tokens": 3}

SPEC = EncoderSpec(
    name="visual_transformer",
    title="visual transformer of tokens",
    description="a ResNet that ends in visual tokens (Wu et al. 2020)",
    config=VisualTransformerConfig,
    build="pretrain.encoders.visual_transformer.encoder:VisualTransformerEncoder",
    drop_layout="one_in_2x2",
    examples=(
        Example(small=_SMALL),
        Example({"tokenizer": "filter"}, {**_SMALL, "straightened": SpatialTransformerConfig(hidden=4)}),
    ),
)
