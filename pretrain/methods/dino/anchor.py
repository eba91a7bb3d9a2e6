"""The teacher of Gram anchoring: an earlier one, of the run itself or of another, that stands still for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.encoder_folder import find_encoder
from pretrain.encoders import Encoder, Features
from pretrain.encoders.load import LoadedEncoder, load_any
from pretrain.encoders.saved import read_card
from pretrain.encoders.transfer import fit
from pretrain.engines.ema import update_ema
from pretrain.methods.base import Normalisation
from pretrain.methods.dino.config import GramConfig
from pretrain.methods.gram import gram_loss, on_grid


class GramAnchor(nn.Module):
    """Holds how alike the student's patches are to what an earlier teacher says (Simeoni et al. 2025, section 4).

    The teacher's encoder is part of the run's state: a resumed run goes on with it. When it is copied is a function of
    the step alone.
    """

    def __init__(self, config: GramConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> GramAnchor:
        return super().train(False)

    def is_on(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) learns from it."""
        return step >= self.config.start_step

    def is_copied(self, steps: int) -> bool:
        """Whether the run's teacher becomes this one after `steps` optimizer steps."""
        since, every = steps - self.config.start_step, self.config.refresh_every_steps
        if since <= 0:
            return since == 0 and self.config.teacher is None
        most = self.config.max_refreshes
        return every is not None and since % every == 0 and (most is None or since // every <= most)

    def follow(self, teacher: nn.Module) -> None:
        """Become a copy of the run's present teacher; under ZeRO 3 each rank its own part."""
        update_ema([(self.encoder, teacher)], 1.0)

    def loss(self, student: Features, images: Tensor) -> Tensor:
        """How far the similarities of the student's patches (b, n, d) are from this teacher's.

        images: (b, c, h, w) what this teacher sees of the same crops, perhaps larger: then its features are resampled
        to the student's grid, bicubic and without antialiasing.
        """
        with torch.no_grad():
            features = self.encoder(images)
        assert student.grid is not None
        assert features.grid is not None
        wanted = on_grid(features.tokens, features.grid, student.grid)
        return gram_loss(student.tokens, wanted, self.config.normalise, self.config.negatives)

    def start_from(self, source: str, normalisation: Normalisation) -> None:
        """Take the encoder that `source` names. ValueError where it is another, or sees images differently."""
        encoder = self.encoder
        loaded = load_any(source, getattr(encoder, "image_size", None))
        _check_normalisation(source, loaded, normalisation)
        grid = None
        if not loaded.encoder.has_square_grid:
            grid = (loaded.image_size[0] // loaded.encoder.patch, loaded.image_size[1] // loaded.encoder.patch)
        fitted = fit(loaded.encoder.inner().state_dict(), encoder, old_grid=grid)
        if fitted.fresh or fitted.left:
            named = ", ".join([*fitted.fresh, *fitted.left][:3])
            raise ValueError(
                f"method.gram.teacher {source} is another encoder than the run's: {named} are not in both. Name an "
                "earlier checkpoint of the run that init_from names, or set method.gram.teacher=null"
            )
        encoder.inner().load_state_dict(fitted.weights)


def _check_normalisation(source: str, loaded: LoadedEncoder, ours: Normalisation) -> None:
    theirs: Any = (*loaded.mean, *loaded.std)
    pairs = zip(theirs, (*ours.mean, *ours.std), strict=False)
    if len(loaded.mean) != len(ours.mean) or any(abs(a - b) > 1e-3 for a, b in pairs):
        raise ValueError(
            f"method.gram.teacher {source} knows images of mean {list(loaded.mean)} and deviation {list(loaded.std)}, "
            f"and the run has {list(ours.mean)} and {list(ours.std)}; set data.mean and data.std to the teacher's"
        )


def check_teacher(config: Config) -> None:
    """Raise ValueError unless the Gram teacher that is named is there and of the run's family."""
    gram = config.method.gram
    if gram is None or gram.teacher is None:
        return
    assert config.encoder is not None
    try:
        card = read_card(find_encoder(Path(gram.teacher).expanduser()))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"method.gram.teacher: {error}") from None
    if card.encoder.family != config.encoder.family:
        raise ValueError(
            f"method.gram.teacher {gram.teacher} is an encoder of family {card.encoder.family}, and the run trains "
            f"{config.encoder.family}; name an earlier checkpoint of the run that init_from names"
        )
