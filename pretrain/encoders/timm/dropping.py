"""MAE's way of hiding in timm's models: units left out before the first block, where the blocks allow it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from pretrain.encoders.timm.convit import PlacedAttention
from pretrain.encoders.timm.embeddings import candidates

#: Classes of timm whose blocks take any subset of the patches, and the last module before their first block. Positions
#: are added before it; rotary ones and ConViT's are gathered along.
LAST_BEFORE_BLOCKS = {
    "Cait": "pos_drop",
    "ConVit": "pos_drop",
    "Eva": "norm_pre",
    "NaFlexVit": "norm_pre",
    "VisionTransformer": "norm_pre",
    "VisionTransformerDistilled": "norm_pre",
}

#: Why the rest can't, by class; else by what a model is made of.
REASONS = {
    "CrossVit": "its two branches cut the image into patches of two sizes",
    "MlpMixer": "its token mixing has a weight for each place of the map",
}


def why_not_dropped(model: nn.Module) -> str | None:
    """Why no units can be left out of a timm model, in a few words; None where they can."""
    name = type(model).__name__
    if name in LAST_BEFORE_BLOCKS:
        return None
    reason = REASONS.get(name)
    if reason is None and _convolves(model):
        reason = "its convolutions need the whole map"
    return "takes whole images only" if reason is None else f"takes whole images only ({reason})"


def _convolves(model: nn.Module) -> bool:
    """Whether a convolution after the embedding looks at more than one place."""
    inside = {id(part) for module in candidates(model).values() for part in module.modules()}
    return any(
        isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1 and id(part) not in inside for part in model.modules()
    )


@contextmanager
def left_out(model: nn.Module, units: Tensor | None, count: int) -> Iterator[None]:
    """While it lasts, the blocks of a model see the tokens `units` (b, k) of the `count` that an image has."""
    if units is None:
        yield
        return

    def pick(module: nn.Module, inputs: Any, states: Tensor) -> Tensor:
        num_prefix = states.shape[1] - count
        shown = states[:, num_prefix:].gather(1, repeat(units, "b k -> b k d", d=states.shape[2]))
        return torch.cat([states[:, :num_prefix], shown], dim=1)

    last = model.get_submodule(LAST_BEFORE_BLOCKS[type(model).__name__])
    handle = last.register_forward_hook(pick)
    placed = [part for part in model.modules() if isinstance(part, PlacedAttention)]
    rope = getattr(model, "rope", None)
    for part in placed:
        part.shown = units
    if rope is not None:
        whole = rope.get_embed
        rope.get_embed = lambda *given, **named: _rotary(whole(*given, **named), units)
    try:
        yield
    finally:
        handle.remove()
        for part in placed:
            part.shown = None
        if rope is not None:
            del rope.get_embed


def _rotary(table: Tensor, units: Tensor) -> Tensor:
    """Rotary embeddings of each image's tokens `units` (b, k): of a table (n, d), or (depth, heads, n, d).

    As blocks take them: (b, 1, k, d), or (depth, b, heads, k, d).
    """
    picked = table[..., units, :]  # an index of integers, which is on the device
    if table.ndim == 2:
        return rearrange(picked, "b k d -> b 1 k d")
    return rearrange(picked, "l h b k d -> l b h k d")
