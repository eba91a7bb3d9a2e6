"""Shards made on the fly."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


def _write_shard(path, labels, seed=0, side=16, names=None, jsons=None):
    """A shard of PNGs whose brightness follows the label; None is left out.

    names: what labels are called instead. jsons: of each image, its `.json`.
    """
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, label in enumerate(labels):
            image = np.clip(rng.normal(60 + 40 * (label or 0), 25, (side, side, 3)), 0, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            members = [("png", png.getvalue())] + (
                [] if label is None else [("cls", str((names or {}).get(label, label)).encode())]
            )
            members += [] if jsons is None else [("json", json.dumps(jsons[number]).encode())]
            for suffix, content in members:
                entry = tarfile.TarInfo(f"{path.stem}-{number:05d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def write_shard():
    """write_shard(path, labels, seed=0, side=16, names=None, jsons=None)."""
    return _write_shard
