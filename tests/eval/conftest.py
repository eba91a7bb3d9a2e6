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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What probes keep between commands lies in the test's own folder."""
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoder_folder(tmp_path):
    """The folder of a small encoder that was never trained."""
    import torch

    from pretrain.encoders import build_encoder
    from pretrain.encoders.saved import EncoderCard, save_encoder
    from pretrain.encoders.vit.config import VitConfig

    config = VitConfig(size="tiny", dim=12, depth=2, heads=2, patch=4)
    torch.manual_seed(3)
    card = EncoderCard(config, (16, 16), 3, (0.5,) * 3, (0.25,) * 3, "dino", "class", 20, 1.5, "small")
    save_encoder(tmp_path / "encoder", build_encoder(config, (16, 16), 3).state_dict(), card)
    return tmp_path / "encoder"
