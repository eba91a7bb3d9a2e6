"""The image encoder of BEiT-3 (Wang et al. 2022), as torchscale and unilm name its parts."""

from __future__ import annotations

import dataclasses

from einops import rearrange

from pretrain.encoders.hub import join, side_by_side
from pretrain.encoders.layouts import CheckpointState, Imported
from pretrain.encoders.vit.layouts import read_vit

#: From the names of torchscale, without `encoder.` and the `.A` of what serves images, to timm's.
NAMES = (
    (r"^vision_embed\.proj\.", "patch_embed.proj."),
    (r"^vision_embed\.cls_token$", "cls_token"),
    (r"^embed_positions\.weight$", "pos_embed"),
    (r"^layer_norm\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.self_attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.ffn\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.", ".mlp."),
)
#: torchscale counts positions from here, as fairseq does: rows before it are never read.
FIRST_POSITION = 2


def read_beit3(state: CheckpointState) -> Imported:
    """{"model": beit3.*}: what serves images, each part's `.A`; experts of language (`.B`) and heads are left out.

    In the released code attention and norms have experts, too, though the paper speaks of shared attention.
    """
    state.drop_prefix("beit3.")
    state.leave(r"\.B\.", "an expert of language")
    state.leave(r"^text_embed\.", "of texts")
    state.leave(
        r"^(mlm_|mim_|itc_|itm_|vision_head|language_head|logit_scale|head|fc_norm|pooler|scorer)", "a task's head"
    )
    state.rename(r"^encoder\.", "")
    state.rename(r"\.A\.", ".")
    for theirs, ours in NAMES:
        state.rename(theirs, ours)
    join(state, r"^(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$", side_by_side)
    state.tensors["pos_embed"] = rearrange(state.get("pos_embed")[FIRST_POSITION:], "n d -> 1 n d")
    mask_token = state.tensors.pop("vision_embed.mask_token", None)
    imported = read_vit(state, "beit", eps=1e-5, interpolation="bicubic")
    imported.encoder = dataclasses.replace(imported.encoder, inner_norm=True, pool="mean")
    imported.mask_token = mask_token
    return imported
