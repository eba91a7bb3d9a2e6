"""Encoders by name: a run, a checkpoint, an encoder folder, an exported file, or timm:NAME."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pretrain.encoders.base import Encoder
from pretrain.encoders.registry import TIMM_PREFIX
from pretrain.tokenizers.card import is_tokenizer

if TYPE_CHECKING:
    from pretrain.encoders.timm.encoder import TimmEncoder

ENCODER_FILES = ("config.json", "model.safetensors")


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


def find_encoder(folder: Path) -> Path:
    """The encoder folder that `folder` is or holds: a run's final one, or else its latest checkpoint's.

    An exported .safetensors file is an encoder as well, and is returned as it is.
    """
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        hint = f"; {folder.parent} holds {', '.join(near[:10])}" if near else ""
        raise FileNotFoundError(
            f"{folder} is not a folder{hint}. Name a run, a checkpoint, an encoder folder, an exported "
            ".safetensors file, or timm:MODEL"
        )
    candidates = [folder, folder / "encoder"]
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        candidates.append(latest.parent / latest.read_text(encoding="utf-8").strip() / "encoder")
    for candidate in candidates:
        if all((candidate / name).is_file() for name in ENCODER_FILES) and not is_tokenizer(candidate):
            return candidate
    tokenizers = [folder, *(candidate.with_name("tokenizer") for candidate in candidates[1:])]
    if any(is_tokenizer(place) for place in tokenizers):
        raise FileNotFoundError(
            f"{folder} holds a tokenizer (method dvae or vqkd), which gives codes to predict and no features: there is "
            "no encoder to load or probe. Pretrain on its codes (method.target=codes) and name that run"
        )
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"no encoder in {folder}: it holds {', '.join(found[:10]) or 'nothing'}, and an encoder is a folder with "
        f"{' and '.join(ENCODER_FILES)}. A run has one from its first checkpoint on (see checkpoint.every_steps)"
    )


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
