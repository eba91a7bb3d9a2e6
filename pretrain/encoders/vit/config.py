"""The vision transformer's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.position_settings import RotaryPositions, check_rotary
from pretrain.encoders.shapes import VitShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout


@section
class VitConfig(VitShape):
    """A vision transformer (Dosovitskiy et al. 2021), and DeiT's with a distillation token."""

    family: Literal["vit"] = "vit"
    decisive = ("dim", "depth", "heads", "stem", "positions", "mlp", "pre_norm", "inner_norm", "norm_eps")
    positions: Literal[
        "learned", "sincos", "sincos_1d", "relative_bias", "relative_shift", "rotary", "conditional", "none"
    ] = "learned"
    """Learned; fixed sines and cosines of row and column, or of the raster number; BEiT's bias; the bottleneck
    transformers' distances; DINOv3's angles; CPVT's convolution after the first block; none."""
    rotary: RotaryPositions = RotaryPositions()  # of positions=rotary
    class_token: bool = True  # beside the patch tokens
    distillation_token: bool = False  # DeiT's second prefix token, beside the class token
    registers: NonNegativeInt = 0  # further tokens that are not read out
    pool: Literal["class", "mean"] = "class"  # what stands for the image: class token, or mean of the patch tokens
    stem: Literal["patch", "norm", "mlp", "conv", "overlap"] = "patch"
    """patch: one linear layer (ViT); norm: with a norm before and after it (NaViT); mlp: two; conv: several
    convolutions, each halving; overlap: one that reads beyond the patch."""
    layer_scale: PositiveFloat | None = None  # start of a factor on each branch; null: there is none
    hidden: PositiveInt | None = None  # width within the MLPs; default: 4 times dim
    mlp: Literal["gelu", "quick_gelu", "swiglu"] = "gelu"
    """Two layers with a GELU; with CLIP's x * sigmoid(1.702 x); or gated by a SiLU (DINOv2's giant)."""
    pre_norm: bool = False  # a norm before the first block, of patches that are projected without a bias (CLIP)
    inner_norm: bool = False  # further norms before the last layer of attention and of the MLP (Magneto's, BEiT-3)
    norm_eps: PositiveFloat = 1e-6  # of the layer norms; 1e-5 in CLIP and BEiT-3
    interpolation: Literal["offset", "bicubic", "antialias"] = "offset"
    """How a table of positions is brought to other grids: DINO's scale, plain, or smoothed where it shrinks."""

    @property
    def mlp_ratio(self) -> float:
        """What timm makes the MLPs' first layer of, which is twice as wide where it gates."""
        dim = self.shape[0]
        width = (self.hidden or 4 * dim) * (2 if self.mlp == "swiglu" else 1)
        return width / dim if int(dim * (width / dim)) == width else (width + 0.5) / dim  # it rounds down

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.positions == "sincos" and self.shape[0] % 4:
            raise ValueError(f"dim is {self.shape[0]}; sin-cos positions need a multiple of 4")
        if self.positions == "sincos_1d" and self.shape[0] % 2:
            raise ValueError(f"dim is {self.shape[0]}; sin-cos positions need an even one")
        if self.positions == "rotary":
            check_rotary(self.shape[0], self.shape[2])
        elif self.rotary != RotaryPositions():
            raise ValueError(f"rotary belongs to positions=rotary, and positions is {self.positions}; leave it out")
        if self.pre_norm and self.stem != "patch":
            raise ValueError(f"pre_norm is CLIP's: of stem=patch, not {self.stem}")
        if self.inner_norm and (self.mlp == "swiglu" or self.distillation_token):
            raise ValueError("inner_norm is BEiT-3's: of an MLP of two layers, without a distillation token")
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool is 'class' but class_token is false; set pool=mean or class_token=true")
        if self.distillation_token and (self.registers or not self.class_token or self.stem != "patch"):
            raise ValueError("distillation_token is DeiT's: with a class token, without registers, stem=patch")
        if self.stem == "conv" and (self.patch & (self.patch - 1) or self.patch < 2):
            raise ValueError(f"patch is {self.patch}; a convolutional stem halves the image, so patch is a power of 2")
        return self


PLAIN = "vit_base_patch16_224"
#: timm's models by what no argument of theirs says in a word: whether MLPs are gated, and the norms' epsilon.
TIMM_MODELS = {
    (False, 1e-6): PLAIN,
    (False, 1e-5): "vit_base_patch16_clip_224",
    (True, 1e-6): "vit_giant_patch14_dinov2",
}


def timm_recipe(config: VitConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any] | None:
    """Arguments of `timm.create_model`; None for stems and positions that timm's has not."""
    if config.stem != "patch" or config.positions not in ("learned", "sincos", "sincos_1d", "none"):
        return None
    if config.positions == "none" and config.distillation_token:
        return None
    dim, depth, heads = config.shape
    own = {"img_size": list(image_size), "in_chans": channels, "num_classes": 0, "embed_dim": dim, "depth": depth}
    own |= {"num_heads": heads, "patch_size": config.patch, "fc_norm": False, "class_token": config.class_token}
    own |= {"reg_tokens": config.registers, "init_values": config.layer_scale}
    if config.positions == "none":
        own["pos_embed"] = "none"
    own |= {"mlp_ratio": config.mlp_ratio} if config.hidden or config.mlp == "swiglu" else {}
    own |= {"pre_norm": True} if config.pre_norm else {}
    own |= {"scale_attn_norm": True, "scale_mlp_norm": True} if config.inner_norm else {}
    own |= {"act_layer": "quick_gelu"} if config.mlp == "quick_gelu" else {}
    model = TIMM_MODELS.get((config.mlp == "swiglu", config.norm_eps))
    if config.inner_norm and config.norm_eps == 1e-5:
        model = "beit3_base_patch16_224" if not config.pre_norm else None
    if model is None or (config.distillation_token and model != PLAIN):
        return None
    if config.distillation_token:  # it knows no other pooling, so with pool=mean its pooled feature is not ours
        return {"model_name": "deit_base_distilled_patch16_224", **own, "global_pool": "token"}
    return {"model_name": model, **own, "global_pool": "token" if config.pool == "class" else "avg"}


def takes_own_shape(config: VitConfig) -> bool:
    """Whether images at their own shape go through it: each patch is embedded by itself, and attention reads no
    positions but rotary ones."""
    return config.stem == "patch" and config.positions in ("learned", "sincos", "sincos_1d", "rotary", "none")


def _headline(config: VitConfig) -> Literal["class", "mean"] | None:
    if config.distillation_token:
        return None  # the mean of both tokens, which was trained
    return "class" if config.class_token else "mean"


def _why_not_placeless(config: VitConfig) -> str | None:
    if config.positions not in ("learned", "sincos", "sincos_1d", "none"):
        return f"positions={config.positions} places tokens within its blocks"
    return f"stem={config.stem} reads beyond the patch" if config.stem in ("conv", "overlap") else None


_HUB = r"(^|\.)embeddings\.patch_embeddings\.projection\."
#: Of the layouts that this family reads, what tells each from all others.
SIGNS = {
    "mae": (
        (r"(^|\.)cls_token$", r"(^|\.)decoder_blocks\.\d", r"(^|\.)blocks\.0\.attn\.qkv\."),
        (_HUB, r"(^|\.)decoder\.decoder_(layers|encoder)\."),
        ("^model_type=vit_mae$",),
    ),
    "dino": ((r"(^|\.)cls_token$", r"(^|\.)head\.last_layer\.weight_g$", r"(^|\.)blocks\.0\.attn\.qkv\."),),
    "dinov2": (
        (r"(^|\.)register_tokens$", r"\.ls1\.gamma$"),
        (r"(^|\.)mask_token$", r"(^|\.)pos_embed$", r"\.ls1\.gamma$"),
        (r"(^|\.)embeddings\.position_embeddings$", r"\.layer_scale1\.lambda1$"),
        ("^model_type=dinov2(_with_registers)?$",),
    ),
    "ijepa": ((r"^target_encoder\.", r"^predictor\."), ("^model_type=ijepa$",)),
    "transformers": (("^model_type=vit$",),),
    "beit3": ((r"(^|\.)vision_embed\.proj\.weight$", r"\.self_attn\.inner_attn_ln\.A\.weight$"),),
    "torchvision": ((r"^encoder\.layers\.encoder_layer_0\.",),),
    "clip": (
        (r"^visual\.conv1\.weight$", r"^visual\.transformer\.resblocks\."),
        (r"^vision_model\.embeddings\.class_embedding$",),
    ),
}
SIGNS["openclip"] = SIGNS["clip"]
READERS = {
    "layouts": ("mae", "dino", "dinov2", "ijepa", "transformers", "timm"),
    "clip": ("clip", "openclip"),
    "torchvision": ("torchvision",),
    "beit3": ("beit3",),
}
_SMALL = {"dim": 32, "depth": 2, "heads": 2, "patch": 16}

SPEC = EncoderSpec(
    name="vit",
    title="ViT",
    description="the vision transformer (Dosovitskiy et al. 2021), DeiT's and DINOv2's too",
    config=VitConfig,
    build="pretrain.encoders.vit.encoder:VitEncoder",
    drop_layout="any",
    headline=_headline,
    has_sequence=lambda config: config.class_token,
    timm_recipe=timm_recipe,
    native=takes_own_shape,
    naflex="pretrain.encoders.vit.naflex",
    why_not_placeless=_why_not_placeless,
    layouts={
        name: Layout(f"pretrain.encoders.vit.{module}:read_{name}", signs=SIGNS.get(name, ()))
        for module, names in READERS.items()
        for name in names
    },
    examples=(
        Example(small=_SMALL),
        Example({"positions": "relative_shift"}, _SMALL),
        Example({"distillation_token": True}, _SMALL),
    ),
)
