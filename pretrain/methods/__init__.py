"""What is learned, behind one seam (`base.Method`): encoders by MAE, masked modelling and DINO, and tokenizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pretrain.config import Config, DinoConfig, DvaeConfig, MaeConfig, MethodConfig, MimConfig, VqkdConfig
from pretrain.config.load import ConfigError
from pretrain.encoder_folder import TIMM_PREFIX, find_encoder
from pretrain.encoders import build_encoder
from pretrain.encoders.load import load_any
from pretrain.encoders.saved import read_card
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.timm.survey import survey, why_not_size
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dino.method import Dino
from pretrain.methods.dvae.method import Dvae
from pretrain.methods.mae.method import MaskedAutoencoder
from pretrain.methods.mim.method import MaskedImageModelling
from pretrain.methods.vqkd.method import Vqkd
from pretrain.tokenizers import build_target
from pretrain.tokenizers.card import check_codes

__all__ = ["Method", "Normalisation", "build_method", "check_sources", "export_folder"]


def export_folder(method: MethodConfig) -> str:
    """The folder of a run that holds what it is for: `encoder`, or `tokenizer`."""
    return "tokenizer" if isinstance(method, DvaeConfig | VqkdConfig) else "encoder"


def check_sources(config: Config) -> None:
    """Raise ConfigError unless the other runs that a method learns from are there and fit; starts nothing."""
    check_codes(config)
    method = config.method
    if isinstance(method, VqkdConfig):
        _check_teacher(method.teacher, config.views.global_size, config.data.channels)


def _check_teacher(name: str, size: tuple[int, int], channels: int) -> None:
    """Raise ConfigError unless the encoder that `name` names is there and has a map of tokens for the run's images."""
    timm_config, built_for = None, size
    try:
        if name.startswith(TIMM_PREFIX):
            timm_config = TimmConfig(model=name.removeprefix(TIMM_PREFIX))
            reads = survey(timm_config, size).channels
        else:
            card = read_card(find_encoder(Path(name).expanduser()))
            reads, built_for = card.channels, card.image_size
            if isinstance(card.encoder, TimmConfig):
                timm_config = card.encoder
            elif any(side % card.encoder.stride for side in size):
                raise ValueError(
                    f"its tokens are {card.encoder.stride} px, which do not divide views.global_crops of "
                    f"{size[0]}x{size[1]} px; name another teacher or another size"
                )
        if reads != channels:
            raise ValueError(
                f"{name} reads images of {reads} channels and data.channels is {channels}; they must be equal"
            )
        if timm_config is not None:
            reason = why_not_size(timm_config, built_for, channels, size)
            if reason is None and survey(timm_config, built_for, channels).grid is None:
                reason = "its features form no map, which VQ-KD needs"
            if reason is not None:
                raise ValueError(f"{name} can't teach on {size[0]}x{size[1]} px: {reason}")
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"method.teacher: {error}") from None


def build_method(config: Config, normalisation: Normalisation, timeline: Timeline) -> Method:
    """The method that `config` names around the encoder that it names, freshly initialised from torch's generator."""
    size, channels, method = config.views.global_size, config.data.channels, config.method
    if isinstance(method, DvaeConfig):
        return Dvae(method, channels, normalisation, timeline, config.seed)
    assert config.encoder is not None
    if isinstance(method, MaeConfig):
        encoder = build_encoder(config.encoder, size, channels, mask_token=method.mask.secondary > 0)
        return MaskedAutoencoder(method, encoder, size, channels, normalisation, timeline)
    if isinstance(method, MimConfig):
        encoder = build_encoder(config.encoder, size, channels, mask_token=True)
        target = build_target(method, encoder.stride, channels)
        return MaskedImageModelling(method, encoder, target, normalisation, timeline)
    ibot = isinstance(method, DinoConfig) and method.ibot is not None
    encoder = build_encoder(config.encoder, size, channels, mask_token=ibot)
    if isinstance(method, VqkdConfig):
        return Vqkd(method, encoder, load_any(method.teacher, size), size, normalisation, timeline)
    teacher = build_encoder(dataclasses.replace(config.encoder, drop_path=0.0), size, channels)
    return Dino(method, encoder, teacher, normalisation, timeline)
