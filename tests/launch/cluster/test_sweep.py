from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch.cluster.sweep import sweep_elements
from pretrain.config.load import ConfigError


def test_the_product_of_all_axes() -> None:
    found = sweep_elements("s", ["optim.lr=1e-3,5e-4", "seed=0,1"], None, [])
    assert [element.overrides for element in found] == [
        ("optim.lr=1e-3", "seed=0"),
        ("optim.lr=1e-3", "seed=1"),
        ("optim.lr=5e-4", "seed=0"),
        ("optim.lr=5e-4", "seed=1"),
    ]
    names = [element.name for element in found]
    assert names == ["s-lr-1e-3-seed-0", "s-lr-1e-3-seed-1", "s-lr-5e-4-seed-0", "s-lr-5e-4-seed-1"]


def test_lists_quotes_and_odd_values_stay_whole_and_names_are_names() -> None:
    values = "[0.9, 0.95],[0.9,0.999]"
    found = sweep_elements("s", [f"optim.betas={values}"], None, [])
    assert [element.overrides[0] for element in found] == ["optim.betas=[0.9, 0.95]", "optim.betas=[0.9,0.999]"]
    found = sweep_elements("s", ["description='a,b','$(x)','../../etc'"], None, [])
    assert [element.overrides[0] for element in found] == [
        "description='a,b'",
        "description='$(x)'",
        "description='../../etc'",
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", element.name) for element in found)


def test_names_are_unique_and_short_enough() -> None:
    found = sweep_elements("s", ["description=a b,a-b,a+b," + "x" * 400 + "," + "x" * 399], None, [])
    names = [element.name for element in found]
    assert len(set(names)) == 5
    assert max(map(len, names)) < 130
    both = sweep_elements("s", ["optim.eps=1", "method.eps=2"], None, [])
    assert both[0].name == "s-optim.eps-1-method.eps-2"


def test_a_file_lists_elements(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- {optim.lr: 1e-3, seed: 1}\n- {optim.lr: 0.1, optim.betas: [0.5, 0.9], engine.compile: true}\n")
    found = sweep_elements("s", ["train.epochs=1"], file, [])
    assert [element.overrides for element in found] == [
        ("train.epochs=1", "optim.lr=1e-3", "seed=1"),
        ("train.epochs=1", "optim.lr=0.1", "optim.betas=[0.5, 0.9]", "engine.compile=true"),
    ]


@pytest.mark.parametrize(
    ("arrays", "overrides", "message"),
    [
        (["seed"], [], "no list of values"),
        (["seed=1,,2"], [], "no list of values"),
        (["seed="], [], "no list of values"),
        (["=1"], [], "no list of values"),
        (["name=a,b"], [], "name can't be swept"),
        (["seed=1,2"], ["seed=3"], "seed is set twice"),
        (["seed=1,2", "seed=3"], [], "seed is set twice"),
        (["seed=1,1"], [], "has an element twice: seed=1"),
    ],
)
def test_what_is_no_sweep_is_refused(arrays: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_elements("s", arrays, None, overrides)


@pytest.mark.parametrize("text", ["a: 1", "[]", "- 3", "- {}", "- {a: ["])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "list.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"no list of elements|is not YAML"):
        sweep_elements("s", [], file, [])
