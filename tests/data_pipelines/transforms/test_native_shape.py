"""Crops of their own shape: how many patches, in how many rows and columns, of which part of the image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from making import picture
from pydantic import TypeAdapter, ValidationError

from data_pipelines.balance import balanced
from data_pipelines.images.regions import Picture
from data_pipelines.rng import Purpose
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.backends.select import backend
from data_pipelines.transforms.config import Crop, LocalCrops, Views
from data_pipelines.transforms.native_shape import grid_of, tokens_of, trimmed, words
from data_pipelines.transforms.params import draw, draw_shaped
from data_pipelines.transforms.transform import Recipe, SampleCrops

NATIVE = {"shape": "native", "patch": 4, "max_tokens": 64}
VIEWS = Views(
    global_crops=(Crop(**NATIVE, area=(16, 64), scale=(0.5, 1.0)),) * 2,
    local_crops=LocalCrops(**{**NATIVE, "max_tokens": 16}, count=2, scale=(0.1, 0.4)),
)
IDENTITY = (3, int(Purpose.CROPS), 0, 1)


def areas(count: int = 4000) -> np.ndarray:
    return tokens_of(VIEWS, 3, 0, 1, np.arange(count), 0)


def test_a_view_drawn_alone_is_the_view_drawn_among_many() -> None:
    whole = areas(20)
    for sample in range(20):
        assert tokens_of(VIEWS, *words((*IDENTITY, sample))).tolist() == whole[:, sample].tolist()
    assert tokens_of(VIEWS, *words((*IDENTITY, 5, 2))).tolist() != whole[:, 5].tolist()  # shown a second time


def test_areas_are_a_normal_that_is_cut() -> None:
    drawn = areas()[0]
    assert (drawn.min(), drawn.max()) == (16, 64)
    assert drawn.mean() == pytest.approx(40, abs=0.6)
    inner = np.mean(np.abs(drawn - 40) < 12)  # of a normal of deviation 12.25, cut at two deviations
    expected = math.erf(12 / 12.25 / 2**0.5) / math.erf(24.5 / 12.25 / 2**0.5)
    assert inner == pytest.approx(expected, abs=0.03)
    assert areas()[2:].max() == 16  # of local crops


@pytest.mark.parametrize("tokens", [1, 7, 64, 256])
def test_grids_are_near_the_shape_and_the_number(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    left = []
    for aspect in np.exp(rng.uniform(-4, 4, 200)).tolist():
        rows, columns = grid_of(aspect * 100, 100, tokens)
        assert 1 <= rows * columns <= tokens
        left += [rows * columns / tokens] * (1 / 3 < aspect < 3)
        exact = min(max((tokens * aspect) ** 0.5, 1), tokens)
        assert abs(rows - exact) < 1.01 or rows == 1
    assert np.mean(left) > {1: 0.99, 7: 0.8, 64: 0.92, 256: 0.96}[tokens]
    assert grid_of(3000, 1, 7) == (7, 1)


def test_nothing_is_squashed() -> None:
    box = trimmed((10, 20, 110, 95), (3, 5))
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(5 / 3)
    assert (box[0] + box[2], box[1] + box[3]) == pytest.approx((120, 115))
    assert box[0] >= 10
    assert box[1] == pytest.approx(20 + (75 - 60) / 2)


@pytest.mark.parametrize("size", [(40, 120), (90, 30), (64, 64)])
def test_patches_are_those_of_the_crop_that_was_drawn(size: tuple[int, int]) -> None:
    image = picture(1, *size)
    recipe = Recipe(VIEWS, backend(), partial_decode=False, dct_scaling=False)
    crops = SampleCrops(recipe, [(*IDENTITY, 9)])
    crops(size)
    arrays = {
        "global_patches": np.zeros((1, 2, 64, 48), np.uint8), "local_patches": np.zeros((1, 2, 16, 48), np.uint8),
        "global_grids": np.zeros((1, 2, 2), np.int64), "local_grids": np.zeros((1, 2, 2), np.int64),
    }  # fmt: skip
    crops.make(Picture(image), arrays, {0: 0})
    drawn, grids = draw_shaped(VIEWS, (*IDENTITY, 9), size)
    assert drawn == draw(VIEWS, (*IDENTITY, 9), size)
    assert list(grids[:2]) == [tuple(grid) for grid in arrays["global_grids"][0].tolist()]
    own = size[1] / size[0]
    for number, (params, (rows, columns)) in enumerate(zip(drawn, grids, strict=True)):
        kind, view = ("global", number) if number < 2 else ("local", number - 2)
        left, top, right, bottom = params.box
        assert (right - left) / (bottom - top) == pytest.approx(columns / rows)
        assert 0.4 < columns / rows / own < 2.5
        patches = arrays[f"{kind}_patches"][0, view]
        assert not patches[rows * columns :].any()
        crop = np.zeros((3, rows * 4, columns * 4), np.uint8)
        backend()(image, [CropJob(params, "bicubic", crop)])
        expected = [
            crop[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(1, 2, 0).flatten()
            for row in range(rows)
            for column in range(columns)
        ]
        assert np.array_equal(patches[: rows * columns], expected)


def test_orders_of_equal_work() -> None:
    rng = np.random.default_rng(0)
    for count in (96, 128, 97):
        costs = rng.integers(16, 257, count)
        order = balanced(costs)
        assert sorted(order) == list(range(count))
        for parts in (n for n in (2, 3, 4, 6, 8) if count % n == 0):
            sums = costs[order].reshape(parts, -1).sum(axis=1)
            assert sums.max() < 1.05 * sums.mean(), (count, parts)


def test_settings_are_checked_and_reload() -> None:
    crop = VIEWS.global_crops[0]
    assert (crop.size, crop.ratio) == ((32, 32), (1.0, 1.0))
    reader = TypeAdapter(Views)
    assert reader.validate_python(reader.dump_python(VIEWS, mode="json")) == VIEWS
    assert VIEWS.most_tokens == 2 * 64 + 2 * 16
    assert Crop(**NATIVE).area == (16, 64)
    for wrong, message in [
        ({"size": 32, "patch": 4}, "set shape=native"),
        ({"shape": "native", "patch": 4}, "needs patch"),
        ({**NATIVE, "area": (8, 65)}, "at most max_tokens"),
        ({**NATIVE, "size": 16}, "leave it out"),
    ]:
        with pytest.raises(ValidationError, match=message):
            TypeAdapter(Crop).validate_python(wrong)
    with pytest.raises(ValidationError, match="don't go together"):
        Views(global_crops=(Crop(**NATIVE),), local_crops=LocalCrops(size=16))
