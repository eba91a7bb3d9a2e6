"""PVT's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout

# dims of the four stages, depths; heads, MLP ratios and spatial reductions are the same for all sizes
PVT_SIZES = {
    "tiny": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "small": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "medium": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "large": ((64, 128, 320, 512), (3, 8, 27, 3)),
}


@section
class PvtConfig(EncoderSettings):
    """The pyramid vision transformer, version 1 (Wang et al. 2021); `size` names dims and depths.

    `reduction` is how keys and values are brought to a coarser map: `conv`, the official model (kernel = stride), or
    `pool`, UM-MAE's variant (average pooling and a 1x1 convolution, one table of positions, no class token), whose
    weights fit the compact maps of MAE as well as whole images.
    """

    family: Literal["pvt"] = "pvt"
    decisive = ("dims", "depths", "heads", "reduction", "mlp_ratios", "sr")
    size: Literal["tiny", "small", "medium", "large"] = "small"  # names dims and depths
    reduction: Literal["conv", "pool"] = "conv"  # of keys and values: conv is the official model, pool is UM-MAE's
    dims: tuple[PositiveInt, ...] | None = None  # width of each stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    heads: tuple[PositiveInt, ...] = (1, 2, 5, 8)  # of each stage
    mlp_ratios: tuple[PositiveFloat, ...] = (8, 8, 4, 4)  # hidden width of each stage's MLP, relative to dims
    sr: tuple[PositiveInt, ...] = (8, 4, 2, 1)  # side of the keys' map relative to the queries', per stage
    patch: PositiveInt = 4  # side in px
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths and numbers of blocks of the stages."""
        dims, depths = PVT_SIZES[self.size]
        return self.dims or dims, self.depths or depths

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.shape[0]) - 1)

    @model_validator(mode="after")
    def _check(self) -> PvtConfig:
        dims, depths = self.shape
        lengths = {"dims": dims, "depths": depths, "heads": self.heads, "mlp_ratios": self.mlp_ratios, "sr": self.sr}
        if len({len(values) for values in lengths.values()}) > 1:
            listed = ", ".join(f"{name} {tuple(values)}" for name, values in lengths.items())
            raise ValueError(f"each stage needs one value of every list, but they differ in length: {listed}")
        for stage, (dim, heads, sr) in enumerate(zip(dims, self.heads, self.sr, strict=True)):
            if dim % heads:
                raise ValueError(f"stage {stage} is {dim} wide, which does not divide into {heads} heads")
            if self.stride % (self.patch * 2**stage * sr):
                raise ValueError(
                    f"sr of stage {stage} is {sr}: {self.patch * 2**stage * sr} px, which must divide the stride of "
                    f"{self.stride} px, so that every map divides"
                )
        if self.reduction == "conv" and self.sr[-1] != 1:
            raise ValueError(f"sr ends with {self.sr[-1]}; the last stage holds the class token and takes 1 only")
        if self.reduction == "pool" and dims[0] % 4:
            raise ValueError(f"dims start with {dims[0]}; the sin-cos positions of reduction=pool need a multiple of 4")
        return self


_SMALL = {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "mlp_ratios": (2, 2), "sr": (2, 1), "patch": 8}

SPEC = EncoderSpec(
    name="pvt",
    title="PVT",
    description="the pyramid vision transformer, version 1 (Wang et al. 2021), and UM-MAE's",
    config=PvtConfig,
    build="pretrain.encoders.pvt.encoder:PvtEncoder",
    drop_layout="one_in_2x2",
    headline=lambda config: "class" if config.reduction == "conv" else "mean",
    layouts={name: Layout(f"pretrain.encoders.pvt.layouts:read_{name}") for name in ("pvt", "um_mae")},
    examples=(
        Example(small=_SMALL),
        Example({"reduction": "pool"}, _SMALL),
    ),
)
