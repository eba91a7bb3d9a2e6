"""Segment Anything of `transformers` (Kirillov et al. 2023), whose image encoder starts from a ViT of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from pretrain.encoders.base import Encoder
from pretrain.encoders.positions import resize_positions
from pretrain.encoders.saved import EncoderCard
from pretrain.interop.features.backbone import USUAL_WINDOW
from pretrain.interop.features.packages import check_packages
from pretrain.interop.features.settings import evenly_spaced

if TYPE_CHECKING:
    from transformers import SamModel, SamVisionConfig

#: From the names of timm's ViT to those of `SamVisionEncoder`.
RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.", r"layers.\1.attn."),
    (r"^blocks\.(\d+)\.mlp\.fc([12])\.", r"layers.\1.mlp.lin\2."),
)
#: What SAM has no place for, and why that is so.
LEFT = (
    (r"^(cls|dist|reg)_token$", "SAM's encoder sees patches only"),
    (r"^norm\.", "SAM's neck follows the last block"),
)
FRESH = (
    (r"\.rel_pos_[hw]$", "relative positions start at zero"),
    (r"^neck\.", "SAM's neck starts at random"),
)


class SamStart(NamedTuple):
    """A model, and what became of every tensor of the encoder and of its own: `left` and `fresh` with the reason."""

    model: SamModel
    taken: dict[str, str]  # of ours to theirs, with what was changed on the way
    left: dict[str, str]
    fresh: dict[str, str]


def start_sam(
    encoder: Encoder,
    card: EncoderCard,
    *,
    image_size: int = 1024,
    window: int = USUAL_WINDOW,
    global_blocks: int | tuple[int, ...] = 4,
    width: int = 256,
    seed: int = 0,
    **parts: Mapping[str, Any],
) -> SamStart:
    """A `SamModel` whose image encoder starts from a ViT: what its blocks give is what ours give without class token,
    with windows of the same side whose filler is seen (`FeatureSettings`).

    Positions are interpolated for `image_size`, layer scale is multiplied into the projections that it follows.

    Args:
        image_size: Side in px of the images, which SAM takes square.
        window: Side in tokens. global_blocks: how many, evenly spaced, or which attend to the whole map.
        width: Channels of the image embedding. seed: of the parts that start at random.
        parts: Settings of `prompt_encoder_config` and `mask_decoder_config`.

    Raises ValueError for encoders of other families, with a convolutional stem or layers that SAM lacks, for a size
    that is no multiple of the patch, for blocks that there are not, and where `transformers` is not installed.
    """
    check_packages("SAM", "transformers")
    from transformers import SamConfig, SamModel

    settings = sam_vision_config(encoder, card, image_size, window, global_blocks, width)
    patch = encoder.patch
    prompt = {"hidden_size": width, "image_size": image_size, "patch_size": patch}
    decoder = {"hidden_size": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamModel(
            SamConfig(
                vision_config=settings.to_dict(),
                prompt_encoder_config=prompt | dict(parts.get("prompt_encoder_config", {})),
                mask_decoder_config=decoder | dict(parts.get("mask_decoder_config", {})),
            )
        )
    vision = model.vision_encoder
    own = vision.state_dict()
    weights, taken, left = converted(encoder, (image_size // patch, image_size // patch))
    wrong = [key for key, value in weights.items() if key not in own or own[key].shape != value.shape]
    fresh = {}
    for key in own.keys() - weights.keys():
        fresh[key] = next((why for pattern, why in FRESH if re.search(pattern, key)), "")
    wrong += [key for key, why in fresh.items() if not why]
    if wrong:
        raise ValueError(f"SAM's encoder and this one do not fit each other in {', '.join(sorted(wrong)[:5])}")
    vision.load_state_dict(own | weights, strict=True)
    return SamStart(model.eval(), taken, left, fresh)


def sam_vision_config(
    encoder: Encoder,
    card: EncoderCard,
    image_size: int,
    window: int,
    global_blocks: int | tuple[int, ...],
    width: int,
) -> SamVisionConfig:
    """The settings of a `SamVisionEncoder` that takes the encoder's weights; see `start_sam`."""
    from transformers import SamVisionConfig

    if not encoder.takes_windows:
        raise ValueError(
            f"{card.encoder.family} can't be SAM's image encoder, which is a plain ViT; take an encoder of family vit"
        )
    if "patch_embed.proj.weight" not in encoder.inner().state_dict() or card.encoder.stem != "patch":
        raise ValueError(f"SAM embeds patches by one convolution, and this encoder has stem={card.encoder.stem}")
    if image_size % encoder.patch:
        raise ValueError(f"image_size is {image_size}; it must be a multiple of the patch of {encoder.patch} px")
    if width % 2:
        raise ValueError(f"width is {width}; half of it stands for sines and half for cosines, so take an even one")
    dim, depth, heads = card.encoder.shape
    blocks = global_blocks if isinstance(global_blocks, tuple) else evenly_spaced(global_blocks, depth)
    if blocks and max(blocks) >= depth:
        raise ValueError(f"blocks {blocks} are to attend everywhere, and the encoder's are 0 .. {depth - 1}")
    return SamVisionConfig(
        hidden_size=dim,
        output_channels=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_channels=card.channels,
        num_pos_feats=width // 2,
        image_size=image_size,
        patch_size=encoder.patch,
        mlp_dim=4 * dim,
        layer_norm_eps=encoder.blocks()[0].norm1.eps,
        window_size=window,
        global_attn_indexes=list(range(depth)) if window == 0 else list(blocks),
        use_rel_pos=True,
        initializer_range=0.02,  # at the default of 1e-10 nothing would come through a fresh neck
    )


def converted(encoder: Encoder, grid: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """The weights under SAM's names for a map of `grid` patches; what became of each of ours, and what is left out."""
    state = dict(encoder.inner().state_dict())
    weights: dict[str, Tensor] = {}
    taken: dict[str, str] = {}
    left: dict[str, str] = {}
    for key, value in state.items():
        reason = next((why for pattern, why in LEFT if re.search(pattern, key)), None)
        scale = re.match(r"^(blocks\.\d+)\.ls([12])\.gamma$", key)
        if reason is not None:
            left[key] = reason
        elif scale:
            taken[key] = f"multiplied into {scale.group(1)}.{('attn.proj', 'mlp.fc2')[int(scale.group(2)) - 1]}"
        elif key == "pos_embed":
            old = encoder.position_grid(key)
            num_prefix = value.shape[1] - old[0] * old[1]
            patches = resize_positions(value[:, num_prefix:], old, grid)
            weights["pos_embed"] = rearrange(patches, "1 (h w) d -> 1 h w d", h=grid[0])
            taken[key] = "pos_embed" + ("" if old == grid else f", interpolated from {old} to {grid} patches")
            taken[key] += f", {num_prefix} of class and registers left out" if num_prefix else ""
        else:
            renamed = next((re.sub(p, new, key) for p, new in RENAMED if re.search(p, key)), None)
            if renamed is None:
                raise ValueError(f"SAM's encoder has no place for {key}, so it would compute something else")
            weights[renamed], taken[key] = _scaled(key, value, state), renamed
    return weights, taken, left


def _scaled(key: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A projection's weight or bias times the layer scale that follows it, where there is one."""
    found = re.match(r"^(blocks\.\d+)\.(attn\.proj|mlp\.fc2)\.", key)
    gamma = None if found is None else state.get(f"{found.group(1)}.ls{1 if 'attn' in key else 2}.gamma")
    if gamma is None:
        return value
    return value * (rearrange(gamma, "d -> d 1") if value.ndim == 2 else gamma)
