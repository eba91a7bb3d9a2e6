"""The data of online k-NN."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.diagnostics.knn import open_data


def test_labels_of_any_range_are_few_classes(tmp_path: Path) -> None:
    """The votes are a table of queries by classes: labels near 900,000 must not make it that wide."""
    with tarfile.open(tmp_path / "val-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(40):
            png = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(png, "PNG")
            for suffix, content in (("png", png.getvalue()), ("cls", str(900_000 + 5 * (number % 2)).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    assert open_data(str(tmp_path), 20, 20).classes.tolist() == [900_000, 900_005]
