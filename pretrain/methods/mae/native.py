"""What MAE does with images at their own shape: units dropped of each, decoded in one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor

from data_pipelines.loader import Batch
from pretrain.encoders.native import Interleaved, PackedFeatures, PackedImages, PackedMask, lengths_of
from pretrain.encoders.packed import Groups, attend_packed, merged
from pretrain.encoders.patches import patch_statistics
from pretrain.stream.from_host import from_host
from pretrain.stream.native_batch import drops_of

if TYPE_CHECKING:
    from pretrain.methods.mae.method import MaskedAutoencoder


class Hidden(NamedTuple):
    """Of packed images: the mask that the encoder is given, the numbers (m,) of the patches that are hidden, what each
    weighs in the loss (m,), and row and column (t, 2) of every patch; on the device."""

    mask: PackedMask
    index: Tensor
    weights: Tensor
    places: Tensor


def hidden_of(batch: Batch, device: torch.device) -> Hidden:
    """What `drop_mask` hides of a batch. Each image weighs alike, however many of its patches are hidden."""
    drops = drops_of(batch)
    weights = np.repeat(1.0 / np.maximum(drops.num_hidden, 1), drops.num_hidden) / len(drops.num_hidden)
    return Hidden(
        PackedMask(from_host(drops.kept, device), tuple(drops.num_kept.tolist())),
        from_host(drops.hidden, device),
        from_host(weights.astype(np.float32), device),
        from_host(batch["global_positions"].numpy(), device),
    )


def decoded(method: MaskedAutoencoder, features: PackedFeatures, hidden: Hidden) -> Tensor:
    """The hidden patches (m, p) that the decoder makes of the visible tokens, each within its whole image."""
    tokens, lengths = method.decoder_embed(features.tokens), lengths_of(features.grids)
    full = method.mask_token.to(tokens.dtype).view(1, -1).expand(len(hidden.places), -1)
    assert features.kept is not None
    full = full.index_copy(0, features.kept, tokens)
    places = method.axis_positions[hidden.places]  # (t, 2, d / 2)
    full = full + rearrange(places.flip(1), "t axis d -> t (axis d)")  # the column first, as in the code of MAE
    packing = None
    if features.prefix_tokens is not None:  # they take part, as in the code of MAE
        packing = Interleaved(lengths, features.prefix_tokens.shape[1], full.device)
        prefix = rearrange(method.decoder_embed(features.prefix_tokens), "n p d -> (n p) d")
        full, lengths = packing.joined(prefix, full), packing.lengths
    groups = merged(lengths)
    for block in method.decoder_blocks:
        full = within(block, full, groups)
    if packing is not None:
        _, full = packing.split(full)
    return method.decoder_pred(method.decoder_norm(full.index_select(0, hidden.index)))


def within(block: Block, tokens: Tensor, groups: Groups) -> Tensor:
    """A block of timm on packed tokens (t, d), each of which attends to its own image."""
    attention = block.attn
    found = attend_packed(attention.qkv(block.norm1(tokens)), attention.num_heads, groups)
    tokens = tokens + attention.proj(found)
    return tokens + block.mlp(block.norm2(tokens))


def loss(method: MaskedAutoencoder, batch: Batch) -> dict[str, Any]:
    """MAE's loss: the mean over images of the mean squared error of their hidden patches."""
    images: PackedImages = method.packed(batch)
    hidden = hidden_of(batch, images.patches.device)
    features = method.encoder(images, hidden.mask)
    predicted = decoded(method, features, hidden)
    target = images.patches.index_select(0, hidden.index)
    if method.norm_pix_loss:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    return {"loss": ((predicted.float() - target).square().mean(dim=-1) * hidden.weights).sum()}
