"""Twins' settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings, check_four_stages
from pretrain.encoders.spec import EncoderSpec, Example

# dims of the four stages, depths, heads
TWINS_SIZES = {
    "small": ((64, 128, 256, 512), (2, 2, 10, 4), (2, 4, 8, 16)),
    "base": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "large": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
}


@section
class TwinsConfig(EncoderSettings):
    """Twins-SVT (Chu et al. 2021); `size` names dims, depths and heads, each of which may be set by itself.

    Attention within windows and to a sub-sampled map in turn; positions come from depth-wise convolutions.
    """

    family: Literal["twins"] = "twins"
    decisive = ("dims", "depths", "heads")
    size: Literal["small", "base", "large"] = "small"  # names dims, depths and heads
    dims: tuple[PositiveInt, ...] | None = None  # width of each stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    heads: tuple[PositiveInt, ...] | None = None  # of each stage
    window: Annotated[int, Field(ge=2)] = 7  # side in tokens
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch = 4
    stride = 32

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Widths, numbers of blocks and numbers of heads of the stages."""
        dims, depths, heads = TWINS_SIZES[self.size]
        return self.dims or dims, self.depths or depths, self.heads or heads

    @model_validator(mode="after")
    def _check(self) -> TwinsConfig:
        check_four_stages(*self.shape)
        return self


def timm_architecture(config: TwinsConfig) -> dict[str, Any]:
    """What `timm.create_model` makes this architecture of."""
    dims, depths, heads = config.shape
    shape = {"embed_dims": list(dims), "depths": list(depths), "num_heads": list(heads)}
    return {"model_name": f"twins_svt_{config.size}", "wss": [config.window] * 4, **shape}


def timm_recipe(config: TwinsConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model`."""
    shared = {"img_size": list(image_size), "in_chans": channels, "num_classes": 0}
    return {**timm_architecture(config), **shared}


SPEC = EncoderSpec(
    name="twins",
    title="Twins",
    description="Twins-SVT (Chu et al. 2021)",
    config=TwinsConfig,
    build="pretrain.encoders.twins.encoder:TwinsEncoder",
    drop_layout="one_in_2x2",
    timm_recipe=timm_recipe,
    examples=(Example(small={"dims": (8, 16, 16, 32), "depths": (1, 1, 1, 2), "heads": (1, 2, 2, 4)}),),
)
