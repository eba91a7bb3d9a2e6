"""What is learned: MAE, masked image modelling and DINO behind one seam (`base.Method`)."""

from __future__ import annotations

import dataclasses

from pretrain.encoders import build_encoder
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dino import Dino
from pretrain.methods.mae import MaskedAutoencoder
from pretrain.methods.mim import MaskedImageModelling
from pretrain.schedules import Timeline
from pretrain.schema import Config, MaeConfig, MimConfig
from pretrain.tokenizers.pixels import Pixels

__all__ = ["Method", "Normalisation", "build_method"]


def build_method(config: Config, normalisation: Normalisation, timeline: Timeline) -> Method:
    """The method that `config` names around the encoder that it names, freshly initialised from torch's generator."""
    size, channels, method = config.views.global_size, config.data.channels, config.method
    if isinstance(method, MaeConfig):
        encoder = build_encoder(config.encoder, size, channels, mask_token=method.mask.secondary > 0)
        return MaskedAutoencoder(method, encoder, size, channels, normalisation, timeline)
    if isinstance(method, MimConfig):
        encoder = build_encoder(config.encoder, size, channels, mask_token=True)
        return MaskedImageModelling(encoder, Pixels(encoder.stride, channels), normalisation, timeline)
    encoder = build_encoder(config.encoder, size, channels, mask_token=method.ibot is not None)
    teacher = build_encoder(dataclasses.replace(config.encoder, drop_path=0.0), size, channels)
    return Dino(method, encoder, teacher, normalisation, timeline)
