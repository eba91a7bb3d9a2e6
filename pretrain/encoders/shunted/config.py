"""Shunted Transformer's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout

# depths, convolutions more in the stem; dims, heads, MLP ratios and spatial reductions are the same for all sizes
SHUNTED_SIZES = {"tiny": ((1, 2, 4, 1), 0), "small": ((2, 4, 12, 1), 1), "base": ((3, 4, 24, 2), 2)}


@section
class ShuntedConfig(EncoderSettings):
    """The Shunted Transformer (Ren et al. 2022); `size` names depths and the stem.

    Half of the heads attend to keys reduced by `sr`, half to keys reduced by half as much; where `sr` is 1, all attend
    to every token.
    """

    family: Literal["shunted"] = "shunted"
    decisive = ("dims", "depths", "heads", "mlp_ratios", "sr", "stem_convolutions")
    size: Literal["tiny", "small", "base"] = "small"  # names depths and the stem's convolutions
    dims: tuple[PositiveInt, ...] = (64, 128, 256, 512)  # width of each stage; the stem is as wide as the first
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    heads: tuple[PositiveInt, ...] = (2, 4, 8, 16)  # of each stage
    mlp_ratios: tuple[PositiveFloat, ...] = (8, 8, 4, 4)  # hidden width of each stage's MLP, relative to dims
    sr: tuple[PositiveInt, ...] = (8, 4, 2, 1)  # side of the coarser keys' map relative to the queries', per stage
    stem_convolutions: NonNegativeInt | None = None  # 3x3, between the stem's first and last; default: those of size
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch = 4

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Widths and numbers of blocks of the stages, further convolutions of the stem."""
        depths, convolutions = SHUNTED_SIZES[self.size]
        given = self.stem_convolutions
        return self.dims, self.depths or depths, convolutions if given is None else given

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.dims) - 1)

    @model_validator(mode="after")
    def _check(self) -> ShuntedConfig:
        dims, depths, _ = self.shape
        lengths = {"dims": dims, "depths": depths, "heads": self.heads, "mlp_ratios": self.mlp_ratios, "sr": self.sr}
        if len({len(values) for values in lengths.values()}) > 1:
            listed = ", ".join(f"{name} {tuple(values)}" for name, values in lengths.items())
            raise ValueError(f"each stage needs one value of every list, but they differ in length: {listed}")
        for stage, (dim, heads, sr) in enumerate(zip(dims, self.heads, self.sr, strict=True)):
            if dim % heads:
                raise ValueError(f"stage {stage} is {dim} wide, which does not divide into {heads} heads")
            if sr > 1 and (sr % 2 or heads % 2):
                raise ValueError(
                    f"stage {stage} has sr {sr} and {heads} heads; half of the heads take half of the sr, so both must "
                    "be even (or sr 1)"
                )
        return self


SPEC = EncoderSpec(
    name="shunted",
    title="the Shunted Transformer",
    description="the Shunted Transformer (Ren et al. 2022)",
    config=ShuntedConfig,
    build="pretrain.encoders.shunted.encoder:ShuntedEncoder",
    drop_layout="one_in_2x2",
    layouts={"shunted": Layout("pretrain.encoders.shunted.layouts:read_shunted")},
    examples=(
        Example(
            small={
                "dims": (8, 16, 16), "depths": (1, 1, 1), "heads": (2, 2, 2), "mlp_ratios": (2, 2, 2), "sr": (4, 2, 1),
                "stem_convolutions": 1,
            }
        ),
    ),
)  # fmt: skip
