"""Encoders by name: a run, a checkpoint, an encoder folder, an exported file, or timm:NAME."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pretrain.encoder_folder import TIMM_PREFIX, find_encoder
from pretrain.encoders.base import Encoder

if TYPE_CHECKING:
    from pretrain.encoders.timm.encoder import TimmEncoder


class LoadedEncoder(NamedTuple):
    """A trained encoder and the images it knows: `image_size` h, w in px, mean and std of pixels in 0 .. 1."""

    encoder: Encoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    channels: int


def load_any(target: str, image_size: tuple[int, int] | None = None) -> LoadedEncoder:
    """The encoder that `target` names, on the CPU in evaluation mode; a timm model is built for `image_size`.

    Raises FileNotFoundError where there is none, saying what there is; ValueError for a name timm does not know or
    that has no weights to load.
    """
    from pretrain.encoders.saved import load_encoder

    if target.startswith(TIMM_PREFIX):
        model = _load_timm(target.removeprefix(TIMM_PREFIX), image_size)
        return LoadedEncoder(model.eval(), model.mean, model.std, model.image_size, model.channels)
    encoder, card = load_encoder(find_encoder(Path(target).expanduser()))
    return LoadedEncoder(encoder, tuple(card.mean), tuple(card.std), card.image_size, card.channels)


def _load_timm(name: str, image_size: tuple[int, int] | None = None) -> TimmEncoder:
    from pretrain.encoders.timm.encoder import TimmEncoder

    try:
        return TimmEncoder(name, pretrained=True, image_size=image_size)
    except ValueError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds for "no network" and "no such weights"
        raise ValueError(
            f"the weights of timm:{name} could not be loaded ({type(error).__name__}: {error}). They come from the "
            "Hugging Face hub: run this once where there is a network, then carry its cache along (HF_HOME names it). "
            "A model without published weights has no pretrained row to report"
        ) from error
