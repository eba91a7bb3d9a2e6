from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eval.report import Measured
from eval.scores import with_error
from launch.report.page import write_report
from launch.report.read import read_run
from launch.report.verdict import compare, verdict_of

from .conftest import results


def of(share: float, num_images: int) -> Measured:
    return Measured(share, math.sqrt(share * (1 - share) / num_images))


@pytest.mark.parametrize(
    ("ours", "theirs", "num_images", "kind", "words"),
    [
        (0.228, 0.247, 5000, "bad", "worse than untrained"),
        (0.228, 0.247, 500, "unsure", "no difference shown to untrained"),
        (0.228, 0.247, 2000, "unsure", "perhaps worse than untrained"),
        (0.247, 0.228, 2000, "unsure", "no difference shown to untrained"),
        (0.438, 0.304, 5000, "good", "better than untrained"),
        (0.3, 0.3, 5000, "unsure", "no difference shown to untrained"),
    ],
)
def test_a_difference_is_told_with_its_error(
    ours: float, theirs: float, num_images: int, kind: str, words: str
) -> None:
    found = compare("linear", of(ours, num_images), "untrained", of(theirs, num_images))
    assert (found.kind, found.words) == (kind, words)
    assert found.points == pytest.approx(100 * (ours - theirs))
    variance = ours * (1 - ours) / num_images + theirs * (1 - theirs) / num_images
    assert found.error == pytest.approx(100 * math.sqrt(variance))


def test_pretraining_that_made_it_worse_stands_first_and_is_red(make_run: Any) -> None:
    folder = make_run()
    (folder / "eval" / "probe-200.json").write_text(json.dumps(results(200, 0.15)))
    verdict = verdict_of(read_run(folder))
    assert verdict.kind == "bad"
    assert verdict.words == "Worse than untrained, worse than raw pixels, at step 200, on shards."
    page = write_report([folder]).read_text(encoding="utf-8")
    assert '<div class="verdict bad">' in page
    assert page.index('class="words">Worse than untrained') < page.index('class="tiles"')


def test_the_worse_of_two_measures_decides_and_is_named(make_run: Any) -> None:
    mixed = results(200, 0.5)
    mixed["rows"]["pretrained"]["linear"]["top1"] = 0.25
    folder = make_run()
    (folder / "eval" / "probe-200.json").write_text(json.dumps(mixed))
    verdict = verdict_of(read_run(folder))
    assert (verdict.kind, verdict.words) == (
        "bad",
        "Worse than untrained (by linear), better than raw pixels, at step 200, on shards.",
    )


def test_a_hint_of_a_loss_stands_before_no_difference_and_is_not_red(make_run: Any) -> None:
    mixed = results(200, 0.3)
    mixed["rows"]["pretrained"]["linear"]["top1"] = 0.28
    folder = make_run()
    (folder / "eval" / "probe-200.json").write_text(json.dumps(mixed))
    verdict = verdict_of(read_run(folder))
    assert verdict.kind == "unsure"
    assert verdict.words == "Perhaps worse than untrained (by linear), better than raw pixels, at step 200, on shards."
    assert '<div class="verdict unsure">' in write_report([folder]).read_text(encoding="utf-8")


@pytest.mark.parametrize(("share", "num_images"), [(0.3, 1000), (0.9, 100)])
def test_without_a_true_difference_at_most_one_page_in_ten_is_red(share: float, num_images: int) -> None:
    rng, num_pages = np.random.default_rng(0), 2000
    red = worse = 0
    for right in rng.binomial(num_images, share, (num_pages, 6)) / num_images:
        page = results(200, 0.0)
        rows = page["rows"]
        cells = [
            cell for row in (rows["pretrained"], *rows["untrained"], rows["pixels"])
            for cell in (row["linear"], next(iter(row["knn"].values()))["20"])
        ]  # fmt: skip
        for cell, top1 in zip(cells, right.tolist(), strict=True):
            cell |= with_error({"top1": top1}, num_images)
        verdict = verdict_of(SimpleNamespace(probes=[("probe-200.json", page)]))
        red += verdict.kind == "bad"
        worse += verdict.words.startswith("Worse")
    assert 0.04 * num_pages < red < 0.1 * num_pages
    assert worse < red


def test_a_run_without_a_probe_or_without_baselines_claims_nothing(make_run: Any) -> None:
    folder: Path = make_run(whole=False)
    assert verdict_of(read_run(folder)).kind == "unknown"
    assert "selfsight probe" in write_report([folder]).read_text()
    alone = results(200, 0.5)
    alone["rows"] |= {"untrained": [], "pixels": None}
    (folder / "eval").mkdir()
    (folder / "eval" / "probe.json").write_text(json.dumps(alone))
    assert verdict_of(read_run(folder)).comparisons == []
