"""The data of online k-NN."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval import label_free
from eval.base import FeatureSet, Store
from eval.probes import few_shot
from pretrain.config.diagnostics import DiagnosticsConfig
from pretrain.diagnostics import watch
from pretrain.diagnostics.alarms import Alarms
from pretrain.diagnostics.knn import OnlineKnn, open_data
from pretrain.diagnostics.online import measured
from pretrain.diagnostics.watch import Diagnostics


def test_one_rank_decides_whether_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is collective, and a node may not see the files of another yet: ranks that differed would hang."""
    for first, other in (((None, "off"), ("shards", "on")), (("shards", "on"), (None, "off"))):
        here = object.__new__(Diagnostics)  # a rank that has found something else than the first
        here.folder, here.rank, here.device = tmp_path, 1, torch.device("cpu")
        here.alarms = Alarms([])
        here.knn = object.__new__(OnlineKnn)
        here.knn.found, here.knn.settings = other, DiagnosticsConfig()
        told = {"host": "a", "skipped": [], "knn": first}
        monkeypatch.setattr(watch, "all_gather_objects", lambda mine, device, told=told: [told, mine])
        assert here.begin(0) == first[1]
        assert here.knn.is_on == (first[0] is not None)


def test_labels_of_any_range_are_few_classes(tmp_path: Path) -> None:
    """The votes are a table of queries by classes: labels near 900,000 must not make it that wide."""
    with tarfile.open(tmp_path / "val-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(40):
            png = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("cls", str(900_000 + 5 * (number % 2)).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    assert open_data(str(tmp_path), 20, 20).classes.tolist() == [900_000, 900_005]


def test_what_is_measured_beside_it_is_what_the_probes_say() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    features = torch.randn(4, 24, generator=generator)[labels] + torch.randn(120, 24, generator=generator)
    given = features[:80], labels[:80], features[80:], labels[80:]
    found = measured(("few_shot", "rankme", "alpha_req", "uniformity"), *given)
    number = torch.arange(80)
    train, val = (
        FeatureSet({"mean": part}, "mean", its, number[: len(part)], number[: len(part)])
        for part, its in (given[:2], given[2:])
    )
    few = few_shot.run(Store(train, val, 4, "mean"), few_shot.FewShotSettings(shots=(5,)))
    assert found["few_shot_5"] == few["mean"]["5"]["top1"] > 0.3
    assert found["few_shot_5_standard_error"] == few["mean"]["5"]["standard_error"]
    assert found["held_out_rankme"] == label_free.rankme(features[:80])["value"]
    assert set(found) == {
        "few_shot_5", "few_shot_5_standard_error", "held_out_rankme", "held_out_alpha_req", "held_out_uniformity",
    }  # fmt: skip
    assert measured((), *given) == {}
    features[3, 3] = float("nan")
    assert measured(("rankme",), *given) == {}


def test_a_node_with_another_copy_of_the_data_turns_it_off_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    knn = object.__new__(OnlineKnn)
    knn.found, knn.device = ("shards", "on"), torch.device("cpu")
    for theirs, fails in (("a", False), ("b", True)):
        knn._data = SimpleNamespace(digest="a")
        monkeypatch.setattr(
            "pretrain.diagnostics.knn.all_gather_objects", lambda mine, device, told=theirs: [told, mine]
        )
        assert bool(knn._differs()) == fails


def test_groups_that_vote_are_not_classified(tmp_path: Path) -> None:
    """Images of a patient look alike: those that the data were packed by stay together."""
    with tarfile.open(tmp_path / "val-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(60):
            png = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(png, "PNG")
            known = json.dumps({"slide": f"s{number // 5}"}).encode()
            for suffix, content in (("png", png.getvalue()), ("cls", str(number % 2).encode()), ("json", known)):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    plain = open_data(str(tmp_path), 30, 15)
    assert len(np.intersect1d(plain.bank // 5, plain.queries // 5))
    (tmp_path / "dataset.json").write_text(json.dumps({"groups": {"key": "slide"}}))
    found = open_data(str(tmp_path), 30, 15)
    assert not len(np.intersect1d(found.bank // 5, found.queries // 5))
    assert (len(found.bank), len(found.queries)) == (30, 15)
