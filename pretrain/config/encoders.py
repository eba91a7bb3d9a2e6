"""The encoders a configuration can name (imports no torch).

`decisive` names what of a family decides how its weights are to be read, whether their shapes show it or not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

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
class VitShape:
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
class VitConfig(VitShape):
    """A vision transformer (Dosovitskiy et al. 2021), and DeiT's with a distillation token."""

    family: Literal["vit"] = "vit"
    decisive = ("dim", "depth", "heads", "stem", "positions")
    positions: Literal["learned", "sincos"] = "learned"  # learned, or fixed sines and cosines
    class_token: bool = True  # beside the patch tokens
    distillation_token: bool = False  # DeiT's second prefix token, beside the class token
    registers: NonNegativeInt = 0  # further tokens that are not read out
    pool: Literal["class", "mean"] = "class"  # what stands for the image: class token, or mean of the patch tokens
    stem: Literal["patch", "conv"] = "patch"  # patch: one convolution (ViT); conv: several, each halving
    layer_scale: PositiveFloat | None = None  # start of a factor on each branch; null: there is none

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.positions == "sincos" and self.shape[0] % 4:
            raise ValueError(f"dim is {self.shape[0]}; sin-cos positions need a multiple of 4")
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool is 'class' but class_token is false; set pool=mean or class_token=true")
        if self.distillation_token and (self.registers or not self.class_token or self.stem == "conv"):
            raise ValueError("distillation_token is DeiT's: with a class token, without registers, stem=patch")
        if self.stem == "conv" and (self.patch & (self.patch - 1) or self.patch < 2):
            raise ValueError(f"patch is {self.patch}; a convolutional stem halves the image, so patch is a power of 2")
        return self


@section
class BeitConfig(VitShape):
    """BEiT's vision transformer (Bao et al. 2022): relative positions, layer scale, q and v bias but no k bias."""

    family: Literal["beit"] = "beit"
    decisive = ("dim", "depth", "heads", "relative_positions")
    relative_positions: Literal["shared", "per_block"] = "shared"  # one table for all blocks (pretraining), or one each
    absolute_positions: bool = False  # as well as relative ones
    pool: Literal["class", "mean"] = "mean"  # what stands for the image: class token, or mean of the patch tokens
    norm_eps: PositiveFloat = 1e-6  # of the layer norms
    pooled_norm: bool = False  # the final norm after pooling, not before (fine-tuned checkpoints)
    layer_scale: PositiveFloat | None = 0.1  # 1e-5 for L


@section
class SwinShape:
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


@section
class SwinConfig(SwinShape):
    """A Swin transformer (Liu et al. 2021, 2022)."""

    family: Literal["swin"] = "swin"
    decisive = ("dim", "depths", "heads", "version")
    version: Literal[1, 2] = 1  # 2: cosine attention, norms after the branches, positions from a small network


@section
class UmMaeSwinConfig(SwinShape):
    """UM-MAE's Swin (Li et al. 2022): positions from a small network over coordinates, downsampling by convolution."""

    family: Literal["um_mae_swin"] = "um_mae_swin"
    decisive = ("dim", "depths", "heads", "position_dim")
    window: PositiveInt = 8  # on compact maps; twice that on whole images
    position_dim: PositiveInt = 32  # width of the small network


# dims of the four stages, depths; heads, MLP ratios and spatial reductions are the same for all sizes
PVT_SIZES = {
    "tiny": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "small": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "medium": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "large": ((64, 128, 320, 512), (3, 8, 27, 3)),
}


@section
class PvtConfig:
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


# dims of the four stages, depths, heads
PVT_V2_SIZES = {
    "b0": ((32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8)),
    "b1": ((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8)),
    "b2": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8)),
    "b3": ((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8)),
    "b4": ((64, 128, 320, 512), (3, 8, 27, 3), (1, 2, 5, 8)),
    "b5": ((64, 128, 320, 512), (3, 6, 40, 3), (1, 2, 5, 8)),
}
TWINS_SIZES = {
    "small": ((64, 128, 256, 512), (2, 2, 10, 4), (2, 4, 8, 16)),
    "base": ((96, 192, 384, 768), (2, 2, 18, 2), (3, 6, 12, 24)),
    "large": ((128, 256, 512, 1024), (2, 2, 18, 2), (4, 8, 16, 32)),
}


@section
class PvtV2Config:
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
        _check_four_stages(*self.shape)
        return self


@section
class TwinsConfig:
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
        _check_four_stages(*self.shape)
        return self


def _check_four_stages(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]) -> None:
    for name, values in (("dims", dims), ("depths", depths), ("heads", heads)):
        if len(values) != 4:
            raise ValueError(f"{name} {tuple(values)} names {len(values)} stages; this family has 4")
    for stage, (dim, num_heads) in enumerate(zip(dims, heads, strict=True)):
        if dim % num_heads:
            raise ValueError(f"stage {stage} is {dim} wide, which does not divide into {num_heads} heads")


#: Arguments of timm.create_model that other settings own, or that would load files.
TIMM_RESERVED = {
    "num_classes": "an encoder has no classifier",
    "in_chans": "it follows data.channels",
    "img_size": "it follows views.global_crops",
    "drop_path_rate": "set encoder.drop_path",
    "pretrained": "set init_from=timm:NAME",
    "checkpoint_path": "set init_from",
    **dict.fromkeys(
        ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "features_only"),
        "it is not an argument of the architecture",
    ),
}


@section
class TimmConfig:
    """Any other timm model, as it is; written `encoder: timm:NAME` for short."""

    family: Literal["timm"] = "timm"
    decisive = ("model",)
    model: str  # its name in timm
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of timm.create_model
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, where the model has it

    @model_validator(mode="after")
    def _check(self) -> TimmConfig:
        for name in self.args:
            if name in TIMM_RESERVED:
                raise ValueError(f"args has {name!r}, which can't be set here: {TIMM_RESERVED[name]}")
        return self


def expand_encoder(value: object) -> object:
    """The section that `timm:NAME` is short for; other values as they are."""
    if isinstance(value, str) and value.startswith("timm:"):
        return {"family": "timm", "model": value.removeprefix("timm:")}
    return value


EncoderConfig = Annotated[
    VitConfig | BeitConfig | SwinConfig | UmMaeSwinConfig | PvtConfig | PvtV2Config | TwinsConfig | TimmConfig,
    Field(discriminator="family"),
    BeforeValidator(expand_encoder),
]
