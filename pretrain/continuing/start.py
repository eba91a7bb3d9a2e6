"""The start of a run as it was: kept in the run's folder, and a loss that holds what is learned to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoints.exports import export_of
from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.continuing.config import ContinuingConfig
from pretrain.diagnostics.features import headline
from pretrain.encoder_folder import ENCODER_FILES
from pretrain.encoders import side_losses
from pretrain.encoders.saved import headline_feature, load_encoder
from pretrain.interop.initialise import start_from
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.frozen import Frozen
from pretrain.methods.gram import gram_loss

FOLDER = "start"


def needs_start(config: ContinuingConfig) -> bool:
    """Whether a run compares itself with its start."""
    return bool(config.feature_weight or config.gram_weight or config.measure_every_epochs is not None)


def prepare(
    method: Method, config: Config, normalisation: Normalisation, run: Path, rank: int, begins: bool
) -> tuple[Frozen | None, list[str]]:
    """Put the weights that `init_from` names into a method of a run that `begins`, and hold it to them where the
    configuration asks for it: the start, where it is needed, and what was taken. Before an engine wraps the method;
    collective."""
    continuing, lines = config.continuing, list[str]()
    if config.init_from is not None and begins:
        heads = continuing is None or continuing.heads
        lines = start_from(method, config.init_from, config.method.name, heads)
    if continuing is None or not needs_start(continuing):
        return None, lines
    start = keep_start(method, config, normalisation, run, rank, begins)
    if continuing.feature_weight or continuing.gram_weight:
        method.register_forward_hook(Hold(config, start))  # type: ignore[arg-type]
    return start, lines


def keep_start(
    method: Method, config: Config, normalisation: Normalisation, run: Path, rank: int, begins: bool
) -> Frozen:
    """The encoder that a run will export, as training finds it: an encoder folder RUN/start, written when the run
    `begins`, and read from there ever after, so that the source may go. Collective.

    Raises ConfigError where a run that has begun has lost it.
    """
    folder = run / FOLDER
    if begins and rank == 0:
        temporary = folder.with_name(f".{FOLDER}.tmp")
        for old in (temporary, folder):
            shutil.rmtree(old, ignore_errors=True)
        export = export_of(method, config, normalisation, 0, 0.0)
        export.write(temporary, export.module.state_dict())
        temporary.rename(folder)
    dist.barrier()
    if not all((folder / name).is_file() for name in ENCODER_FILES):
        raise ConfigError(
            f"{folder} is gone, the encoder that the run started with, and the run is compared with it. Put it back, "
            f"or start a run of another name from the last checkpoint: name=... init_from={run}"
        )
    return Frozen(load_encoder(folder)[0])


class Hold:
    """What a method's loss has beside it where `feature_weight` or `gram_weight` is set.

    Called after the method's forward pass, within it for who wraps the method: the first global crop of each image,
    unmasked, goes through the encoder that learns and through the start. Both losses are means over images, so that
    the mean over ranks and micro-batches is that of the whole batch.
    """

    def __init__(self, config: Config, start: Frozen) -> None:
        assert config.continuing is not None
        self.config, self.start = config.continuing, start
        self.headline = headline_feature(config)

    def __call__(self, method: Method, given: tuple[Any, ...], outputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not method.training:
            return None
        assert method.encoder is not None
        images = method.normalise(given[0]["global_crops"][:, 0])
        with side_losses.collecting():  # the experts' are those of the method's own passes
            ours = method.encoder(images)
        theirs = self.start(images)
        loss, told = outputs["loss"], {}
        if self.config.feature_weight:
            told["start_features"] = relative_distance(headline(ours, self.headline), headline(theirs, self.headline))
            loss = loss + self.config.feature_weight * told["start_features"]
        if self.config.gram_weight:
            told["start_gram"] = gram_loss(ours.tokens, theirs.tokens)
            loss = loss + self.config.gram_weight * told["start_gram"]
        return {**outputs, **{name: value.detach() for name, value in told.items()}, "loss": loss}


def relative_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over images of the squared distance of features (b, d) from those wanted, relative to the square of the
    latter's norm; a scalar in fp32 under autocast too."""
    with torch.autocast(ours.device.type, enabled=False):
        wanted = theirs.float()
        apart = (ours.float() - wanted).square().sum(dim=1)
        return (apart / wanted.square().sum(dim=1).clamp_min(1e-12)).mean()
