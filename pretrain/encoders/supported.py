"""Which encoder goes with which method: what is refused before a run starts, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.config import Config, EncoderConfig
from pretrain.config.combinations import check_units
from pretrain.config.load import ConfigError
from pretrain.encoders.registry import FAMILIES, LEFT_OUT, family_of
from pretrain.encoders.spec import EncoderSpec

#: Columns of the table.
METHODS = ("mae", "mim", "dino", "probe")


def _row(spec: EncoderSpec, settings: Mapping[str, Any]) -> tuple[str, EncoderConfig]:
    config = spec.config(**settings)
    told = [key if value is True else f"{key}={value}" for key, value in settings.items()]
    return ", ".join([spec.name, *told]) if spec.label(config) == spec.name else spec.label(config), config


#: Rows of the table: one or more of every family.
EXAMPLES: dict[str, EncoderConfig] = dict(
    _row(spec, example.settings) for spec in FAMILIES.values() for example in spec.examples
)
LOCAL_CROP = (96, 96)  # px; what DINO's second kind of crop has in the table


def why_not(
    encoder: EncoderConfig,
    method: str,
    image_size: tuple[int, int] | None = None,
    local_size: tuple[int, int] | None = None,
    channels: int = 3,
) -> str | None:
    """Why `method` (of METHODS, or vqkd) can't be had with an encoder, in a few words; None where it can.

    image_size: h, w in px that it is built for; default: what timm says. local_size: of DINO's local crops.
    """
    family = family_of(encoder)
    if method == "mae" and family.drop_layout == "none":
        return "takes whole images only"
    if family.survey is None:
        return None
    try:
        found = family.survey_of(encoder, image_size, channels)
    except ValueError as error:
        return str(error)
    if method == "mim":
        return found.unmaskable
    if method == "vqkd" and found.grid is None:
        return "its features form no map"
    if method == "dino" and local_size is not None and local_size != found.image_size:
        reason = family.why_not_size(encoder, found.image_size, channels, local_size)
        if reason is not None:
            return (
                f"takes crops of one size only, and {local_size[0]}x{local_size[1]} px is another than "
                f"{found.image_size[0]}x{found.image_size[1]} ({reason})"
            )
    return None


def check_encoder(config: Config) -> None:
    """Raise ConfigError where the encoder can't do what the method, the crops or the engine ask of it.

    What is known without building the encoder, `pretrain/config/combinations.py` has checked before.
    """
    encoder, method = config.encoder, config.method
    if encoder is None:
        return
    size, local = config.views.global_size, config.views.local_crops
    family, found = family_of(encoder), None
    name = f"encoder {family.label(encoder)}"
    if family.survey is not None:
        try:
            found = family.survey_of(encoder, size, config.data.channels)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    reason = why_not(encoder, method.name, size, None if local is None else local.size, config.data.channels)
    if reason is not None:
        raise ConfigError(f"{name} does not go with method {method.name}: {reason}. {_hint(method.name, size)}")
    if found is None:
        return
    if method.name == "dino" and method.ibot is not None:
        if found.unmaskable is not None:
            raise ConfigError(f"{name} does not go with method.ibot, which masks tokens: {found.unmaskable}")
        if method.ibot.unit is None:
            raise ConfigError(f"set method.ibot.unit for {name}; a token of it is {found.stride} px")
        if method.ibot.unit % found.stride or any(side % method.ibot.unit for side in size):
            raise ConfigError(
                f"method.ibot.unit is {method.ibot.unit} px; it must be a multiple of the {found.stride} px of a token "
                f"of {name}, and divide {size[0]}x{size[1]} px"
            )
    if method.name == "mim":
        check_units(method.mask.unit, found.stride, found.patch)
    if not found.uniform:
        for switch in ("activation_checkpointing", "compile"):
            if getattr(config.engine, switch):
                raise ConfigError(
                    f"engine.{switch} works on an encoder's equal blocks, and {name} has none; "
                    f"set engine.{switch}=false"
                )
    if config.optim.layer_decay != 1 and not found.grouped:
        raise ConfigError(f"timm does not say how deep the parameters of {name} are; set optim.layer_decay=1")


def _hint(method: str, size: tuple[int, int]) -> str:
    return {
        "mae": "`selfsight encoders` shows which go with MAE",
        "mim": "`selfsight encoders` shows which encoders do",
        "dino": f"Use local crops of the global size (views.local_crops.size=[{size[0]}, {size[1]}]), or none "
        "(views.local_crops=null)",
    }.get(method, "`selfsight encoders` shows what goes together")


def cell(encoder: EncoderConfig, method: str) -> str:
    """What the table says of one encoder and one method: it starts with yes, or is the reason why not."""
    reason = why_not(encoder, method)
    if reason is not None:
        return reason
    if method == "dino" and why_not(encoder, method, local_size=LOCAL_CROP) is not None:
        return "yes, crops of one size"
    return "yes"


def table() -> str:
    """The table of all examples and methods, in markdown."""
    lines = [f"| encoder | {' | '.join(METHODS)} |", "| --- " * (len(METHODS) + 1) + "|"]
    for name, encoder in EXAMPLES.items():
        cells = " | ".join(cell(encoder, method) for method in METHODS)
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join([*lines, *(f"\n{line}" for line in LEFT_OUT.values())])
