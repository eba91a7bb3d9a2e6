"""What a folder or shards hold, told before anything is packed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from making import bands, deep_png, encode, picture, tiff
from packs import MAKERS

from data_pipelines.images.depth import bits_used, depth_warning
from data_pipelines.packing.inspect_images import Sides, inspect_images
from data_pipelines.packing.write import pack

SPLITS = {"train": range(12), "val": range(12, 16)}


@pytest.mark.parametrize("kind", MAKERS)
def test_number_size_channels_and_depth(kind: str, tmp_path: Path) -> None:
    found = inspect_images(MAKERS[kind](tmp_path / "in", SPLITS), sample=5)
    assert (found.number, found.splits, found.classes, found.looked_at) == (12, {"train": 12, "val": 4}, 3, 5)
    assert (found.short_side, found.long_side) == (Sides(20, 20, 20, 20, 20), Sides(24, 24, 24, 24, 24))
    assert (found.channels, found.bits_stored, found.bits_used) == ({3: 5}, 8, 8)
    assert (found.formats, found.unreadable, found.num_unreadable) == ({"PNG": 5}, (), 0)


def test_packed_shards_tell_the_same(tmp_path: Path) -> None:
    pack(MAKERS["folder"](tmp_path / "in", SPLITS), tmp_path / "out", progress=False)
    assert inspect_images(tmp_path / "out") == inspect_images(tmp_path / "in")


def test_sizes_are_told_in_quartiles(tmp_path: Path) -> None:
    for number, side in enumerate((10, 20, 30, 40, 50)):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number, side, 2 * side)))
    found = inspect_images(tmp_path)
    assert found.short_side == Sides(10, 20, 30, 40, 50)
    assert found.long_side == Sides(20, 40, 60, 80, 100)


TWELVE = (bands(0, 1)[:, :, 0] >> 4).clip(0, 4095)
TWELVE[0, 0] = 4095


@pytest.mark.parametrize(
    ("pixels", "used", "largest"),
    [
        (TWELVE, 12, 4095),
        (TWELVE << 4, 12, 65520),
        (TWELVE >> 2, 10, 1023),
        (bands(1, 1)[:, :, 0] | 0x8001, 16, 65535),
        (np.zeros((9, 9), np.uint16), 0, 0),
    ],
    ids=["12 right-aligned", "12 left-aligned", "10", "16", "black"],
)
@pytest.mark.parametrize("encoded", [tiff, deep_png])
def test_bits_that_16_bit_files_use(pixels: np.ndarray, used: int, largest: int, encoded, tmp_path: Path) -> None:
    (tmp_path / f"a.{'tif' if encoded is tiff else 'png'}").write_bytes(encoded(pixels))
    found = inspect_images(tmp_path)
    assert (found.bits_stored, found.bits_used) == (16, used)
    assert found.largest_level == (largest if used != 16 else pixels.max())


@pytest.mark.parametrize(("dtype", "encoded"), [(np.uint8, deep_png), (np.uint16, deep_png)])
def test_how_much_mean_levels_differ(dtype: type, encoded, tmp_path: Path) -> None:
    white = np.iinfo(dtype).max
    for number, share in enumerate((0.2, 0.4, 0.6)):
        (tmp_path / f"{number}.png").write_bytes(encoded(np.full((8, 8), round(share * white), dtype)))
    assert inspect_images(tmp_path).tone_spread == pytest.approx(np.std([0.2, 0.4, 0.6]), rel=1e-2)


def test_what_a_run_of_fewer_bits_loses() -> None:
    warning = depth_warning(16, 4095, 8)
    assert warning is not None
    assert "use 12 of them (their largest level is 4,095 of 65,535)" in warning
    assert "16 grey levels of 4,096. Set data.bits=16" in warning
    whole = depth_warning(16, 65535, 8)
    assert whole is not None
    assert "256 grey levels of 65,536" in whole
    assert depth_warning(16, 4095, 16) is depth_warning(8, 255, 8) is depth_warning(8, 255, 16) is None
    assert (bits_used(0), bits_used(1), bits_used(0b1100)) == (0, 1, 2)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encode(picture(0)))
    (tmp_path / "bad\x1b[31m.png").write_bytes(b"no image")
    found = inspect_images(tmp_path)
    assert found.num_unreadable == 1
    assert found.unreadable[0].startswith("bad\\x1b[31m.png: not a JPEG")
    (tmp_path / "good.png").unlink()
    with pytest.raises(ValueError, match=r"none of 1 images .* the first, bad\\x1b"):
        inspect_images(tmp_path)
    with pytest.raises(ValueError, match="sample is 0"):
        inspect_images(tmp_path, sample=0)


def test_no_torch_is_imported() -> None:
    program = "import sys, data_pipelines.packing.inspect_images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
