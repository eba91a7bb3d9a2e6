"""The crop kernel in C: both forms give the same bytes, wrong arguments are refused, sanitizers find nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from making import photo

from data_pipelines.native import kernel
from data_pipelines.rng import PythonStream, Stream
from data_pipelines.transforms.backends import native
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.config import Crop, Interpolation
from data_pipelines.transforms.params import CropParams, draw_crop, random_resized_box

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "data_pipelines" / "native"
COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
BUILT = pytest.mark.skipif(not native.BUILT, reason=f"the crop kernel is not built: {native.HOW_TO_BUILD}")
IMAGE = photo(0, 120, 160)
#: Sources that need Python's or libjpeg's headers: what is left is the kernel.
NEEDING_MORE = ("module.c", "stream.c")


def both_forms(
    image: np.ndarray, params: CropParams, size: tuple[int, int], interpolation: Interpolation
) -> np.ndarray:
    """(2, c, h, w): as the processor likes it, and portable."""
    outs = np.zeros((2, image.shape[2], *size), dtype=np.uint8)
    for portable, out in enumerate(outs):
        native.render(image, [CropJob(params, interpolation, out)], portable=bool(portable))
    return outs


@BUILT
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("number", range(10))
def test_the_portable_form_gives_the_same_bytes(number: int, interpolation: Interpolation) -> None:
    rng = np.random.default_rng(number)
    crop = Crop(size=8, scale=(0.01, 1), jitter=(0.8, 0.8, 0.8, 0.5), grayscale=0.2, blur=0.5, solarise=0.3)
    params = draw_crop(crop, Stream(number), IMAGE.shape[:2])
    size = (int(rng.integers(1, 200)), int(rng.integers(1, 200)))
    first, second = both_forms(IMAGE, params, size, interpolation)
    np.testing.assert_array_equal(first, second)
    assert first.any()


@BUILT
@pytest.mark.parametrize("shape", [(1, 1), (1, 10_000), (10_000, 1), (2, 3)])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (64, 64)])
def test_extreme_shapes(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """A flat image stays flat, whatever becomes of its shape."""
    flat = np.full((*shape, 3), (3, 130, 255), dtype=np.uint8)
    for box in ((0, 0, shape[1], shape[0]), (shape[1] - 1, shape[0] - 1, shape[1], shape[0])):
        for interpolation in ("bilinear", "bicubic", "lanczos"):
            outs = both_forms(flat, CropParams(box, blur_radius=2.0), size, interpolation)  # type: ignore[arg-type]
            np.testing.assert_array_equal(outs, np.broadcast_to(flat[0, 0][:, None, None], outs.shape))


@BUILT
def test_wrong_arguments_are_refused() -> None:
    good = CropParams((0, 0, 20, 20))
    out = np.zeros((3, 8, 8), dtype=np.uint8)

    def refused(match: str, params: CropParams = good, image: np.ndarray = IMAGE, out: np.ndarray = out) -> None:
        with pytest.raises((ValueError, BufferError), match=match):
            native.render(image, [CropJob(params, "bicubic", out)])

    nan = float("nan")
    for box in ((-1, 0, 20, 20), (0, 0, 161, 20), (5, 0, 5, 20), (9, 0, 3, 20), (nan, 0, 20, 20), (0, 0, nan, 20)):
        refused("width", good._replace(box=box))
    for box in ((0, -0.1, 20, 20), (0, 0, 20, 120.5), (0, 7, 20, 7), (0, 0, 20, float("inf"))):
        refused("height", good._replace(box=box))
    refused("thousandth", good._replace(box=(0, 0, 1e-9, 5)))
    refused("blur", good._replace(blur_radius=nan))
    refused("blur", good._replace(blur_radius=1e9))
    refused("jitter", good._replace(jitter=(("hue", float("inf")),)))
    refused("at most", good._replace(jitter=(("hue", 0.1),) * 9))
    refused("channels", out=np.zeros((1, 8, 8), dtype=np.uint8))
    refused("three axes", image=IMAGE[:, :, 0])
    refused("uint8", image=IMAGE.astype(np.uint16))
    refused("uint8", image=IMAGE.astype(np.int8))
    refused("uint8", out=np.zeros((3, 8, 8), dtype=np.float32))
    refused("within 1", out=np.zeros((3, 0, 8), dtype=np.uint8))
    refused("one pixel", image=np.zeros((0, 5, 3), dtype=np.uint8))
    refused("contiguous", out=np.zeros((3, 8, 16), dtype=np.uint8)[:, :, ::2])
    frozen = out.copy()
    frozen.setflags(write=False)
    refused("read-only|not writable", out=frozen)
    with pytest.raises(KeyError):
        native.render(IMAGE, [CropJob(good, "nearest", out)])  # type: ignore[arg-type]
    assert not out.any()
    native.render(IMAGE, [])


@BUILT
def test_a_job_that_is_refused_leaves_the_others_undone() -> None:
    outs = np.zeros((2, 3, 8, 8), dtype=np.uint8)
    boxes = ((0, 0, 20, 20), (0, 0, 999, 20))
    with pytest.raises(ValueError, match="width"):
        native.render(IMAGE, [CropJob(CropParams(box), "bicubic", out) for box, out in zip(boxes, outs, strict=True)])
    assert not outs.any()


@BUILT
def test_streams_in_c_are_the_streams_in_python() -> None:
    for words in ((), (0,), (1, 2, 3), (-1, 2**64 + 5, 2**200), (5, 3, 0, 2, 12345)):
        theirs, ours = PythonStream(*words), kernel.Stream(*words)
        for _ in range(20):
            assert ours.bits() == theirs.bits()
            assert ours.random() == theirs.random()
            assert ours.uniform(-2.5, 7) == theirs.uniform(-2.5, 7)
            assert ours.integer(1000) == theirs.integer(1000)
            for count in (0, 1, 2, 49, 1000):
                orders = np.zeros((2, count), np.int64)
                ours.permute(orders[0]), theirs.permute(orders[1])
                assert orders[0].tolist() == orders[1].tolist()
                assert sorted(orders[0]) == list(range(count))
    for wrong in (("a",), (1.5,), (None,)):
        with pytest.raises(TypeError):
            kernel.Stream(*wrong)
    for out in (np.zeros(4, np.int32), np.zeros(4), np.zeros(8, np.int64)[::2]):
        with pytest.raises(ValueError, match=r"int64|contiguous"):
            kernel.Stream(1).permute(out)


@BUILT
def test_boxes_in_c_are_those_in_python() -> None:
    for number in range(3000):
        size, scale, ratio = (37 + number % 90, 20 + number % 71), (0.05 + number % 7 / 10, 0.9), (0.5, 1.9)
        boxes = [random_resized_box(stream(9, number), size, scale, ratio) for stream in (kernel.Stream, PythonStream)]
        assert boxes[0] == boxes[1]
        assert {type(side) for side in boxes[0]} == {int}


def test_the_kernel_survives_a_fuzz_under_sanitizers(tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C compiler: the fuzz of the crop kernel is left out")
    program = tmp_path / "fuzz_crops"
    sources = [path for path in sorted(SOURCES.glob("*.c")) if path.name not in NEEDING_MORE]
    options = ["-std=c11", "-O2", "-g", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    harness = Path(__file__).with_name("fuzz_crops.c")
    command = [COMPILER, *options, *sanitizers, f"-I{SOURCES}", str(harness), *map(str, sources), "-lm", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and re.search("sanitize|asan|ubsan", built.stderr):
        pytest.skip(f"{COMPILER} has no sanitizers: the fuzz of the crop kernel is left out")
    assert not built.returncode, built.stderr
    run = subprocess.run([program, "1", "4"], capture_output=True, text=True)
    assert not run.returncode, run.stderr[-3000:]
    assert int(run.stdout) > 100


def test_without_a_compiler_installing_goes_on_and_says_so_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    done = subprocess.run(
        [*command, "--force"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CC": "false"}
    )
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stderr.splitlines() if line.startswith("notice: ")]
    assert any("data_pipelines.native._crops is not built" in line for line in notices)
    assert not list(tmp_path.glob("lib/**/*.so"))
