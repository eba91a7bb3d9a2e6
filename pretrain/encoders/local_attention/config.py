"""The settings of stand-alone local self-attention, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example

# blocks of each stage
RESNET_DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}


@section
class LocalAttentionConfig(EncoderSettings):
    """A ResNet with attention instead of 3x3 convolutions: of all, to a neighbourhood (Ramachandran et al. 2019), or of
    the last stage's, to the whole map (Srinivas et al. 2021, BoTNet)."""

    family: Literal["local_attention"] = "local_attention"
    decisive = ("dim", "depths", "heads", "kernel", "stem", "attention", "places")
    size: Literal[26, 38, 50] = 50  # the ResNet that it is made of; names depths
    dim: PositiveInt = 64  # width of attention in the first stage, doubled from stage to stage; 4 x that between blocks
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    attention: Literal["local", "botnet"] = "local"
    """local: to neighbourhoods, in every block; botnet: in the last stage to the whole map, before it convolutions."""
    places: Literal["relative", "absolute"] = "relative"  # of attention to the whole map
    heads: PositiveInt = 8  # of attention
    kernel: PositiveInt = 7  # side of the neighbourhood in tokens
    stem: Literal["attention", "conv"] = "attention"  # attention in 4x4 px, or ResNet's convolution
    mixtures: PositiveInt = 4  # of the stem's attention: values whose mixture depends on the place in the 4x4 px
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch = 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return self.depths or RESNET_DEPTHS[self.size]

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.shape) - 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim {self.dim} does not divide into {self.heads} heads of an even width: half of a head's channels "
                "knows rows, half columns"
            )
        return self


_SMALL = {"dim": 4, "depths": (1, 1, 1), "heads": 2, "kernel": 3}

SPEC = EncoderSpec(
    name="local_attention",
    title="local self-attention",
    description="a ResNet of stand-alone local self-attention (Ramachandran et al. 2019), or a bottleneck transformer",
    config=LocalAttentionConfig,
    build="pretrain.encoders.local_attention.encoder:LocalAttentionEncoder",
    drop_layout="one_in_2x2",
    examples=(
        Example(small=_SMALL),
        Example({"stem": "conv"}, _SMALL),
        Example({"attention": "botnet", "stem": "conv"}, _SMALL),
    ),
)
