"""PVT v2's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings, check_four_stages
from pretrain.encoders.spec import EncoderSpec, Example

# dims of the four stages, depths, heads
PVT_V2_SIZES = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3), (1, 2, 5, 8)),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3), (1, 2, 5, 8)),
}


@section
class PvtV2Config(EncoderSettings):
    """PVT version 2 (Wang et al. 2022); `size` names dims, depths and heads, each of which may be set by itself.

    Patches overlap, and positions come from depth-wise convolutions. `linear` pools keys and values to a map of 7x7.
    """

    family: Literal["pvt_v2"] = "pvt_v2"
    decisive = ("dims", "depths", "heads", "linear")
    size: Literal["b0", "b1", "b2", "b3", "b4", "b5"] = "b2"  # names dims, depths and heads
    linear: bool = False  # published for b2 (PVTv2-B2-Li)
    dims: tuple[PositiveInt, ...] | None = None  # width of each stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    heads: tuple[PositiveInt, ...] | None = None  # of each stage
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch = 4
    stride = 32

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Widths, numbers of blocks and numbers of heads of the stages."""
        dims, depths, heads = PVT_V2_SIZES[self.size]
        return self.dims or dims, self.depths or depths, self.heads or heads

    @model_validator(mode="after")
    def _check(self) -> PvtV2Config:
        check_four_stages(*self.shape)
        return self


def timm_architecture(config: PvtV2Config) -> dict[str, Any]:
    """What `timm.create_model` makes this architecture of."""
    dims, depths, heads = config.shape
    shape = {"embed_dims": list(dims), "depths": list(depths), "num_heads": list(heads), "linear": config.linear}
    return {"model_name": f"pvt_v2_{config.size}", **shape}


_SMALL = {"dims": (8, 16, 16, 32), "depths": (1, 1, 1, 2), "heads": (1, 2, 2, 4)}

SPEC = EncoderSpec(
    name="pvt_v2",
    title="PVT v2",
    description="the pyramid vision transformer, version 2 (Wang et al. 2022)",
    config=PvtV2Config,
    build="pretrain.encoders.pvt_v2.encoder:PvtV2Encoder",
    drop_layout="one_in_2x2",
    timm_recipe=lambda config, size, channels: {**timm_architecture(config), "in_chans": channels, "num_classes": 0},
    examples=(
        Example(small=_SMALL),
        Example({"linear": True}, _SMALL),
    ),
)
