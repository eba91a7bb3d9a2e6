"""Which parts of an encoder learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.continuing.low_rank import add_low_rank
from pretrain.encoders import Encoder
from pretrain.encoders.base import depth_of

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.methods.base import Method


def train_last(encoder: Encoder, blocks: int | None) -> None:
    """Freeze all of an encoder but its last blocks and what comes after them; 0: all of it; None: nothing.

    Raises ValueError where it has fewer.
    """
    if blocks is None:
        return
    if blocks > encoder.depth:
        raise ValueError(f"train_blocks is {blocks}, and the encoder has {encoder.depth}; null trains all of it")
    first = encoder.depth + 2 if blocks == 0 else encoder.depth + 1 - blocks
    for name, parameter in encoder.named_parameters():
        if depth_of(encoder, f"encoder.{name}") < first:
            parameter.requires_grad_(False)


def choose_parts(method: Method, config: Config) -> None:
    """What `config.continuing` says of a fresh method's encoder, and of its slow averages, which get the same changes.

    The mask token, which is the method's and comes with no released weights, is trained in any case.
    """
    continuing, encoder = config.continuing, method.encoder
    if continuing is None or encoder is None:
        return
    if continuing.lora is not None:
        for part in [part for part in method.modules() if isinstance(part, Encoder)]:
            add_low_rank(part, continuing.lora, config.views.global_size, config.data.planes)
    train_last(encoder, continuing.train_blocks)
    token = getattr(encoder, "mask_token", None)
    if token is not None:
        token.requires_grad_(True)
