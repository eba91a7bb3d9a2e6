"""Readers of the image encoders of CLIP (Radford et al. 2021): OpenAI's, OpenCLIP's and transformers' names."""

from __future__ import annotations

import re

from einops import rearrange

from pretrain.encoders.hub import join, side_by_side
from pretrain.encoders.layouts import CheckpointState, Imported
from pretrain.encoders.vit.layouts import read_vit

CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
#: Heads of OpenCLIP's widths that are neither a published ViT's nor 64 wide each: bigG and e.
HEADS = {1664: 16, 1792: 16}
#: From the names of `visual.*`, and of transformers' `vision_model.*`, to timm's.
NAMES = (
    (r"^class_embedding$|^embeddings\.class_embedding$", "cls_token"),
    (r"^positional_embedding$|^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^conv1\.|^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^ln_pre\.|^pre_layrnorm\.", "norm_pre."),
    (r"^ln_post\.|^post_layernorm\.", "norm."),
    (r"^transformer\.resblocks\.|^encoder\.layers\.", "blocks."),
    (r"\.(?:ln_|layer_norm)([12])\.", r".norm\1."),
    (r"\.ls_([12])\.gamma$", r".ls\1.gamma"),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.(?:attn|self_attn)\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)

#: From timm's names to those of `visual.*`, where they are no tokens or positions.
OPENCLIP_NAMES = (
    ("patch_embed.proj.weight", "conv1.weight"),
    ("norm_pre.", "ln_pre."),
    ("blocks.", "transformer.resblocks."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def read_clip(state: CheckpointState) -> Imported:
    """OpenAI's CLIP, whose MLPs have a QuickGELU; with either naming."""
    return _clip(state, "quick_gelu", "as in OpenAI's weights; most of LAION's have gelu: --as openclip")


def read_openclip(state: CheckpointState) -> Imported:
    """OpenCLIP's, whose MLPs have a GELU but for those that OpenAI, DFN and MetaCLIP trained."""
    return _clip(state, "gelu", "as in LAION's weights; OpenAI's have quick_gelu: --as clip")


def _clip(state: CheckpointState, mlp: str, why: str) -> Imported:
    _image_encoder(state)
    refuse_other_towers(state)
    projection = {key: state.tensors.pop(key) for key in ("proj", "visual_projection.weight") if key in state.tensors}
    for theirs, ours in NAMES:
        state.rename(theirs, ours)
    join(state, r"^(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$", side_by_side)
    state.tensors["cls_token"] = rearrange(state.get("cls_token"), "d -> 1 1 d")
    state.tensors["pos_embed"] = rearrange(state.get("pos_embed"), "n d -> 1 n d")
    if "norm_pre.weight" not in state.tensors:  # CLIPA's: timm's patches have a bias then
        state.tensors["patch_embed.proj.bias"] = state.tensors["cls_token"].new_zeros(state.get("cls_token").shape[-1])
    imported = read_vit(state, "clip", eps=1e-5, interpolation="bicubic", mlp=state.guess("mlp", mlp, why), heads=HEADS)
    for key, value in projection.items():
        imported.method["projection"] = value if key == "proj" else rearrange(value, "e d -> d e").contiguous()
    if projection:
        imported.notes.append(
            "its features of images are the class token times `projection`, which a probe does not apply"
        )
    imported.normalisation = CLIP_PIXELS
    return imported


def _image_encoder(state: CheckpointState) -> None:
    """Keep the image encoder's tensors, by names without a prefix."""
    state.leave(r"^(input_resolution|context_length|vocab_size)$|position_ids$", "no weight")
    state.leave(r"^logit_(scale|bias)$", "the loss's")
    if any(key.startswith("vision_model.") for key in state.tensors):
        state.leave(r"^(text_model|text_projection)\.", "of the text encoder")
        state.drop_prefix("vision_model.")
    elif any(key.startswith("visual.") for key in state.tensors):
        state.keep("visual.", "of the text encoder")


def refuse_other_towers(state: CheckpointState) -> None:
    """Raise ValueError, saying what to do, where the image encoder is no plain vision transformer."""
    named = {
        r"^layer1\.": "is a ResNet; name it timm:resnet50_clip (or resnet101_clip, resnet50x4_clip)",
        r"^trunk\.": "is a model of timm's: import it with --as timm",
        r"^attn_pool": "pools by attention, as CoCa's does, and our ViT by its class token or the mean",
    }
    for pattern, what in named.items():
        if any(re.match(pattern, key) for key in state.tensors):
            raise ValueError(f"its image encoder {what}")
