"""Pictures of masks: which images are shown, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from patchwork import blocks, features, store
from PIL import Image

from data_pipelines.checks.map_pictures import colour_of
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.packing.write import pack
from eval.base import IGNORED, Painted
from eval.mask_pictures import _legend, mean_ious, told_classes, worst_and_middle, write_sheets
from eval.probes.segmentation import SegmentationSettings, notes, run

FEW = SegmentationSettings(patches=800, bank=200, strengths=(1e-2,), ks=(3,))


def test_the_iou_of_an_image_is_the_mean_over_what_is_there_or_was_said() -> None:
    counts = torch.tensor([[[3, 4], [0, 2], [0, 0]], [[0, 0], [0, 0], [0, 0]]])
    found = mean_ious(counts)
    assert found[0] == pytest.approx((0.75 + 0) / 2)
    assert found[1].isnan()


def test_the_worst_then_the_middle_are_shown() -> None:
    ious = torch.tensor([0.5, 0.1, float("nan"), 0.9, 0.2, 0.6, 0.3, 0.8])
    assert worst_and_middle(ious, each=1).tolist() == [1, 0]
    assert worst_and_middle(ious, each=2).tolist() == [1, 4, 6, 0]
    assert worst_and_middle(ious, each=4).tolist() == [1, 4, 6, 0, 5, 7, 3]


def test_the_probe_shows_true_and_predicted_masks_in_the_levels_of_the_data() -> None:
    (train, train_masks), (val, val_masks) = (blocks(n, 4, 4, 3, 6, 0.0, seed=n) for n in (40, 20))
    val_masks[:, :2] = IGNORED
    val.values[7] = 0.0  # of which nothing can be told
    taken: dict[str, Painted] = {}
    given = store(
        features(train, train_masks * 10), features(val, torch.where(val_masks < 0, val_masks, val_masks * 10))
    )
    result = run(replace(given, show=taken.__setitem__, mask_names={0: "paper", 10: "one"}), FEW)
    painted = taken["segmentation"]
    assert painted.rows[0] == 7
    assert list(painted.maps) == ["true", "linear", "knn"]
    assert torch.equal(painted.maps["true"][0][2:], val_masks[7][2:] * 10)
    assert set(torch.cat(painted.maps["linear"]).unique().tolist()) <= {0, 10, 20}
    for row, words in enumerate(painted.words["linear"]):
        true, said = painted.maps["true"][row][2:], painted.maps["linear"][row][2:]
        ious = [
            float(((true == level) & (said == level)).sum() / ((true == level) | (said == level)).sum())
            for level in sorted({*true.unique().tolist(), *said.unique().tolist()})
        ]
        assert words == f"linear: mIoU {100 * sum(ious) / len(ious):.1f}"
    assert {"paper", "one", "20"} >= set(painted.words["true"][0].split(", "))
    assert result["names"] == {"0": "paper", "10": "one"}
    line = next(line for line in notes(result, FEW) if "IoU of the classes" in line)
    assert {"paper:", "one:", "20:"} <= set(line.split())


def test_classes_are_told_by_name_the_worst_first() -> None:
    assert told_classes({"0": 0.9, "2": None, "5": 0.25}, {"5": "cat"}) == ["cat: 25.0", "0: 90.0"]


def test_a_small_picture_lies_beside_the_result_and_among_those_of_the_run(tmp_path: Path) -> None:
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    pack(tmp_path / "in", tmp_path / "out", progress=False)
    said = torch.tensor([[0, 3], [IGNORED, 9]]).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(2, 16, 16)
    painted = Painted(torch.tensor([2, 0]), {"true": said, "linear": said}, {"true": ["a", "b"], "linear": ["c", "d"]})
    target: Any = SimpleNamespace(image_size=16, channels=3, bits=8, native=False, run=tmp_path / "run", step=7)
    target.run.mkdir()
    dataset = open_dataset(tmp_path / "out")
    found = write_sheets({"segmentation": painted}, dataset, torch.arange(3), target, tmp_path / "probe-7-ab.json")
    assert found == [tmp_path / "run" / "pictures" / "segmentation-00000007.png"]
    with Image.open(tmp_path / "probe-7-ab.segmentation.png") as picture:
        assert picture.width > 3 * 112
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert found[0].read_bytes() == (tmp_path / "probe-7-ab.segmentation.png").read_bytes()
    assert len(np.unique(colours, axis=0)) > 20


def test_a_legend_says_which_colour_is_which_class() -> None:
    """Of what is shown: neither the background nor what is not judged has a colour."""
    painted = Painted(
        torch.tensor([0]), {"true": [torch.tensor([[0, 3], [-1, 3]])], "knn": [torch.tensor([[7, 0]])]}, {}
    )
    ((tree, other),) = _legend(painted, {3: "tree"}, 4)
    assert (tree.caption, other.caption) == (("tree",), ("7",))
    assert tree.image.getpixel((0, 0)) == colour_of(3)
