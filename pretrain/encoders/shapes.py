"""The published sizes that several families share, and their checks (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section

# dim, depth, heads of the published sizes
VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
}
SWIN_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


@section
class SpatialTransformerConfig:
    """An affine map of each image, read off it by a small network (Jaderberg et al. 2015), at first the identity."""

    hidden: PositiveInt = 16  # width of the network
    rate: PositiveFloat = 0.1  # what its last layer is multiplied by, so that with Adam the map learns so much slower
    limit: PositiveFloat | None = 0.5  # how far each of the six numbers may be from the identity's; null: anything


@section
class EncoderSettings:
    """What every encoder of ours can be told."""

    spatial_transformer: SpatialTransformerConfig | None = None  # in front of it; null: it sees images as they are


@section
class VitShape(EncoderSettings):
    """What every vision transformer is told: `size` names dim, depth and heads, each of which may be set by itself."""

    family: str = ""
    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"  # names dim, depth and heads
    dim: PositiveInt | None = None  # width; default: that of size
    depth: PositiveInt | None = None  # blocks; default: those of size
    heads: PositiveInt | None = None  # default: those of size
    patch: PositiveInt = 16  # side in px
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, number of blocks, number of attention heads."""
        dim, depth, heads = VIT_SIZES[self.size]
        return self.dim or dim, self.depth or depth, self.heads or heads

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        dim, _, heads = self.shape
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        return self


@section
class SwinShape(EncoderSettings):
    """What every Swin is told: `size` names dim, depths and heads, each of which may be set by itself."""

    family: str = ""
    size: Literal["tiny", "small", "base", "large"] = "tiny"  # names dim, depths and heads
    dim: PositiveInt | None = None  # of the first stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    heads: tuple[PositiveInt, ...] | None = None  # of each stage
    patch: PositiveInt = 4  # side in px
    window: PositiveInt = 7  # side in tokens
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
    def _check_shape(self) -> Self:
        dim, depths, heads = self.shape
        if len(depths) != len(heads):
            raise ValueError(f"depths {depths} name {len(depths)} stages and heads {heads} name {len(heads)}; set both")
        for stage, num_heads in enumerate(heads):
            width = dim * 2**stage
            if width % num_heads:
                raise ValueError(f"stage {stage} is {width} wide, which does not divide into {num_heads} heads")
        return self


def check_four_stages(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]) -> None:
    for name, values in (("dims", dims), ("depths", depths), ("heads", heads)):
        if len(values) != 4:
            raise ValueError(f"{name} {tuple(values)} names {len(values)} stages; this family has 4")
    for stage, (dim, num_heads) in enumerate(zip(dims, heads, strict=True)):
        if dim % num_heads:
            raise ValueError(f"stage {stage} is {dim} wide, which does not divide into {num_heads} heads")
