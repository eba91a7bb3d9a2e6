"""`init_from`: a run that starts from the weights of an imported or own encoder, or of a timm model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pretrain.config import Config, EncoderConfig
from pretrain.config.load import ConfigError
from pretrain.encoder_folder import HEADS_FILE, TIMM_PREFIX, find_encoder
from pretrain.encoders.base import Encoder
from pretrain.encoders.load import load_any
from pretrain.encoders.saved import read_card
from pretrain.encoders.timm.survey import check_name
from pretrain.encoders.transfer import fit
from pretrain.interop.earlier_run import take_rest
from pretrain.methods.base import Method

EARLIER_HEADS_FILE = "method.safetensors"  # of imports of earlier versions


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
    theirs, ours = settings_of(card.encoder), settings_of(config.encoder)
    if theirs.get("positions") == "sincos":  # fixed positions may be learned on from
        ours["positions"] = "sincos"
    if theirs != ours:
        wrong = ", ".join(f"{key} {value} (here {ours[key]})" for key, value in theirs.items() if value != ours[key])
        paste = " ".join(f"encoder.{key}={str(value).replace(' ', '')}" for key, value in theirs.items())
        raise ConfigError(
            f"init_from {source} is another encoder than the run's: {wrong}. Sizes of image and patch, channels and "
            f"register tokens may differ; for the rest set {paste.replace('(', '[').replace(')', ']')}"
        )


def settings_of(encoder: EncoderConfig) -> dict[str, Any]:
    """What of an encoder decides how its weights are to be read, whether their shapes show it or not."""
    shape = dict(zip(encoder.decisive, getattr(encoder, "shape", ()), strict=False))
    return {name: shape.get(name, getattr(encoder, name)) for name in encoder.decisive}


def start_from(method: Method, source: str, method_name: str, heads: bool = True) -> list[str]:
    """Put the weights that `source` names into a method before it trains; says what was taken, and what was not.

    Decoder and heads are taken as well where an imported folder, a run or a checkpoint has those of the same method and
    they fit, unless `heads` is false.
    Raises ValueError when nothing of the encoder's blocks could be taken.
    """
    encoder = method.encoder
    assert encoder is not None
    loaded = load_any(source, getattr(encoder, "image_size", None))
    theirs, ours = (_heads(module) for module in (loaded.encoder.inner(), encoder.inner()))
    if theirs != ours:
        listed = (", ".join(map(str, heads)) or "none" for heads in (theirs, ours))
        raise ValueError(
            "init_from {}: its blocks have the heads {}, and the run's encoder {}; set encoder.depth and encoder.heads "
            "to the source's".format(source, *listed)
        )
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
    if heads and not source.startswith(TIMM_PREFIX):
        lines += [f"  {line}" for line in _rest_of_method(method, Path(source).expanduser(), method_name)]
    method.encoder_loaded()
    return lines


def _heads(model: nn.Module) -> list[int]:
    """Attention heads of every block, which no shape of its weights shows."""
    return [
        part.num_heads for name, part in model.named_modules() if name.endswith("attn") and hasattr(part, "num_heads")
    ]


@torch.no_grad()
def _rest_of_method(method: Method, source: Path, method_name: str) -> list[str]:
    """Take decoder, heads and mask token from an imported folder, or from a run of the same method."""
    folder = find_encoder(source)
    file = next((path for path in (folder / HEADS_FILE, folder / EARLIER_HEADS_FILE) if path.is_file()), None)
    if file is None:
        return take_rest(method, source) if read_card(folder).method == method_name else []
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
    if encoder.has_square_grid:
        return None
    return image_size[0] // encoder.patch, image_size[1] // encoder.patch
