"""What a run leaves for use beyond it: a frozen encoder, or a trained tokenizer, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from pretrain.config import Config
from pretrain.continuing.low_rank import without_changes
from pretrain.encoders.saved import EncoderCard, headline_feature, save_encoder
from pretrain.methods.base import Method, Normalisation
from pretrain.tokenizers.card import TokenizerCard
from pretrain.tokenizers.saved import save_tokenizer


@dataclass(frozen=True)
class Export:
    """What a run is for: a folder of every checkpoint, and of the run at its end.

    module: what is saved, the encoder perhaps with a head. write: puts the module's whole state dict into the folder,
    which it makes.
    """

    folder: str  # encoder or tokenizer
    module: nn.Module
    write: Callable[[Path, dict[str, Tensor]], None]


def export_of(method: Method, config: Config, normalisation: Normalisation, step: int, epoch: float) -> Export:
    """The tokenizer that `method` trains, or else its frozen encoder, as of a step."""
    shared = {
        "image_size": config.views.global_size, "channels": config.data.channels, "bits": config.data.bits,
        "encoder": config.encoder, "step": step, "epoch": epoch, "run": config.name,
    }  # fmt: skip
    tokenizer = method.tokenizer()
    if tokenizer is not None:
        own_map = config.encoder is None  # the dVAE maps pixels in its own way
        card = TokenizerCard(
            kind=config.method.name,
            vocab_size=tokenizer.vocab_size,
            stride=tokenizer.stride,
            mean=None if own_map else normalisation.mean,
            std=None if own_map else normalisation.std,
            method=config.method,
            **shared,
        )
        return Export("tokenizer", tokenizer, partial(save_tokenizer, card=card))
    encoder = method.frozen_encoder()
    assert encoder is not None
    described = EncoderCard(
        mean=normalisation.mean,
        std=normalisation.std,
        method=config.method.name,
        headline=headline_feature(config),
        frames=config.data.frames,
        frame_stride=config.data.frame_stride,
        **shared,
    )
    beside = method.beside_encoder()
    if beside is not None:
        return Export("encoder", beside.module, partial(beside.write, card=described))
    return Export("encoder", encoder, partial(_write, encoder=encoder, card=described))


def _write(folder: Path, weights: dict[str, Tensor], encoder: nn.Module, card: EncoderCard) -> None:
    save_encoder(folder, without_changes(encoder, weights), card)
