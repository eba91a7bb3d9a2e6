from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from making import encode, picture, write_tar
from PIL import Image

from data_pipelines.checks.contact_sheet import LINE, Display, Tile, fitted, grid
from data_pipelines.checks.show import Statistics, balanced, measure, samples_sheet, statistics_figure, summary
from data_pipelines.datasets.dataset import NO_LABEL, Dataset


@pytest.fixture
def mixed(tmp_path: Path) -> Dataset:
    """Three sizes, two classes and a sample without one; and a file that is none."""
    files = []
    for number in range(12):
        height, width = ((20, 30), (40, 40), (90, 20))[number % 3]
        files += [(f"{number:03d}.png", encode(picture(number, height, width)))]
        files += [(f"{number:03d}.cls", b"0" if number < 9 else b"1")]
    files += [("wide.jpg", encode(picture(50, 16, 64), "JPEG")), ("junk.png", b"not an image")]
    return Dataset([write_tar(tmp_path / "train-000000.tar", files)], {"classes": ["cat", "dog"]})


def test_statistics_are_those_of_the_images(mixed: Dataset) -> None:
    found = measure(mixed, progress=False)
    sizes = Counter(zip(found.widths.tolist(), found.heights.tolist(), strict=True))
    assert sizes == {(30, 20): 4, (40, 40): 4, (20, 90): 4, (64, 16): 1}
    assert (found.num_samples, found.num_unreadable) == (14, 1)
    assert found.class_counts == {0: 9, 1: 3, NO_LABEL: 2}
    assert found.num_bytes.tolist()[:2] == [len(mixed.read(number).image) for number in range(2)]


def test_of_many_images_some_are_drawn_by_the_seed(mixed: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.checks.show.MAX_HEADERS", 5)
    runs = [measure(mixed, seed, progress=False) for seed in (0, 0, 1)]
    assert all(len(found.widths) + found.num_unreadable == 5 for found in runs)
    bytes_of = [found.num_bytes.tolist() for found in runs]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]
    assert sum(runs[0].class_counts.values()) == 14  # the index has them all


def test_the_summary_names_what_stands_out(mixed: Dataset) -> None:
    text = summary(measure(mixed, progress=False))
    for part in (
        "14 samples in 1 shard",
        "width: 20 to 64",
        "2, from 3 (dog) to 9 (cat)",
        "label: 2",
        "unreadable: 1",
    ):
        assert part in text


def test_every_class_has_its_share() -> None:
    labels = np.repeat([0, 1, 2, NO_LABEL], [1000, 50, 3, 10])
    chosen = balanced(labels, 40, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 40
    counts = Counter(labels[chosen].tolist())
    assert counts[2] == 3
    assert {counts[0], counts[1], 37 - counts[0] - counts[1]} <= {10, 12, 13, 14}
    assert sorted(balanced(labels, 5000, np.random.default_rng(0)).tolist()) == list(range(len(labels)))


def test_letters_beyond_ascii_are_drawn() -> None:
    picture = Image.new("RGB", (120, 4), "white")
    drawn = {text: grid([[Tile(picture, (text,))]]).tobytes() for text in ("l?nes", "línes", "линии", "\udcff?")}
    assert len(set(drawn.values())) == 4


def test_the_samples_sheet_holds_also_what_cannot_be_decoded(mixed: Dataset) -> None:
    sheet = samples_sheet(mixed, 14, seed=0)
    assert sheet.mode == "RGB"
    assert len(sheet.getcolors(1 << 20)) > 100
    assert (np.asarray(sheet) == 211).all(axis=2).sum() >= 160 * 160 - 2000  # lightgrey


@pytest.mark.parametrize("num_classes", [0, 1, 12, 500])
@pytest.mark.parametrize("num_images", [0, 1, 300])
def test_any_statistics_make_a_figure(num_classes: int, num_images: int) -> None:
    rng = np.random.default_rng(0)
    statistics = Statistics(
        num_samples=num_images,
        num_shards=1,
        widths=rng.integers(1, 5000, num_images),
        heights=rng.integers(1, 5000, num_images),
        num_bytes=rng.integers(0, 1 << 30, num_images),
        num_unreadable=0,
        class_counts=Counter({label: 1 + 10_000 // (1 + label) for label in range(num_classes)}),
        classes=None,
    )
    figure = statistics_figure(statistics)
    figure.canvas.draw()
    assert len(figure.axes) >= 4
    assert summary(statistics)


def test_display_of_8_bits_keeps_levels_and_of_16_stretches_them() -> None:
    rgb = picture(0)
    np.testing.assert_array_equal(np.asarray(Display(rgb).rgb(rgb)), rgb)
    grey = rgb[:, :, :1]
    np.testing.assert_array_equal(np.asarray(Display(grey).rgb(grey)), np.repeat(grey, 3, axis=2))
    dark = (rgb.astype(np.uint16) * 3 + 500)[:, :, :1]  # 500 .. 1265 of 65535
    shown = np.asarray(Display(dark).rgb(dark))
    assert shown.min() == 0
    assert shown.max() == 255


def test_display_of_many_bands_shows_those_that_are_named() -> None:
    image = np.stack([np.full((4, 4), 10 * band, np.uint8) for band in range(13)], axis=2)
    assert np.asarray(Display(image, (3, 2, 1)).rgb(image))[0, 0].tolist() == [30, 20, 10]
    assert np.asarray(Display(image[:, :, :2]).rgb(image[:, :, :2]))[0, 0].tolist() == [0, 10, 0]
    assert np.asarray(Display(image, (7,)).rgb(image))[0, 0].tolist() == [70, 70, 70]
    with pytest.raises(ValueError, match="the image's 13"):
        Display(image, (3, 2, 13))


def test_a_grid_has_room_for_all_and_cuts_long_captions() -> None:
    tiles = [Tile(Image.new("RGB", (40, 30), "red"), ("a-very-long-key-\udcff-that-ends-here",)) for _ in range(3)]
    sheet = grid([tiles[:2], tiles[2:]], "a title of several words that is wider than the sheet")
    assert (np.asarray(sheet) == (255, 0, 0)).all(axis=2).sum() == 3 * 40 * 30
    assert sheet.width < 120
    assert sheet.height > 2 * (30 + LINE) + 2 * LINE


@pytest.mark.parametrize(("size", "expected"), [((1, 1), (64, 64)), ((500, 100), (64, 13)), ((3, 900), (1, 64))])
def test_fitted_keeps_the_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(Image.new("RGB", size), 64).size == expected
