"""The methods there are: a folder here each, and those that installed distributions add (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field, TypeAdapter

from pretrain.methods.spec import MethodSpec
from pretrain.plugins import registered

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config
    from pretrain.engines.schedules import Timeline
    from pretrain.methods.base import Method, Normalisation

GROUP = "selfsight.methods"


#: All methods by name, and of plug-ins that can't be used, why.
METHODS, LEFT_OUT = registered("pretrain.methods", GROUP, MethodSpec)


class MethodSection(Protocol):
    """The section of some method."""

    @property
    def name(self) -> str: ...


if TYPE_CHECKING:
    MethodConfig = Any
else:
    MethodConfig = Annotated[reduce(or_, (spec.config for spec in METHODS.values())), Field(discriminator="name")]


def spec_of(section: MethodSection) -> MethodSpec:
    """What is known of the method that a section names."""
    return METHODS[section.name]


def example_of(name: str, **changes: Any) -> Any:
    """The smallest section of a method, checked."""
    spec = METHODS[name]
    return TypeAdapter(spec.config).validate_python({"name": name, **spec.example, **changes})


def exporting(what: str) -> list[str]:
    """The names of the methods that leave `what`: an encoder, or a tokenizer."""
    return [name for name, spec in METHODS.items() if spec.exports == what]


def build_method(config: Config, normalisation: Normalisation, timeline: Timeline) -> Method:
    """The method that `config` names around the encoder that it names, freshly initialised from torch's generator."""
    from pretrain.continuing.parts import choose_parts

    method = spec_of(config.method).call("build", config, normalisation, timeline)
    choose_parts(method, config)
    return method


def draw_fields_for(config: Config) -> DrawFields | None:
    """What draws the fields that the method asks for of a row of its batches, masks for example; other processes can
    make it too."""
    from data_pipelines.rng import NamedDraw

    spec, size = spec_of(config.method), config.views.global_size
    if config.views.native:
        if spec.draw_native(config.method, config.train.batch_size) is None:
            return None
        section = TypeAdapter(spec.config).dump_python(config.method, mode="json")
        given = {"method": section, "batch_size": config.train.batch_size}
        return NamedDraw("pretrain.methods.registry:native_fields_of", given)
    stride, batch_size = getattr(config.encoder, "stride", None), config.train.batch_size
    if spec.draw(config.method, size, stride, batch_size) is None:
        return None
    section = TypeAdapter(spec.config).dump_python(config.method, mode="json")
    given = {"method": section, "size": list(size), "stride": stride, "batch_size": batch_size}
    return NamedDraw("pretrain.methods.registry:draw_fields_of", given)


def draw_fields_of(given: Mapping[str, Any]) -> DrawFields | None:
    """What `draw_fields_for` found, from what JSON can say of it."""
    spec = METHODS[given["method"]["name"]]
    section = TypeAdapter(spec.config).validate_python(given["method"])
    return spec.draw(section, tuple(given["size"]), given["stride"], given["batch_size"])


def native_fields_of(given: Mapping[str, Any]) -> DrawFields | None:
    """What `draw_fields_for` found for crops of their own shape."""
    spec = METHODS[given["method"]["name"]]
    return spec.draw_native(TypeAdapter(spec.config).validate_python(given["method"]), given["batch_size"])
