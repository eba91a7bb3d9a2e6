"""The families of encoders: a folder here each, and those that installed distributions add (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from pretrain.encoder_folder import TIMM_PREFIX
from pretrain.encoders.spec import EncoderSpec
from pretrain.plugins import registered

if TYPE_CHECKING:
    from pretrain.encoders.base import Encoder

GROUP = "selfsight.encoders"


#: All families by name, and of plug-ins that can't be used, why.
FAMILIES, LEFT_OUT = registered("pretrain.encoders", GROUP, EncoderSpec)


def expand_encoder(value: object) -> object:
    """The section that `timm:NAME` is short for; other values as they are. ValueError for a family that is broken."""
    if isinstance(value, str) and value.startswith(TIMM_PREFIX):
        return {"family": "timm", "model": value.removeprefix(TIMM_PREFIX)}
    family = value.get("family") if isinstance(value, Mapping) else None
    if isinstance(family, str) and family in LEFT_OUT and family not in FAMILIES:
        raise ValueError(LEFT_OUT[family])
    return value


if TYPE_CHECKING:
    EncoderConfig = Any  # which families there are is known when it runs
else:
    EncoderConfig = Annotated[
        Union[tuple(spec.config for spec in FAMILIES.values())],  # noqa: UP007
        Field(discriminator="family"),
        BeforeValidator(expand_encoder),
    ]


def family_of(config: EncoderConfig) -> EncoderSpec:
    """What is known of the family that a section `encoder:` names."""
    return FAMILIES[config.family]


def build_encoder(
    config: EncoderConfig,
    image_size: tuple[int, int],
    channels: int = 3,
    mask_token: bool = False,
    frames: int = 1,
) -> Encoder:
    """A freshly initialised encoder (from torch's global generator) for images of `image_size` (h, w) px.

    `mask_token` adds the learned token that stands in for replaced units. With `spatial_transformer` in its
    configuration, whatever its family, it sees images through one. With `frames` beyond 1 it takes stacks of so many,
    of `channels` each: a family that has a setting of that name as it does, any other frame by frame.
    """
    encoder: Encoder = resolve_name(family_of(config).build)(config, image_size, channels, mask_token)
    if getattr(config, "spatial_transformer", None) is not None:
        resolve_name("pretrain.encoders.spatial_transformer:put_in_front")(encoder, config, channels)
    if frames > 1 and not hasattr(config, "frames"):
        return resolve_name("pretrain.encoders.per_frame:per_frame")(encoder, channels)  # type: ignore[no-any-return]
    return encoder
