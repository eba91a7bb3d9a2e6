"""Probes of images at their own shape: what is read, what an encoder makes of it, and the whole probe."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.eval_loader import whole_images
from eval.embed import embed
from eval.features import extract
from eval.probe import run_probe
from eval.store.encoding import Crops, FrozenEncoder
from eval.store.reading import open_store
from eval.target import open_target
from pretrain.encoders import build_encoder
from pretrain.encoders.navit.config import NavitConfig
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig

pytestmark = pytest.mark.filterwarnings("ignore:k = ")  # 200 neighbours of 24 samples
ENCODER = NavitConfig(dim=16, depth=2, heads=2, patch=4, pool="attention")


def write(path: Path, count: int) -> None:
    """Stripes: their direction is the class. Sides from 12 to 40 px."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            rng = np.random.default_rng(number)
            height, width = (int(side) for side in rng.integers(12, 41, 2))
            wave = np.arange(height)[:, None] if number % 2 else np.arange(width)[None]
            pixels = np.broadcast_to(128 + 100 * np.sin(wave + rng.random() * 6), (height, width))
            levels = pixels.astype(np.uint8)
            members = {"png": levels[..., None].repeat(3, axis=2), "mask.png": levels // 128, "depth.png": levels}
            files = {f"{number:03d}.cls": b"%d" % (number % 2)}
            for kind, values in members.items():
                file = io.BytesIO()
                Image.fromarray(values).save(file, "PNG")
                files[f"{number:03d}.{kind}"] = file.getvalue()
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write(folder / "train-000000.tar", 24)
    write(folder / "val-000000.tar", 10)
    return folder


def save(folder: Path, config: NavitConfig | VitConfig = ENCODER) -> Path:
    torch.manual_seed(0)
    card = EncoderCard(config, (16, 16), 3, (0.5,) * 3, (0.25,) * 3, "dino", None, 1, 1.0, "small")
    save_encoder(folder, build_encoder(config, (16, 16), 3).state_dict(), card)
    return folder


def test_images_keep_their_shape(data: Path) -> None:
    with open_dataset(data) as dataset:
        for images, labels, numbers in whole_images(dataset, 16, 4, batch_size=10):
            assert labels.tolist() == [number % 2 for number in numbers.tolist()]
            for image, number in zip(images, numbers.tolist(), strict=True):
                height, width = (int(side) for side in np.random.default_rng(number).integers(12, 41, 2))
                rows, columns = image.shape[1] // 4, image.shape[2] // 4
                assert image.shape == (3, rows * 4, columns * 4)
                assert rows * columns <= 16
                assert abs(np.log(rows / columns) - np.log(height / width)) < 0.5
                constant = image.std(axis=2 if number % 2 else 1).mean()  # along the stripes
                assert constant < 4 < image.std(axis=1 if number % 2 else 2).mean()


def test_features_are_those_of_each_image_by_itself() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ENCODER, (16, 16))
    frozen = FrozenEncoder(encoder, Crops(16, 3, 8, (0.5,) * 3, (0.25,) * 3, native=True), last_blocks=2)
    images = [torch.randint(0, 256, (3, 4 * h, 4 * w), dtype=torch.uint8) for h, w in ((2, 3), (4, 4), (1, 5))]
    rows, none = frozen.of_images(images)
    assert none is None
    whole = FrozenEncoder(encoder, frozen.crops, last_blocks=2, tokens=True)
    again, tokens = whole.of_images(images)
    assert torch.equal(again, rows)
    assert tokens is not None
    for image, row, own in zip(images, rows, tokens.split([6, 16, 5]), strict=True):
        alone, (of_alone,) = whole(image[None])
        torch.testing.assert_close(alone[0], row, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_alone, own, rtol=1e-4, atol=1e-5)


def test_a_probe_at_native_shape(data: Path, tmp_path: Path) -> None:
    target = str(save(tmp_path / "encoder"))
    results = run_probe(
        target, str(data), device="cpu", epochs=2, seeds=(0,), only=("knn", "linear"), native=True, progress=False
    )
    assert any("at their own shape, in at most 16 patches" in note for note in results["notes"])
    assert results["rows"]["pretrained"]
    with pytest.raises(ValueError, match="takes no images of their own shape"):
        open_target(str(save(tmp_path / "vit", VitConfig(dim=12, depth=1, heads=2, stem="conv", patch=8))), native=True)


def test_a_store_at_native_shape(data: Path, tmp_path: Path) -> None:
    target, store, squares = str(save(tmp_path / "encoder")), tmp_path / "store", tmp_path / "squares"
    embed(target, str(data), store, native=True, progress=False, say=lambda line: None)
    subject = open_target(target, native=True)
    with open_dataset(data) as dataset:
        known = extract(
            subject.encoder, dataset, size=16, mean=subject.mean, std=subject.std, progress=False, native=True
        )
    found = open_store(store)["train"].feature_set()
    assert torch.equal(found.digests, known.digests)
    for name, values in known.inputs.items():
        torch.testing.assert_close(found.inputs[name], values)
    asked = {"device": "cpu", "epochs": 2, "seeds": (0,), "only": ("knn",), "progress": False}
    computed, told, by_itself = (
        run_probe(one, str(data), **asked, **more)
        for one, more in ((target, {"native": True}), (target, {"native": True, "store": store}), (str(store), {}))
    )
    assert computed["rows"] == told["rows"] == by_itself["rows"]
    with pytest.raises(ValueError, match="holds other features"):
        run_probe(target, str(data), **asked, store=store)
    embed(target, str(data), squares, progress=False, say=lambda line: None)
    with pytest.raises(ValueError, match="holds other features"):
        run_probe(target, str(data), **asked, native=True, store=squares)
