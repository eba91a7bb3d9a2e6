"""The built-in data set: reproducible, its splits disjoint, its classes not in the raw pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from data_pipelines.demo import MASK_NAMES, build_demo
from data_pipelines.demo_captions import NUMERALS, scene_captions
from data_pipelines.packing.mask_names import read_mask_names
from data_pipelines.scenes import WALL, build_scenes
from data_pipelines.shapes import SHAPES, build_shapes


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("demo"), seed=3, train=800, val=200)


def entries(demo: Path) -> tuple[list[dict], list[dict]]:
    found = json.loads((demo / "manifest.json").read_text())["images"]
    return tuple([entry for entry in found if entry["path"].startswith(split)] for split in ("train/", "val/"))


def test_the_files_are_those_of_the_manifest(demo: Path) -> None:
    train, val = entries(demo)
    assert (len(train), len(val)) == (800, 200)
    assert {path.relative_to(demo).as_posix() for path in demo.rglob("*.jpg")} == {e["path"] for e in train + val}
    labels = load_digits().target
    assert all(int(entry["path"].split("/")[1]) == labels[digit] for entry in train + val for digit in entry["digits"])
    with Image.open(demo / train[0]["path"]) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_train_and_val_share_no_digit_and_no_pixel(demo: Path) -> None:
    train, val = entries(demo)
    assert not {d for entry in train for d in entry["digits"]} & {d for entry in val for d in entry["digits"]}
    assert max(entry["box"][2] for entry in train) <= min(entry["box"][0] for entry in val)


def test_the_seed_decides(demo: Path, tmp_path: Path) -> None:
    again = build_demo(tmp_path / "again", seed=3, train=20, val=5)
    other = build_demo(tmp_path / "other", seed=4, train=20, val=5)
    paths = [path.relative_to(again) for path in again.rglob("*.jpg")]
    assert all((again / path).read_bytes() == (demo / path).read_bytes() for path in paths)
    assert {path.relative_to(other) for path in other.rglob("*.jpg")} != set(paths)


def test_the_levels_of_its_masks_have_names_for_pack(demo: Path) -> None:
    names = read_mask_names(demo / MASK_NAMES)
    assert (names["0"], names["1"], names["8"], len(names)) == ("paper", "zero", "seven", 11)


def test_done_is_done_and_another_is_refused(demo: Path) -> None:
    before = (demo / "manifest.json").stat().st_mtime_ns
    assert build_demo(demo, seed=3, train=800, val=200) == demo
    assert (demo / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="'seed': 3"):
        build_demo(demo, seed=5, train=800, val=200)


def test_what_is_drawn_stays_what_it_was(demo: Path) -> None:
    """The figures of the README are of these draws: masks and boxes were added to them."""
    drawn = json.loads((demo / "manifest.json").read_text())["images"]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == "b9e0b79f283f015e"


def test_a_scene_is_called_by_what_is_often_and_what_is_seldom() -> None:
    assert scene_captions([3, 8, 3, 3], 1) == (
        "three threes and an eight on flowers",
        "mostly threes and also an eight",
    )
    assert scene_captions([6, 6, 6, 1, 1], 0)[0] == "three sixes and two ones on a temple"


def facts_of(folder: Path, path: str) -> tuple[dict, np.ndarray, np.ndarray]:
    stem = (folder / path).with_suffix("")
    pixels = np.asarray(Image.open(folder / path), dtype=np.float32)
    return json.loads(stem.with_suffix(".json").read_text()), np.asarray(Image.open(f"{stem}.mask.png")), pixels


def check_facts(facts: dict, mask: np.ndarray, pixels: np.ndarray) -> None:
    assert facts["count"] == len(facts["boxes"])
    assert (
        {box[4] for box in facts["boxes"]} == {int(label) + 1 for label in facts["labels"]} == {*np.unique(mask)} - {0}
    )
    inside, margin = np.zeros(mask.shape, dtype=bool), round(mask.shape[0] / 32)
    for left, top, right, bottom, _ in facts["boxes"]:
        assert 0 <= left < right <= mask.shape[1]
        assert 0 <= top < bottom <= mask.shape[0]
        inside[max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = True
    assert inside[mask > 0].all()
    assert pixels[mask > 0].mean() < pixels[mask == 0].mean() - 20  # ink is dark


def test_masks_boxes_and_counts_are_of_the_digits(demo: Path) -> None:
    for entry in entries(demo)[0][:20]:
        facts, mask, pixels = facts_of(demo, entry["path"])
        check_facts(facts, mask, pixels)
        assert facts["count"] == len(entry["digits"]) == facts["grade"] + 12


def test_captions_say_what_is_there_and_change_no_image(demo: Path) -> None:
    for entry in entries(demo)[0][:20]:
        label = int(entry["path"].split("/")[1])
        first, second, third = (demo / entry["path"]).with_suffix(".txt").read_text().splitlines()
        assert NUMERALS[label] in first
        assert NUMERALS[label] in second
        assert NUMERALS[label] in third
        assert ("flowers" in first) == (entry["photo"] == 1) == ("flowers" in second)
    pixels = hashlib.sha256(b"".join((demo / entry["path"]).read_bytes() for entry in entries(demo)[1]))
    assert len({(demo / entry["path"]).with_suffix(".txt").read_text() for entry in entries(demo)[1]}) > 60
    assert pixels.hexdigest()[:16] == "c1924c2e8406259b"


def test_scenes_have_two_numerals_near_and_far(tmp_path: Path) -> None:
    folder = build_scenes(tmp_path, seed=1, train=15, val=5, side=80)
    assert build_scenes(tmp_path, seed=1, train=15, val=5, side=80) == folder
    sizes: dict[int, list[int]] = {}
    train, val = entries(folder)
    for entry in train + val:
        facts, mask, pixels = facts_of(folder, entry["path"])
        check_facts(facts, mask, pixels)
        assert pixels.shape == (80, 80, 3)
        depth = np.asarray(Image.open(folder / entry["path"].replace(".jpg", ".depth.png")))
        assert (mask[depth < WALL] > 0).all()
        assert len(facts["labels"]) == 2
        numerals = [box[4] - 1 for box in facts["boxes"]]
        assert numerals.count(int(entry["path"].split("/")[1])) > len(numerals) / 2
        for left, top, right, bottom, _ in facts["boxes"]:
            within = depth[top:bottom, left:right]
            sizes.setdefault(int(within[within < WALL].min()) // 700, []).append(bottom - top)
    assert np.mean(sizes[1]) > np.mean(sizes[3]) + 5
    with pytest.raises(ValueError, match="side is 8 px"):
        build_scenes(tmp_path / "small", side=8)


def test_raw_pixels_know_little(demo: Path) -> None:
    """Cosine k-NN on centred pixels: far from what the digits alone would give (98 %)."""

    def load(split: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.stack([np.asarray(Image.open(demo / entry["path"]), dtype=np.float32).ravel() for entry in split])
        return pixels, np.array([int(entry["path"].split("/")[1]) for entry in split])

    (train, train_labels), (val, val_labels) = (load(split) for split in entries(demo))
    mean = train.mean(axis=0)
    train, val = (x - mean for x in (train, val))
    train, val = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, val))
    similarity = val @ train.T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    votes = np.zeros((len(val), 10))
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.07)
    for row, (labels, weight) in enumerate(zip(train_labels[nearest], weights, strict=True)):
        np.add.at(votes[row], labels, weight)
    assert (votes.argmax(axis=1) == val_labels).mean() < 0.25


def test_sheets_of_several_shapes(tmp_path: Path) -> None:
    made = build_shapes(tmp_path / "shapes", seed=3, train=30, val=10)
    again = build_shapes(tmp_path / "again", seed=3, train=6, val=10)
    sizes = set()
    for path in made.rglob("*.jpg"):
        with Image.open(path) as image:
            sizes.add(image.size)
        facts = json.loads(path.with_suffix(".json").read_text())
        assert facts["labels"] == [path.parent.name]
        assert 12 <= facts["count"] <= 16
    assert sizes == {(16 * columns, 16 * rows) for rows, columns in SHAPES}
    train, val = entries(made)
    assert not {d for entry in train for d in entry["digits"]} & {d for entry in val for d in entry["digits"]}
    for path in again.rglob("*.jpg"):
        assert path.read_bytes() == (made / path.relative_to(again)).read_bytes()
