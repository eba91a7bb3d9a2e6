"""With which mean and deviation a run normalises its pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.remote.urls import redact
from data_pipelines.wording import counted
from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.encoder_folder import TIMM_PREFIX, find_encoder
from pretrain.encoders.saved import read_card
from pretrain.methods.base import Normalisation
from pretrain.stream.datasets import sources, weights_of
from pretrain.survival.run_folder import begun_config

IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def choose_normalisation(config: Config, datasets: Sequence[Dataset]) -> Normalisation:
    """Mean and deviation from the configuration, else from each data set's dataset.json, else ImageNet's for RGB.

    What dataset.json says of grey images holds for each channel of the RGB made of them.
    """
    data = config.data
    if data.mean is not None and data.std is not None:
        return Normalisation(data.mean, data.std)
    known = []
    for source, dataset in zip(sources(data), datasets, strict=True):
        mean, std = dataset.mean or (), dataset.std or ()
        if (len(mean), len(std), data.channels) == (1, 1, 3):
            mean, std = mean * 3, std * 3
        if len(mean) == len(std) == data.channels:
            known.append(Normalisation(tuple(mean), tuple(std)))
            continue
        path = redact(source.path)
        if mean and not {len(mean), data.channels} <= {1, 3}:
            raise ConfigError(
                f"data.channels is {data.channels} and the images of {path} have {len(mean)}, by its dataset.json; "
                f"only grey and RGB are made of each other. Set data.channels={len(mean)} (and data.bits), name other "
                "data, or, if that file is wrong, set data.mean and data.std (of pixels in 0 .. 1)"
            )
        if data.channels == 3:
            return IMAGENET
        found = f"the mean and deviation of {counted(len(mean), 'channel')}" if mean else "no mean and deviation"
        raise ConfigError(
            f"data.channels is {data.channels} and the dataset.json of {path} has {found}. Measure them: "
            f"`selfsight data stats {path} --channels {data.channels} --bits {data.bits} --write`; or set "
            "data.mean and data.std (of pixels in 0 .. 1)"
        )
    together = pooled(known, weights_of(data, datasets))
    constant = [str(channel) for channel, value in enumerate(together.std) if not value > 0]
    if constant:
        raise ConfigError(
            f"{redact(str(data.train))} has a deviation of 0 in channel {', '.join(constant)}: one "
            "value everywhere; leave it out of the images, or set data.mean and data.std"
        )
    return together


def pooled(known: Sequence[Normalisation], weights: Sequence[float]) -> Normalisation:
    """Mean and deviation of the pixels of all data sets together, each with its weight."""
    if len(known) == 1:
        return known[0]
    means, stds = np.array([one.mean for one in known]), np.array([one.std for one in known])
    shares = np.array(weights)[:, None] / sum(weights)
    mean = (shares * means).sum(axis=0)
    deviation = np.sqrt((shares * (stds**2 + (means - mean) ** 2)).sum(axis=0))
    return Normalisation(tuple(mean.round(8).tolist()), tuple(deviation.round(8).tolist()))


def resolve_normalisation(config: Config) -> tuple[Config, list[str]]:
    """The configuration with the mean and deviation that the weights of `init_from` know, and a line that says so.

    They become part of the run's configuration, from where a run that has begun takes them when the source is gone.
    """
    data = config.data
    if config.init_from is None or data.mean is not None:
        return config, []
    known = _known(config.init_from) or _stored(config)
    if known is None or len(known.mean) != data.channels:
        return config, []
    changed = dataclasses.replace(data, mean=known.mean, std=known.std)
    line = f"data.mean and data.std: {known.mean} and {known.std}, as {config.init_from} was trained"
    return dataclasses.replace(config, data=changed), [line]


def keep_normalisation(config: Config, datasets: Sequence[Dataset]) -> Config:
    """The configuration with mean and deviation, which are part of it from the run's start: data that grow, or are
    measured anew, do not change them."""
    begun = begun_config(config)
    if config.data.mean is None and begun is not None and begun.data.mean is not None:
        known = Normalisation(begun.data.mean, begun.data.std or ())
    else:
        known = choose_normalisation(config, datasets)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mean=known.mean, std=known.std))


def _known(source: str) -> Normalisation | None:
    """What the encoder that `source` names was trained with; None where that is not there to ask."""
    if source.startswith(TIMM_PREFIX):
        known = timm.get_pretrained_cfg(source.removeprefix(TIMM_PREFIX))
        return None if known is None else Normalisation(tuple(known.mean), tuple(known.std))
    try:
        card = read_card(find_encoder(Path(source).expanduser()))
    except (FileNotFoundError, ValueError):  # told by `check_init_from`, where the run has yet to begin
        return None
    return Normalisation(tuple(card.mean), tuple(card.std))


def _stored(config: Config) -> Normalisation | None:
    """What the run of this name took from the same source when it began; None where it has not."""
    begun = begun_config(config)
    if begun is None or begun.init_from != config.init_from or begun.data.mean is None or begun.data.std is None:
        return None
    return Normalisation(begun.data.mean, begun.data.std)
