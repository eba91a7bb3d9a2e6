"""The decoder of parts, built with AddressSanitizer and UBSan, stays within its memory whatever bytes it is given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "data_pipelines" / "images" / "native" / "jpeg_region.c"
#: Runs in a process of its own, as the sanitizer must be loaded before all else; imports NumPy and Pillow only.
FUZZ = """
import io, sys
import numpy as np
from PIL import Image
sys.path.insert(0, sys.argv[1])
import _jpeg_region
draw = np.random.default_rng(0)
done = refused = 0
for turn in range(2500):
    height, width = (int(side) for side in draw.integers(1, 90, 2))
    coarse = draw.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    image, file = Image.fromarray(coarse).resize((width, height)), io.BytesIO()
    options = {"restart_marker_blocks": 3} if turn % 5 == 0 else {}
    image = image.convert("L") if turn % 7 == 0 else image
    image.save(file, "JPEG", quality=int(draw.integers(5, 98)), subsampling=int(draw.integers(0, 3)),
               progressive=turn % 11 == 0, **options)
    content = bytearray(file.getvalue())
    scan = content.find(b"\\xff\\xda")
    if turn % 4:
        for place in draw.integers(0, len(content), draw.integers(1, 5)):
            content[place] ^= 1 << draw.integers(0, 8)
    if turn % 9 == 0:
        del content[int(draw.integers(0, len(content))):]
    size = (height, width)
    if turn % 6 == 0:  # also what the file never said
        size = tuple(int(side) for side in draw.integers(-2, 70000, 2))
        scan = int(draw.integers(-5, len(content) + 5))
    factor = int(draw.choice([1, 2, 4, 8]))
    sides = [-(-max(side, 1) // factor) for side in size]
    top, left = (int(draw.integers(0, side)) for side in sides)
    shape = (min(int(draw.integers(1, sides[0] - top + 1)), 300), min(int(draw.integers(1, sides[1] - left + 1)), 300))
    out = np.empty((*shape, int(draw.choice([1, 3, 4]))), dtype=np.uint8)
    if turn % 13 == 0:
        left, top = (int(corner) for corner in draw.integers(-3, 100, 2))
    try:
        _jpeg_region.decode_region(bytes(content), scan, out, size, factor, (left, top))
        done += 1
    except ValueError:
        refused += 1
print(done, refused)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_any_bytes_and_any_sizes(tmp_path: Path) -> None:
    target = tmp_path / f"_jpeg_region{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = "-g -O1 -std=c11 -Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all -shared -fPIC"
    include = f"-I{sysconfig.get_path('include')}"
    command = ["gcc", *flags.split(), include, str(SOURCE), "-ljpeg", "-o", str(target)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and any(lacking in built.stderr for lacking in ("jpeglib.h", "-ljpeg", "libasan", "Python.h")):
        pytest.skip(f"cannot be built here: {built.stderr.splitlines()[0]}")
    assert not built.returncode, built.stderr
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environ = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }
    run = subprocess.run([sys.executable, "-c", FUZZ, str(tmp_path)], capture_output=True, text=True, env=environ)
    assert not run.returncode, run.stderr[-4000:]
    done, refused = map(int, run.stdout.split())
    assert min(done, refused) > 300
