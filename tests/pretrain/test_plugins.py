from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest

from pretrain import plugins
from pretrain.config import load
from pretrain.config.load import ConfigError, load_config


class Plain:
    """What pydantic can make no schema of."""


@dataclass(frozen=True)
class Spec:
    name: str
    config: type = field(default_factory=lambda: make_dataclass("Section", [("size", int)]))


@dataclass(frozen=True)
class Distribution:
    name: str


@dataclass(frozen=True)
class Point:
    name: str
    dist: Distribution
    spec: Any
    value: str = "somewhere:SPEC"

    def load(self) -> Any:
        return self.spec


def loaded(monkeypatch: pytest.MonkeyPatch, *points: Point) -> tuple[dict[str, Spec], dict[str, str]]:
    monkeypatch.setattr(plugins, "entry_points", lambda group: list(points))
    return plugins.load_plugins("some.group", Spec, {"ours"})


def test_of_two_of_one_name_neither_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (Point("rot", Distribution(whose), Spec("rot")) for whose in ("aa", "bb"))
    other = Point("jigsaw", Distribution("aa"), Spec("jigsaw"))
    for order in ((one, two, other), (other, two, one)):
        found, left_out = loaded(monkeypatch, *order)
        assert found.keys() == {"jigsaw"}
        assert "uninstall all but one" in left_out["rot"]


def test_a_section_without_a_schema_is_that_plug_ins_trouble_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = make_dataclass("Odd", [("thing", Plain)])
    found, left_out = loaded(
        monkeypatch, Point("odd", Distribution("aa"), Spec("odd", odd)), Point("b", Distribution("bb"), Spec("b"))
    )
    assert found.keys() == {"b"}
    assert "'odd' of aa is left out: PydanticSchemaGenerationError" in left_out["odd"]


def test_our_own_of_a_name_that_a_plug_in_wants_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found, left_out = loaded(monkeypatch, Point("ours", Distribution("aa"), Spec("ours")))
    assert (found, left_out.keys()) == ({}, {"ours"})
    monkeypatch.setattr(load, "LEFT_OUT", {"mae": "'mae' of aa is left out", "rot": "'rot' of bb is left out"})
    assert load_config("mae_vit_cifar_cpu", ["data.train=x"]).method.name == "mae"
    with pytest.raises(ConfigError, match="'rot' of bb is left out"):
        load_config("mae_vit_cifar_cpu", ["data.train=x", "method.name=rot"])
