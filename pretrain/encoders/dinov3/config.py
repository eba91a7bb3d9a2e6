"""The settings of DINOv3's vision transformer, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.position_settings import RotaryPositions, check_rotary
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout


class Size(NamedTuple):
    """A published size: width, blocks, heads, width of the MLP and its kind."""

    dim: int
    depth: int
    heads: int
    hidden: int
    mlp: Literal["gelu", "swiglu"]


#: A SwiGLU's width is 2/3 of the published ratio times the model's, up to a multiple of 8 (64 in 7b).
SIZES = {
    "small": Size(384, 12, 6, 1536, "gelu"),
    "small_plus": Size(384, 12, 6, 1536, "swiglu"),
    "base": Size(768, 12, 12, 3072, "gelu"),
    "large": Size(1024, 24, 16, 4096, "gelu"),
    "large_plus": Size(1024, 24, 16, 4096, "swiglu"),
    "so400m": Size(1152, 27, 18, 4304, "gelu"),
    "huge_plus": Size(1280, 32, 20, 5120, "swiglu"),
    "7b": Size(4096, 40, 32, 8192, "swiglu"),
}


@section
class Dinov3Config(EncoderSettings):
    """DINOv3's vision transformer (Simeoni et al. 2025): rotary positions, registers, no bias of keys, layer scale."""

    family: Literal["dinov3"] = "dinov3"
    decisive = ("dim", "depth", "heads", "hidden", "mlp", "norm", "class_norm")
    size: Literal["small", "small_plus", "base", "large", "large_plus", "so400m", "huge_plus", "7b"] = "base"
    """Names dim, depth, heads, hidden and mlp, each of which may be set by itself."""
    dim: PositiveInt | None = None  # width
    depth: PositiveInt | None = None  # blocks
    heads: PositiveInt | None = None  # of attention
    hidden: PositiveInt | None = None  # width within the MLPs; of another dim, 4 times that
    mlp: Literal["gelu", "swiglu"] | None = None  # two layers with a GELU, or gated by a SiLU
    patch: PositiveInt = 16  # side in px
    registers: NonNegativeInt = 4  # further tokens that are not read out
    rope: RotaryPositions = RotaryPositions()
    qkv_bias: bool = True  # of queries and values; keys have none
    layer_scale: PositiveFloat | None = 1e-5  # start of a factor on each branch; null: there is none
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm or RMSNorm
    norm_eps: PositiveFloat = 1e-5  # 1e-5 in all released models; the code's plain `layernorm` has 1e-6
    class_norm: bool = False  # a final norm of its own for class and register tokens
    local_class_norm: bool = False  # and one for those of local crops, in training alone (7b)
    pool: Literal["class", "mean"] = "class"  # what stands for the image: class token, or mean of the patch tokens
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, the same in every block

    @property
    def shape(self) -> Size:
        """Width, blocks, heads, width within the MLPs, their kind."""
        named = SIZES[self.size]
        dim = self.dim or named.dim
        hidden = self.hidden or (named.hidden if dim == named.dim else 4 * dim)
        return Size(dim, self.depth or named.depth, self.heads or named.heads, hidden, self.mlp or named.mlp)

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch

    @model_validator(mode="after")
    def _check(self) -> Self:
        dim, _, heads, _, _ = self.shape
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        check_rotary(dim, heads)
        return self


def timm_architecture(config: Dinov3Config) -> dict[str, Any]:
    """What timm's Eva makes this architecture of, but for its norm and its positions."""
    dim, depth, heads, hidden, mlp = config.shape
    ratio = hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim  # it rounds down
    shape = {"patch_size": config.patch, "embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": ratio}
    kinds = {"swiglu_mlp": mlp == "swiglu", "swiglu_align_to": 1, "qkv_bias": config.qkv_bias}
    tokens = {"num_reg_tokens": config.registers, "init_values": config.layer_scale}
    return {**shape, **kinds, **tokens, "global_pool": "token" if config.pool == "class" else "avg"}


def timm_recipe(config: Dinov3Config, image_size: tuple[int, int], channels: int) -> dict[str, Any] | None:
    """Arguments of `timm.create_model`; None where timm's has another norm or other positions."""
    norms = (config.norm, config.norm_eps, config.class_norm, config.local_class_norm)
    rope = config.rope
    if norms != ("layer", 1e-5, False, False) or (rope.periods, rope.normalise, rope.dtype) != (
        None,
        "separate",
        "fp32",
    ):
        return None
    own = {"img_size": list(image_size), "in_chans": channels, "num_classes": 0, "rope_temperature": rope.base}
    return {"model_name": "vit_small_patch16_dinov3_qkvb", **own, **timm_architecture(config)}


def takes_own_shape(config: Dinov3Config) -> bool:
    """Whether images at their own shape go through it. With a norm of local crops' own they do not: in the one sequence
    of all crops nothing tells which are local."""
    return not config.local_class_norm


_SMALL = {"dim": 32, "depth": 2, "heads": 2, "patch": 16, "registers": 2, "mlp": "swiglu", "rope": {"rescale": 2.0}}

SPEC = EncoderSpec(
    name="dinov3",
    title="DINOv3 ViT",
    description="DINOv3's vision transformer (Simeoni et al. 2025), with rotary positions",
    config=Dinov3Config,
    build="pretrain.encoders.dinov3.encoder:Dinov3Encoder",
    drop_layout="any",
    headline=lambda config: "class",
    has_sequence=lambda config: True,
    native=takes_own_shape,
    why_not_naflex="has norms of another epsilon (1e-6) than DINOv3's",
    timm_recipe=timm_recipe,
    layouts={
        "dinov3": Layout(
            "pretrain.encoders.dinov3.layouts:read_dinov3",
            signs=(
                (r"(^|\.)storage_tokens$",),
                (r"\.attn\.qkv\.bias_mask$",),
                (r"(^|\.)rope_embed\.periods$",),
                (r"^(model\.)?layer\.\d+\.attention\.q_proj\.", r"\.layer_scale1\.lambda1$"),
            ),
        ),
        "timm": Layout("pretrain.encoders.dinov3.layouts:read_timm", marks=r"^blocks\.\d+\.gamma_1$"),
    },
    examples=(Example(small=_SMALL),),
)
