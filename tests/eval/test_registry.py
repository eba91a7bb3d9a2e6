"""The seam of probes: what is there, and what other distributions add; the example of eval/README.md, end to end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from eval import registry
from eval.base import FeatureSet, ProbeSpec, Store
from eval.protocol import Protocol, described, score
from eval.report import score_of

README = Path(registry.__file__).with_name("README.md")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(name, value, code): a distribution `extra` of version 1.2 that registers a probe, on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.plug_ins.cache_clear()

    def add(name: str, value: str, code: str | None = None, distribution: str = "extra") -> None:
        folder = tmp_path / f"{distribution}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {value}\n")
        if code is not None:
            (tmp_path / f"{value.partition(':')[0]}.py").write_text(code)

    yield add
    registry.plug_ins.cache_clear()
    for module in [m for m, found in sys.modules.items() if str(tmp_path) in str(getattr(found, "__file__", ""))]:
        del sys.modules[module]


def blobs(num: int, seed: int) -> FeatureSet:
    import torch

    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    features = torch.eye(3)[labels] * 4 + torch.randn(num, 3, generator=generator)
    return FeatureSet({"class": features}, "class", labels, torch.arange(num), torch.arange(num) + 1000 * seed)


def test_every_built_in_probe_keeps_the_seams_promises() -> None:
    """Also the test of the next one: its file is all that it needs."""
    assert [spec.name for spec in registry.chosen()] == ["knn", "linear"]
    specs = [spec for spec in map(registry.load, registry.built_in()) if spec.needs == "pooled" and spec.takes("class")]
    store = Store(blobs(90, 0), blobs(60, 1), 3, "class", (0, 1), class_names=("one", "two", "three"))
    protocol = Protocol.of([spec.name for spec in specs], (0, 1), {"epochs": 2})
    scores, outcomes = score(store, protocol)
    columns, notes = described(scores, protocol)
    assert {column["probe"] for column in columns} == {spec.name for spec in specs}
    assert {outcome.partition("/")[0] for outcome in outcomes} <= {spec.name for spec in specs}
    for column in columns:
        found = score_of(scores, column)
        assert found is not None, column
        assert found["interval"][0] <= found[column["key"]] <= found["interval"][1]
        assert found["standard_error"] >= 0
        assert score_of(scores, {**column, "paths": [["nowhere"]]}) is None
    assert len({column["name"] for column in columns}) == len(columns)
    assert len(notes) >= 3


def test_the_readmes_example_is_a_probe(install, monkeypatch) -> None:
    pytest.importorskip("torch")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    install("nearest_mean", "nearest_mean_probe:SPEC", code)
    assert registry.names()[-1] == "nearest_mean"
    assert registry.problems() == []
    protocol = Protocol.of(("nearest_mean",), (0,), {"epochs": 1})
    assert protocol.as_json()["plug_ins"] == {"nearest_mean": "extra 1.2"}
    scores, _ = score(Store(blobs(90, 0), blobs(60, 1), 3, "class"), protocol)
    assert scores["nearest_mean"]["top1"] > 0.9
    columns, _ = described(scores, protocol)
    assert columns[-1]["title"] == "nearest mean"


@pytest.mark.parametrize(
    ("name", "value", "code", "message"),
    [
        (
            "broken",
            "broken_probe:SPEC",
            "1 / 0",
            r"broken of extra 1\.2 can't be imported: ZeroDivisionError",
        ),
        ("absent", "absent_probe:SPEC", None, r"absent of extra 1\.2 can't be imported: ModuleNotFoundError"),
        ("none", "none_probe:SPEC", "SPEC = 3", r"none_probe:SPEC of extra 1\.2 is 3, not a ProbeSpec named 'none'"),
        ("a-b", "ab_probe:SPEC", "", r"extra 1\.2 registers a probe 'a-b', which can't be its name"),
        ("dim", "dim_probe:SPEC", "", r"extra 1\.2 registers a probe 'dim', which can't be its name"),
    ],
)
def test_a_broken_plug_in_is_refused_with_its_name(install, name, value, code, message) -> None:
    install(name, value, code)
    with pytest.raises(ValueError, match=message):
        registry.load(name)
    assert [spec.name for spec in registry.chosen()] == ["knn", "linear"]  # the others go on


def test_a_name_that_is_taken_is_left_out_and_said(install) -> None:
    install("knn", "knn_probe:SPEC", "SPEC = 3")
    assert registry.names() == registry.built_in()
    assert registry.load("knn").always
    (line,) = registry.problems()
    assert line.startswith("extra 1.2 registers a probe knn, but that name is taken")


def test_two_distributions_of_one_name_are_both_refused(install) -> None:
    install("twice", "twice_probe:SPEC", "SPEC = 3")
    install("twice", "twice_probe:SPEC", distribution="other")
    with pytest.raises(ValueError, match=r"(extra|other) 1\.2, (extra|other) 1\.2 register a probe twice each"):
        registry.load("twice")


def test_what_fails_while_it_runs_is_named(install) -> None:
    code = (
        "from eval.base import NoSettings, ProbeSpec\n"
        "def run(store, settings): raise KeyError('oh')\n"
        "SPEC = ProbeSpec('late', run, lambda result, headline: [], NoSettings)\n"
    )
    install("late", "late_probe:SPEC", code)
    protocol = Protocol.of(("late",), (0,), {"epochs": 1})
    with pytest.raises(ValueError, match=r"the probe late of extra 1\.2 failed: KeyError\('oh'\)"):
        score(Store(blobs(30, 0), blobs(30, 1), 3, "class"), protocol)


def test_a_probe_of_other_labels_is_refused_with_those_that_take_them() -> None:
    assert all(spec.takes("number") for spec in registry.chosen(kind="number"))
    with pytest.raises(
        ValueError, match="the probe knn is of labels of kind class or grade, and these are of kind number"
    ):
        registry.chosen(("knn",), kind="number")


def test_only_those_asked_for() -> None:
    assert [spec.name for spec in registry.chosen(only=("logistic",))] == ["logistic"]
    assert [spec.name for spec in registry.chosen(only=("logistic",), also=("knn",))] == ["logistic", "knn"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_features_that_are_not_finite_are_counted_and_named(split: str) -> None:
    store = Store(blobs(90, 0), blobs(60, 1), 3, "class")
    getattr(store, split).inputs["class"][7, 1] = float("nan")
    with pytest.raises(ValueError, match=rf"the feature class of 1 of \d+ {split} images is not finite, first that of"):
        score(store, Protocol.of((), (0,), {"epochs": 1}))


def test_a_name_that_is_not_there_says_which_are() -> None:
    with pytest.raises(ValueError, match=r"no probe 'logstic'; there are .*knn, .*linear, logistic"):
        registry.load("logstic")
    assert isinstance(registry.load("logistic"), ProbeSpec)
