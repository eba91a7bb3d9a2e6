"""Both backends show what torchvision's transforms on PIL images show with the same parameters, within bounds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pillow_reference
import pytest
from making import bands, photo, picture

from data_pipelines.rng import Stream
from data_pipelines.transforms.backends import native, select
from data_pipelines.transforms.backends.base import Backend, CropJob
from data_pipelines.transforms.backends.select import CpuBackendName, backend
from data_pipelines.transforms.config import Crop, Interpolation, LocalCrops, Views
from data_pipelines.transforms.params import CropParams, draw, draw_crop

BUILT = pytest.mark.skipif(not native.BUILT, reason=f"the crop kernel is not built: {native.HOW_TO_BUILD}")
BOTH = [pytest.param("native", marks=BUILT), "opencv"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic", "lanczos")
PIXELS = picture(3, 60, 80)
WHOLE = (0, 0, 80, 60)
COLOURS = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
DINO = Views(
    global_crops=(
        Crop(size=224, scale=(0.4, 1), blur=1.0, **COLOURS),
        Crop(size=224, scale=(0.4, 1), blur=0.1, solarise=0.2, **COLOURS),
    ),
    local_crops=LocalCrops(size=96, scale=(0.05, 0.4), count=8, blur=0.5, **COLOURS),
)
PHOTOS = [photo(seed) for seed in range(8)]


def rendered(
    make: Backend,
    params: CropParams,
    size: tuple[int, int] = (60, 80),
    interpolation: Interpolation = "bicubic",
    image: np.ndarray = PIXELS,
) -> np.ndarray:
    """(c, h, w)."""
    out = np.full((image.shape[2], *size), 77, dtype=image.dtype)
    make(image, [CropJob(params, interpolation, out)])
    return out


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """dB; 99 for equal pictures."""
    error = np.square(ours.astype(float) - theirs).mean()
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def fidelity(
    make: Backend, drawn: Sequence[tuple[np.ndarray, CropParams, int]], interpolation: Interpolation
) -> np.ndarray:
    """PSNR of every crop against PIL."""
    return np.array(
        [
            psnr(
                rendered(make, params, (size, size), interpolation, image),
                rendered(pillow_reference.render, params, (size, size), interpolation, image),
            )
            for image, params, size in drawn
        ]
    )


def ten_crops(views: Views) -> list[tuple[np.ndarray, CropParams, int]]:
    """Of every photo the ten crops of a multi-crop recipe: image, parameters, side."""
    return [
        (image, params, 224 if view < 2 else 96)
        for number, image in enumerate(PHOTOS)
        for view, params in enumerate(draw(views, (7, number), image.shape[:2]))
    ]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", BOTH)
def test_a_resize_is_within_50_db(name: CpuBackendName, interpolation: Interpolation) -> None:
    drawn = [(image, CropParams(params.box), size) for image, params, size in ten_crops(DINO)]
    assert fidelity(backend(name), drawn, interpolation).min() >= 50


@pytest.mark.parametrize(("name", "least"), [pytest.param("native", 40, marks=BUILT), ("opencv", 37)])
def test_all_operations_are_within_their_bounds(name: CpuBackendName, least: float) -> None:
    values = fidelity(backend(name), ten_crops(DINO), "bicubic")
    assert np.median(values) >= 44
    assert np.percentile(values, 5) >= least


@BUILT
@pytest.mark.parametrize(
    "params",
    [
        *[
            CropParams(WHOLE, jitter=((name, factor),))
            for name in ("brightness", "contrast", "saturation")
            for factor in (0.0, 0.3, 1.0, 1.4, 7.5)
        ],
        *[CropParams(WHOLE, blur_radius=radius) for radius in (0.1, 0.33, 1.0, 1.41, 1.42, 2.0, 3.3, 9.7, 200.0)],
        CropParams(WHOLE),
        CropParams(WHOLE, flip=True),
        CropParams(WHOLE, grayscale=True),
        CropParams(WHOLE, solarise=True),
        CropParams(
            WHOLE, jitter=(("contrast", 1.3), ("saturation", 0.7)), grayscale=True, blur_radius=1.0, solarise=True
        ),
    ],
)
def test_the_kernel_is_pillow_to_the_bit_but_for_resize_and_hue(params: CropParams) -> None:
    for image in (PIXELS, np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)):
        expected = rendered(pillow_reference.render, params, image=image)
        np.testing.assert_array_equal(rendered(native.render, params, image=image), expected)


@BUILT
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (5, 17)])
def test_the_kernel_blurs_images_smaller_than_the_blur(size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    for radius in (0.5, 1.9, 6.0):
        params = CropParams((0, 0, size[1], size[0]), blur_radius=radius)
        expected = rendered(pillow_reference.render, params, size, image=image)
        np.testing.assert_array_equal(rendered(native.render, params, size, image=image), expected)


@pytest.mark.parametrize(("name", "share", "most"), [pytest.param("native", 0.01, 8, marks=BUILT), ("opencv", 0.9, 15)])
def test_hue_is_pillows_but_for_the_rounding_of_its_levels(name: CpuBackendName, share: float, most: int) -> None:
    """All colours in steps of 5 levels, turned by several angles; a step of hue is 6 levels of the purest colours."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(52 * 52, 52, 3)
    for turns in (-0.5, -0.1, -0.003, 0.0, 0.07, 0.5):
        params = CropParams((0, 0, 52, 2704), jitter=(("hue", turns),))
        ours, theirs = (
            rendered(make, params, (2704, 52), image=colours).astype(int)
            for make in (backend(name), pillow_reference.render)
        )
        assert (ours != theirs).mean() <= share
        assert np.abs(ours - theirs).max() <= most


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_wheels_are_within_a_level_of_pillow(operation: str) -> None:
    for factor in (0.0, 0.3, 1.0, 1.4):
        params = CropParams(WHOLE, jitter=((operation, factor),))
        ours, theirs = (rendered(make, params).astype(int) for make in (backend("opencv"), pillow_reference.render))
        assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("name", BOTH)
def test_jitter_runs_in_the_drawn_order(name: CpuBackendName) -> None:
    steps = (("brightness", 1.4), ("contrast", 0.6), ("saturation", 1.5), ("hue", 0.1))
    for order in (steps, steps[::-1], (steps[2], steps[0], steps[3], steps[1])):
        params = CropParams(WHOLE, jitter=order)
        assert psnr(rendered(backend(name), params), rendered(pillow_reference.render, params)) > 42
    there, back = (rendered(backend(name), CropParams(WHOLE, jitter=order)) for order in (steps, steps[::-1]))
    assert psnr(there, back) < 35


@pytest.mark.parametrize("name", BOTH)
def test_nothing_to_do_is_a_copy(name: CpuBackendName) -> None:
    planes = np.moveaxis(PIXELS, -1, 0)
    np.testing.assert_array_equal(rendered(backend(name), CropParams(WHOLE)), planes)
    np.testing.assert_array_equal(rendered(backend(name), CropParams(WHOLE, flip=True)), planes[:, :, ::-1])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", BOTH)
def test_a_flip_is_the_mirrored_crop(name: CpuBackendName, interpolation: Interpolation) -> None:
    for rest in ({}, {"jitter": (("brightness", 1.3),), "blur_radius": 1.1}):
        plain, flipped = (
            rendered(backend(name), CropParams((3, 5, 70, 41), flip=flip, **rest), (24, 33), interpolation)
            for flip in (False, True)
        )
        assert psnr(flipped, plain[:, :, ::-1]) > 60


@pytest.mark.parametrize("name", BOTH)
def test_the_target_crop_shows_the_same_region(name: CpuBackendName) -> None:
    """BEiT's second view: 2 by 2 means of the encoder's agree with the target at half the size."""
    params = CropParams((10, 5, 60, 55), flip=True, jitter=(("brightness", 1.2),))
    large, small = (
        rendered(backend(name), params, (side, side), kind) for side, kind in ((32, "bicubic"), (16, "lanczos"))
    )
    assert np.abs(large.reshape(3, 16, 2, 16, 2).mean(axis=(2, 4)) - small).mean() < 2


@pytest.mark.parametrize("name", BOTH)
def test_greyscale_images(name: CpuBackendName) -> None:
    grey = np.ascontiguousarray(PIXELS[:, :, :1])
    params = CropParams(
        (3, 4, 50, 50), True, (("contrast", 0.7), ("brightness", 1.2)), grayscale=True, blur_radius=1.0, solarise=True
    )
    assert (
        psnr(
            rendered(backend(name), params, (16, 16), image=grey),
            rendered(pillow_reference.render, params, (16, 16), image=grey),
        )
        > 38
    )


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("box", [(10, 7, 52, 40), (10.25, 7.5, 52.75, 40.1), (0.5, 0, 3.1, 60), (79, 59, 80, 60)])
def test_pixels_beyond_the_box_play_no_part(
    name: CpuBackendName, interpolation: Interpolation, box: tuple[float, float, float, float]
) -> None:
    other = np.random.default_rng(2).integers(0, 256, PIXELS.shape, dtype=np.uint8)
    inside = (slice(int(box[1]), int(np.ceil(box[3]))), slice(int(box[0]), int(np.ceil(box[2]))))
    other[inside] = PIXELS[inside]
    first, second = (
        rendered(backend(name), CropParams(box), (20, 24), interpolation, image) for image in (PIXELS, other)
    )
    np.testing.assert_array_equal(first, second)


@BUILT
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_boxes_with_fractions_agree(interpolation: Interpolation) -> None:
    image = PHOTOS[0]
    rng = np.random.default_rng(3)
    for _ in range(10):
        left, top = rng.uniform(0, 200, 2)
        params = CropParams((left, top, left + rng.uniform(20, 300), top + rng.uniform(20, 170)))
        ours = rendered(native.render, params, (64, 48), interpolation, image)
        theirs = rendered(backend("opencv"), params, (64, 48), interpolation, image)
        assert psnr(ours, theirs) >= 50


def test_crops_of_whole_numbers_do_not_depend_on_how_they_are_written() -> None:
    for name in ("auto", "opencv"):
        whole = rendered(backend(name), CropParams((1, 2, 30, 40)), (9, 9))
        fraction = rendered(backend(name), CropParams((1.0, 2.0, 30.0, 40.0)), (9, 9))
        np.testing.assert_array_equal(whole, fraction)


@pytest.mark.parametrize("name", BOTH)
def test_any_strides_will_do(name: CpuBackendName) -> None:
    padded = np.zeros((60, 80, 4), dtype=np.uint8)
    padded[:, :, :3] = PIXELS
    planes = np.ascontiguousarray(np.moveaxis(PIXELS, -1, 0))
    views = {
        "RGBX": padded[:, :, :3],
        "planes": np.moveaxis(planes, 0, -1),
        "upside down": np.ascontiguousarray(PIXELS[::-1])[::-1],
        "mirrored": np.ascontiguousarray(PIXELS[:, ::-1])[:, ::-1],
        "BGR": np.ascontiguousarray(PIXELS[:, :, ::-1])[:, :, ::-1],
        "transposed": np.ascontiguousarray(PIXELS.swapaxes(0, 1)).swapaxes(0, 1),
        "every other": np.repeat(np.repeat(PIXELS, 2, axis=0), 2, axis=1)[::2, ::2],
    }
    for size in ((16, 16), (24, 90), (90, 24)):
        params = CropParams((1, 2, 78, 60), jitter=(("saturation", 1.5),), blur_radius=0.7)
        expected = rendered(backend(name), params, size)
        for image in views.values():
            np.testing.assert_array_equal(rendered(backend(name), params, size, image=image), expected)


@pytest.mark.parametrize("name", BOTH)
def test_many_threads_make_the_same_crops(name: CpuBackendName) -> None:
    make = backend(name)

    def run(number: int) -> list[np.ndarray]:
        image = PHOTOS[number % len(PHOTOS)]
        outs = [np.zeros((3, 64, 64), dtype=np.uint8) for _ in range(10)]
        params = draw(DINO, (9, number % len(PHOTOS)), image.shape[:2])
        make(image, [CropJob(crop, "bicubic", out) for crop, out in zip(params, outs, strict=True)])
        return outs

    alone = [run(number) for number in range(len(PHOTOS))]
    with ThreadPoolExecutor(6) as pool:
        for number, outs in enumerate(pool.map(run, range(3 * len(PHOTOS)))):
            np.testing.assert_array_equal(outs, alone[number % len(PHOTOS)])


@pytest.mark.parametrize("name", BOTH)
def test_the_interpreter_runs_on_while_a_crop_is_made(name: CpuBackendName) -> None:
    """Other threads get their turn in the middle of a call, so the interpreter's lock was not held there."""
    make, out, span = backend(name), np.zeros((3, 3000, 3000), dtype=np.uint8), []
    params = CropParams((0, 0, 500, 375), jitter=(("hue", 0.1), ("contrast", 1.2)), blur_radius=2.0)

    def run() -> None:
        span.append(time.perf_counter())
        make(PHOTOS[0], [CropJob(params, "bicubic", out)])
        span.append(time.perf_counter())

    thread, ticks = threading.Thread(target=run), []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    start, end = span
    assert len([tick for tick in ticks if start + (end - start) / 4 < tick < end - (end - start) / 4]) >= 3


@pytest.mark.parametrize("name", BOTH)
def test_other_images_go_to_the_executor_of_any_channels(name: CpuBackendName) -> None:
    for image in (bands(0), PIXELS[:, :, :1].astype(np.uint16) * 257, np.concatenate([PIXELS, PIXELS], axis=2)):
        params = draw_crop(Crop(size=8, jitter=(0.4, 0.4, 0, 0), blur=1.0), Stream(1), image.shape[:2])
        out = rendered(backend(name), params, (8, 8), image=image)
        assert out.shape == (image.shape[2], 8, 8)
        assert out.std() > 0


def test_unknown_executors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'gpu' is not known; choose auto, native or opencv"):
        backend("gpu")  # type: ignore[arg-type]


def test_without_the_kernel_auto_says_so_once_and_native_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "BUILT", False)
    select._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        backend("auto")
        make = backend("auto")
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "build_ext --inplace" in caplog.text
    params = CropParams((1, 2, 30, 40))
    expected = rendered(backend("opencv"), params, (8, 8))
    np.testing.assert_array_equal(rendered(make, params, (8, 8)), expected)
    with pytest.raises(ValueError, match=r"not built; .*build_ext --inplace.*, or choose opencv"):
        backend("native")
