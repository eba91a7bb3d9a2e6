"""`init_from`: a run that starts from the weights of an imported or own encoder, or of a timm model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.config import ConfigError
from pretrain.encoders.base import Encoder
from pretrain.encoders.load import TIMM_PREFIX, find_encoder, load_any
from pretrain.encoders.saved import read_card
from pretrain.encoders.timm_model import TimmEncoder, check_name
from pretrain.encoders.transfer import fit
from pretrain.methods import Method
from pretrain.schema import Config

METHOD_FILE = "method.safetensors"


def check_init_from(config: Config) -> None:
    """Raise ConfigError unless `init_from` names an encoder of the family that is to be trained; starts nothing."""
    source = config.init_from
    if source is None:
        return
    if config.encoder is None:
        raise ConfigError(f"init_from is {source}, but {config.method.name} trains no encoder; set init_from=null")
    if source.startswith(TIMM_PREFIX):
        try:
            check_name(source.removeprefix(TIMM_PREFIX))
        except ValueError as error:
            raise ConfigError(f"init_from: {error}") from None
        return
    try:
        card = read_card(find_encoder(Path(source).expanduser()))
    except FileNotFoundError as error:
        raise ConfigError(f"init_from: {error}") from None
    if card.encoder.family != config.encoder.family:
        raise ConfigError(
            f"init_from {source} is an encoder of family {card.encoder.family}, and the run trains family "
            f"{config.encoder.family}; weights are brought from one to another of the same family only. "
            f"Set encoder.family={card.encoder.family}, or name another source"
        )
    theirs, ours = (getattr(encoder, "shape", (None,))[0] for encoder in (card.encoder, config.encoder))
    if theirs != ours:
        raise ConfigError(
            f"init_from {source} is {theirs} wide and the encoder of the run {ours}, so none of its blocks fits; give "
            "the encoder the size that the source has"
        )


def start_from(method: Method, source: str, method_name: str) -> list[str]:
    """Put the weights that `source` names into a method before it trains; says what was taken, and what was not.

    Decoder and heads are taken as well where an imported folder has those of the same method and they fit.
    Raises ValueError when nothing of the encoder's blocks could be taken.
    """
    encoder = method.encoder
    assert encoder is not None
    loaded = load_any(source, getattr(encoder, "image_size", None))
    state = loaded.encoder.inner().state_dict()
    fitted = fit(state, encoder, old_grid=_grid(loaded.encoder, loaded.image_size))
    taken = set(fitted.weights) - set(fitted.fresh)
    blocks = [name for name, _ in encoder.inner().named_parameters() if ".norm1." in name or "blocks." in name]
    if blocks and not taken & set(blocks):
        raise ValueError(
            f"init_from {source}: none of its blocks fits the encoder that is to be trained ("
            + "; ".join(f"{key}: {why}" for key, why in list(fitted.left.items())[:3])
            + "). Give the encoder the size that the source has"
        )
    encoder.inner().load_state_dict(fitted.weights)
    lines = [f"started from {source}:", *(f"  {line}" for line in fitted.lines())]
    if not source.startswith(TIMM_PREFIX):
        lines += [f"  {line}" for line in _rest_of_method(method, Path(source).expanduser(), method_name)]
    method.encoder_loaded()
    return lines


@torch.no_grad()
def _rest_of_method(method: Method, source: Path, method_name: str) -> list[str]:
    """Take decoder, heads and mask token from an imported folder."""
    folder = find_encoder(source)
    file = folder / METHOD_FILE
    if not file.is_file():
        return []
    saved = load_file(file)
    if read_card(folder).method != method_name:
        return [f"not taken: {key} (of another method)" for key in saved]
    own = method.state_dict()
    fitting = {key: value for key, value in saved.items() if key in own and own[key].shape == value.shape}
    for key, value in fitting.items():
        own[key].copy_(value)
    lines = [f"{len(fitting)} tensors of the method around it"]
    return lines + [f"not taken: {key} (the method has no such tensor)" for key in saved if key not in fitting]


def _grid(encoder: Encoder, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Patches (h, w) that the source's positions were made for; a timm model's are told from their number."""
    if isinstance(encoder, TimmEncoder):
        return None
    return image_size[0] // encoder.patch, image_size[1] // encoder.patch
