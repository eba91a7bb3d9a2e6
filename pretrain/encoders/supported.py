"""Which encoder goes with which method: what is refused before a run starts, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from pretrain.config import Config, EncoderConfig
from pretrain.config.load import ConfigError
from pretrain.encoders.registry import FAMILIES, LEFT_OUT, family_of
from pretrain.encoders.spec import EncoderSpec
from pretrain.methods.registry import METHODS, example_of, exporting, spec_of
from pretrain.methods.spec import Needs, Tokens


def needs_of(column: str) -> Needs:
    """What a method asks of an encoder at its simplest; a probe asks nothing."""
    return METHODS[column].needs(example_of(column)) if column in METHODS else Needs()


#: Columns of the table: the methods that train encoders, those first that ask for more unusual things, and a probe.
COLUMNS = (
    *sorted(exporting("encoder"), key=lambda name: [advice is None for advice in astuple(needs_of(name))]),
    "probe",
)


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
    needs: Needs,
    image_size: tuple[int, int] | None = None,
    local_size: tuple[int, int] | None = None,
    channels: int = 3,
) -> tuple[str, str | None] | None:
    """Why a method that asks for `needs` can't be had with an encoder, in a few words, and the method's advice; None
    where it can.

    image_size: h, w in px that it is built for; default: what timm says. local_size: of the local crops.
    """
    family = family_of(encoder)
    drops = needs.drops_units or needs.drops_any
    if drops and family.drop_layout == "none":
        return "takes whole images only", drops
    if needs.drops_any and family.drop_layout != "any":
        return "what is left of an image must form a dense map", needs.drops_any
    if needs.placeless and (reason := family.why_not_placeless(encoder)) is not None:
        return reason, needs.placeless
    if family.survey is None:
        return None
    try:
        found = family.survey_of(encoder, image_size, channels)
    except ValueError as error:
        return str(error), None
    if drops and found.undroppable is not None:
        return found.undroppable, drops
    if needs.replaces_tokens and found.unmaskable is not None:
        return found.unmaskable, needs.replaces_tokens
    if needs.token_map and found.grid is None:
        return "its features form no map", needs.token_map
    if needs.several_sizes and local_size is not None and local_size != found.image_size:
        height, width = found.image_size
        reason = family.why_not_size(encoder, found.image_size, channels, local_size)
        if reason is not None:
            return (
                f"takes crops of one size only, and {local_size[0]}x{local_size[1]} px is another than "
                f"{height}x{width} ({reason})"
            ), needs.several_sizes.format(h=height, w=width)
    return None


def check_encoder(config: Config) -> None:
    """Raise ConfigError where the encoder can't do what the method, the crops or the engine ask of it.

    What is known without building the encoder, `pretrain/config/combinations.py` has checked before.
    """
    encoder, method = config.encoder, config.method
    if encoder is None:
        return
    spec, size, local = spec_of(method), config.views.global_size, config.views.local_crops
    family, found = family_of(encoder), None
    name = f"encoder {family.label(encoder)}"
    if family.survey is not None:
        try:
            found = family.survey_of(encoder, size, config.data.channels)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    reason = why_not(encoder, spec.needs(method), size, None if local is None else local.size, config.data.channels)
    if reason is not None:
        raise ConfigError(f"{name} does not go with method {method.name}: {reason[0]}. {reason[1]}")
    teacher = config.views.teacher_crops
    if teacher is not None and spec.crops(method).teacher == "encoder":
        reason = why_not(encoder, spec.needs(method), size, teacher.size, config.data.channels)
        if reason is not None:
            raise ConfigError(f"{name} does not see views.teacher_crops: {reason[0]}. Set views.teacher_crops=null")
    for other in config.views.mixed_sizes:
        for shown in filter(None, (other.global_crops, other.local_crops)):
            reason = why_not(encoder, spec.needs(method), size, shown, config.data.channels)
            if reason is not None:
                raise ConfigError(f"{name} does not see views.mixed_sizes: {reason[0]}. Set views.mixed_sizes=[]")
    if found is None:
        return
    try:
        spec.check(config, Tokens(found.stride, found.patch))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not found.uniform:
        for switch in ("activation_checkpointing", "compile"):
            if getattr(config.engine, switch):
                raise ConfigError(
                    f"engine.{switch} works on an encoder's equal blocks, and {name} has none; "
                    f"set engine.{switch}=false"
                )
    if config.optim.layer_decay != 1 and not found.grouped:
        raise ConfigError(f"timm does not say how deep the parameters of {name} are; set optim.layer_decay=1")


def cell(encoder: EncoderConfig, method: str) -> str:
    """What the table says of one encoder and one method: it starts with yes, or is the reason why not."""
    needs = needs_of(method)
    reason = why_not(encoder, needs)
    if reason is not None:
        return reason[0].partition(": ")[0]
    if why_not(encoder, needs, local_size=LOCAL_CROP) is not None:
        return "yes, crops of one size"
    return "yes"


def table() -> str:
    """The table of all examples and methods, in markdown."""
    lines = [f"| encoder | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, encoder in EXAMPLES.items():
        cells = " | ".join(cell(encoder, method) for method in COLUMNS)
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join([*lines, *(f"\n{line}" for line in LEFT_OUT.values())])
