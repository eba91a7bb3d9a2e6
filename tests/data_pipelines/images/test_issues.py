"""Names from strangers are told on one line, whole and unmistakable."""

from __future__ import annotations

import ast

import numpy as np
import pytest

from data_pipelines.images.issues import CASES, shown, table
from data_pipelines.images.magic import kind_of
from data_pipelines.images.tally import Tally


@pytest.mark.parametrize("name", ["a/b_1.jpg", "Grün 図 ñ.png", "spaces and 'quotes'"])
def test_a_name_that_can_be_read_is_told_as_it_is(name: str) -> None:
    assert shown(name) == name


@pytest.mark.parametrize(
    "name", ["\x1b[2Jx", "a\nb", "a\rb", "\x00", "\u202egpj.exe", "\u200b", "\x9b1m", "a\\nb", "\ue000", "\U000e0041"]
)
def test_what_cannot_be_printed_is_escaped_and_can_be_had_back(name: str) -> None:
    assert shown(name).isprintable()
    assert ast.literal_eval(f"'{shown(name)}'") == name


def test_random_bytes_as_names() -> None:
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        content = draw.bytes(6)
        told = shown(content.decode("utf-8", "surrogateescape"))
        assert told.isprintable()
        assert told.encode()  # no surrogates left
        seen.add(told)
    assert len(seen) == 500


def test_long_names_are_cut_and_say_so() -> None:
    assert shown("a" * 200) == "a" * 200
    assert shown("a" * 5000) == "a" * 200 + "... (5,000 letters)"


def test_the_table_has_every_case() -> None:
    assert table().count("\n| `") == len(CASES)


def test_tallies_add_up_whatever_the_parts() -> None:
    whole, parts = Tally(), [Tally() for _ in range(3)]
    for number in range(90):
        case = ("tiny", "cut_short")[number % 2]
        for tally in (whole, parts[number // 30]):
            tally.add(case, "shard", f"{number}", "reason")
    joined = Tally()
    for part in parts:
        joined.update(part)
    assert joined.report() == whole.report()
    assert joined.sentence("tiny").startswith("tiny (45): the first, 0 of shard: reason. ")


def test_kinds_are_told_from_few_bytes_and_nothing_from_none() -> None:
    assert kind_of(b"") is None
    assert kind_of(b"\xff") is None
    for content, name, is_image in ((b"GIF89a", "a GIF", True), (b"\n <HTML>", "a web page or XML", False)):
        kind = kind_of(content)
        assert kind is not None
        assert (kind.name, kind.is_image) == (name, is_image)
