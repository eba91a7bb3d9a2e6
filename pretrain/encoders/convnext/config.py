"""ConvNeXt's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout

# dims of the four stages, depths
CONVNEXT_SIZES = {
    "tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "small": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
}


@section
class ConvnextConfig(EncoderSettings):
    """ConvNeXt (Liu et al. 2022), as it is and as DINOv3 distils it; `size` names dims and depths, each of which may be
    set by itself.

    Its pooled feature is the norm of the mean of the last map, DINOv3's class feature.
    """

    family: Literal["convnext"] = "convnext"
    decisive = ("dims", "depths")
    size: Literal["tiny", "small", "base", "large"] = "tiny"  # names dims and depths
    dims: tuple[PositiveInt, ...] | None = None  # width of each stage
    depths: tuple[PositiveInt, ...] | None = None  # blocks of each stage
    layer_scale: PositiveFloat | None = 1e-6  # start of a factor on each branch; null: there is none
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch: Literal[1, 4] = 4  # side in px of the stem's; 1 for images of some 32 px

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 8

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths and numbers of blocks of the stages."""
        dims, depths = CONVNEXT_SIZES[self.size]
        return self.dims or dims, self.depths or depths

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, values in zip(("dims", "depths"), self.shape, strict=True):
            if len(values) != 4:
                raise ValueError(f"{name} {tuple(values)} names {len(values)} stages; this family has 4")
        return self


def timm_architecture(config: ConvnextConfig) -> dict[str, Any]:
    """What `timm.create_model` makes this architecture of."""
    dims, depths = config.shape
    return {"dims": list(dims), "depths": list(depths), "ls_init_value": config.layer_scale, "patch_size": config.patch}


def timm_recipe(config: ConvnextConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model`."""
    return {"model_name": "convnext_tiny", "in_chans": channels, "num_classes": 0, **timm_architecture(config)}


#: Names of the authors', DINOv3's and transformers' DINOv3 (all have the first), and of transformers' ConvNext.
SIGNS = (
    (r"(^|\.)downsample_layers\.\d", r"\.\d+\.(dwconv|depthwise_conv)\."),  # HorNet has the first, too
    (r"(^|\.)stages\.\d+\.layers\.\d+\.layer_scale_parameter$",),
)

SPEC = EncoderSpec(
    name="convnext",
    title="ConvNeXt",
    description="ConvNeXt (Liu et al. 2022), DINOv3's too",
    config=ConvnextConfig,
    build="pretrain.encoders.convnext.encoder:ConvnextEncoder",
    drop_layout="one_in_2x2",
    headline=lambda config: None,
    timm_recipe=timm_recipe,
    layouts={
        "convnext": Layout("pretrain.encoders.convnext.layouts:read_convnext", signs=SIGNS),
        "dinov3": Layout(
            "pretrain.encoders.convnext.layouts:read_convnext", marks=r"(^|\.)downsample_layers\.\d", signs=SIGNS[:1]
        ),
        "timm": Layout("pretrain.encoders.convnext.layouts:read_timm", marks=r"^stages\.\d+\.blocks\.\d+\.conv_dw\."),
    },
    examples=(Example(small={"dims": (8, 16, 16, 32), "depths": (1, 1, 1, 1)}),),
)
