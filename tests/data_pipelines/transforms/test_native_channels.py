"""The kernel's crops of any number of channels, of 8 and of 16 bits, beside the slow form's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipelines.native import kernel
from data_pipelines.transforms.backends import any_channels, native
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.backends.select import backend, resolve_backend
from data_pipelines.transforms.config import Interpolation
from data_pipelines.transforms.params import CropParams

pytestmark = pytest.mark.skipif(not native.BUILT, reason="the kernel is not built")
BOXES = (
    ((3, 5, 70, 50), (32, 24)),
    ((10.25, 3.5, 40.75, 30.125), (64, 48)),
    ((0, 0, 83, 61), (5, 70)),
    ((4, 4, 20, 20), (16, 16)),
    ((82, 60, 83, 61), (7, 9)),
)


def noise(channels: int, dtype: Any) -> np.ndarray:
    rng = np.random.default_rng(channels)
    return rng.integers(0, np.iinfo(dtype).max + 1, (61, 83, channels), dtype=dtype)


def made_by(render: Any, image: np.ndarray, jobs: list[tuple[CropParams, Interpolation, Any]]) -> list[np.ndarray]:
    outs = [np.zeros((image.shape[2], *size), image.dtype) for _, _, size in jobs]
    render(image, [CropJob(params, kind, out) for (params, kind, _), out in zip(jobs, outs, strict=True)])
    return outs


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 8, 13, 17])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crops_are_those_of_the_slow_form(dtype: Any, channels: int, interpolation: Interpolation) -> None:
    image = noise(channels, dtype)
    full = float(np.iinfo(dtype).max)
    for box, size in BOXES:
        expected = any_channels.resized(image, box, size, interpolation)
        np.testing.assert_allclose(native.resized(image, box, size, interpolation), expected, atol=3e-6 * full)
    jobs = [(CropParams(box, flip=bool(number % 2)), interpolation, size) for number, (box, size) in enumerate(BOXES)]
    found, slow = made_by(native.render_channels, image, jobs), made_by(any_channels.render, image, jobs)
    differences = np.concatenate(
        [np.abs(a.astype(int) - b.astype(int)).ravel() for a, b in zip(found, slow, strict=True)]
    )
    assert differences.max() <= 1
    assert differences.mean() < 0.01  # ties that single precision breaks otherwise


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_both_forms_give_the_same_bytes(channels: int) -> None:
    image = noise(channels, np.uint16)
    for box, size in BOXES:
        wide, portable = (native.resized(image, box, size, "bicubic", portable=portable) for portable in (False, True))
        np.testing.assert_array_equal(wide, portable)


def test_colours_follow_as_in_the_slow_form() -> None:
    params = CropParams((3, 4, 70, 50), True, (("contrast", 1.5), ("brightness", 0.7)), False, 1.2, True)
    image = noise(13, np.uint16)
    jobs: list[Any] = [(params, "bicubic", (32, 32)), (CropParams((1, 1, 60, 60)), "bilinear", (16, 16))]
    for found, slow in zip(
        made_by(native.render_channels, image, jobs), made_by(any_channels.render, image, jobs), strict=True
    ):
        different = np.abs(found.astype(int) - slow.astype(int)) > 1
        assert different.mean() < 0.001  # where a pixel is solarised on one side only


def test_pixels_may_lie_anywhere() -> None:
    image = noise(5, np.uint16)
    box, size = (3, 5, 70, 50), (20, 20)
    expected = native.resized(image, box, size, "bicubic")
    wide = np.zeros((61, 83, 9), np.uint16)
    wide[:, :, :5] = image
    planar = np.ascontiguousarray(np.moveaxis(image, 2, 0))
    for other in (wide[:, :, :5], np.moveaxis(planar, 0, 2), image[::-1].copy()[::-1]):
        np.testing.assert_array_equal(native.resized(other, box, size, "bicubic"), expected)


@pytest.mark.parametrize(
    ("image", "out", "box", "words"),
    [
        (np.zeros((9, 9, 4), np.uint16), np.zeros((4, 5, 5), np.uint8), (0, 0, 9, 9), "another type"),
        (np.zeros((9, 9, 4), np.uint16), np.zeros((3, 5, 5), np.uint16), (0, 0, 9, 9), "as many channels"),
        (np.zeros((9, 9, 4), np.uint16), np.zeros((4, 5, 5), np.uint16), (0, 0, 10, 9), "within the image's width"),
        (np.zeros((4, 9, 9), np.uint16).T, np.zeros((4, 5, 5), np.uint16), (0, 0, 9, 9), "one behind the other"),
        (np.zeros((9, 9, 4), np.float64), np.zeros((4, 5, 5), np.uint16), (0, 0, 9, 9), "uint8 or uint16"),
    ],
)
def test_what_cannot_be_resized_is_refused(image: np.ndarray, out: np.ndarray, box: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kernel.resize(image, out, box, 1, False)


def test_a_run_chooses_it_and_one_that_began_without_goes_on_without() -> None:
    assert resolve_backend("auto", 13, 16) == "native"
    assert resolve_backend("opencv", 13, 16) == "opencv"
    with pytest.raises(ValueError, match="choose auto, native or opencv"):
        resolve_backend("device", 13, 16)
    image = noise(13, np.uint16)
    jobs: list[Any] = [(CropParams((3, 5, 70, 50)), "bicubic", (32, 24))]
    (slow,), (by_name,) = made_by(any_channels.render, image, jobs), made_by(backend("opencv"), image, jobs)
    np.testing.assert_array_equal(slow, by_name)
