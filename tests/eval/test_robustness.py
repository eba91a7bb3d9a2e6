"""Robustness: heads of clean features, tried on what the corruptions make of the images."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from data_pipelines.corruptions import CORRUPTIONS
from eval.base import Change, FeatureSet, Store
from eval.probes.robustness import SPEC, RobustnessSettings, run


def images(labels: Tensor, seed: int) -> Tensor:
    """(n, 3, 8, 8) uint8: an edge, upright or level, which turns into the other by a right angle."""
    made = torch.full((len(labels), 3, 8, 8), 60.0)
    for image, label in zip(made, labels.tolist(), strict=True):
        (image[:, :, :4] if label else image[:, :4]).add_(120)
    noise = torch.randint(-20, 21, made.shape, generator=torch.Generator().manual_seed(seed))
    return (made + noise).to(torch.uint8)


def features(given: Tensor, labels: Tensor, ids: Tensor) -> FeatureSet:
    flat = given.float().flatten(1) / 255 - 0.45
    return FeatureSet({"pixels": flat}, "pixels", labels, ids, ids)


@pytest.fixture
def store() -> Store:
    of_train, of_val = torch.arange(80) % 2, torch.arange(40) % 2
    seen, held_out = images(of_train, 0), images(of_val, 1)
    asked: list[int] = []

    def again(change: Change, of_train: bool, samples: Tensor | None = None) -> FeatureSet:
        assert samples is not None
        asked.append(len(samples))
        rows = samples - 100
        return features(change(held_out[rows], samples), of_val[rows], samples)

    again.asked = asked
    return Store(
        features(seen, of_train, torch.arange(80)), features(held_out, of_val, 100 + torch.arange(40)), 2, "pixels",
        again=again,
    )  # fmt: skip


def test_what_hurts_is_told_from_what_does_not(store: Store) -> None:
    settings = RobustnessSettings(images=16, strengths=(1, 4), rotations=(15, 90, 180))
    result = run(store, settings)
    assert store.again.asked == [16] * (2 * len(CORRUPTIONS) + 3)
    assert result["clean"]["ridge"]["value"] == result["clean"]["knn"]["value"] == 1
    turned = {degrees: each["ridge"]["value"] for degrees, each in result["rotation"].items()}
    assert turned["90"] < 0.7 < 0.9 < turned["15"]  # an upright edge is a level one then
    assert result["corruption"]["brightness"]["ridge"]["value"] > 0.9
    for head in ("ridge", "knn"):
        of_kind = [each[head]["value"] for each in result["corruption"].values()]
        assert result["mean"][head]["value"] == pytest.approx(sum(of_kind) / len(of_kind), abs=1e-6)
        by_strength = result["corruption"]["gaussian_noise"]["of_strength"]
        assert result["corruption"]["gaussian_noise"][head]["value"] == pytest.approx(
            (by_strength["1"][head] + by_strength["4"][head]) / 2
        )
    outcome = result["mean"]["ridge"]["outcome"]
    assert len(outcome.rows) == 16
    assert outcome.number() == pytest.approx(result["mean"]["ridge"]["value"], abs=1e-6)
    again = run(store, settings)
    assert torch.equal(again["mean"]["knn"]["outcome"].values, result["mean"]["knn"]["outcome"].values)
    columns = SPEC.columns(result, "pixels")
    assert [column.title for column in columns if not column.more] == ["clean", "corrupted"]
    assert len(columns) == 4 + len(CORRUPTIONS) + 3
    assert "16 of 40 held-out images" in SPEC.notes(result, settings)[0]


def test_all_of_val_with_full(store: Store) -> None:
    run(store, RobustnessSettings(full=True, images=3, strengths=(1,), rotations=(90,)))
    assert set(store.again.asked) == {40}


def test_it_needs_the_encoder_and_is_never_run_unasked() -> None:
    assert (SPEC.needs, SPEC.costly, SPEC.always) == ("encoder", True, False)
    assert partial(SPEC.takes)("grade")
    assert not SPEC.takes("number")
