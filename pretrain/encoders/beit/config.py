"""BEiT's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import VitShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout


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


def timm_recipe(config: BeitConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model`."""
    dim, depth, heads = config.shape
    own = {"img_size": list(image_size), "in_chans": channels, "num_classes": 0, "embed_dim": dim, "depth": depth}
    own |= {"num_heads": heads, "patch_size": config.patch, "use_abs_pos_emb": config.absolute_positions}
    own |= {"init_values": config.layer_scale, "use_shared_rel_pos_bias": config.relative_positions == "shared"}
    own |= {"use_rel_pos_bias": config.relative_positions == "per_block", "use_fc_norm": config.pooled_norm}
    own |= {"global_pool": "token" if config.pool == "class" else "avg"}
    return {"model_name": "beit_base_patch16_224", **own}


SPEC = EncoderSpec(
    name="beit",
    title="BEiT ViT",
    description="BEiT's vision transformer (Bao et al. 2022), with relative positions",
    config=BeitConfig,
    build="pretrain.encoders.beit.encoder:BeitEncoder",
    drop_layout="any",
    headline=lambda config: "class",
    has_sequence=lambda config: True,
    timm_recipe=timm_recipe,
    layouts={
        "beit": Layout(
            "pretrain.encoders.beit.layouts:read_beit",
            signs=(
                (r"relative_position_bias_table$", r"(^|\.)(lm_head|cls_pt_layers)\."),
                (r"(^|\.)embeddings\.patch_embeddings\.", r"\.lambda_1$"),
                ("^model_type=beit$",),
            ),
        ),
        "simmim": Layout(
            "pretrain.encoders.beit.layouts:read_simmim", signs=((r"^encoder\.mask_token$", r"^decoder\.0\.weight$"),)
        ),
        "timm": Layout(
            "pretrain.encoders.beit.layouts:read_timm", marks=r"^(rel_pos_bias|blocks\.\d+\.attn)\.relative_pos"
        ),
    },
    examples=(Example(small={"dim": 32, "depth": 2, "heads": 2, "patch": 16}),),
)
