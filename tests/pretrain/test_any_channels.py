"""Runs on 16-bit grey and 13-band images, from packed or foreign shards to a probe, at the smallest sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import bands, deep_png, npy, tiff, write_tar
from PIL import Image
from tiny import COLOURS, config_data

from data_pipelines.datasets.dataset_info import data_stats
from data_pipelines.packing.write import pack
from eval.probe import run_probe
from pretrain.config import Config
from pretrain.config.load import ConfigError, load_config, parse_config
from pretrain.encoders.saved import load_encoder
from pretrain.interop.export import export_encoder
from pretrain.run import pretrain
from pretrain.stream import pixels
from pretrain.tracking.pictures import contact_sheet

TINY = [
    "views.global_crops.0.size=32", "encoder.dim=32", "encoder.depth=1", "encoder.heads=2", "encoder.patch=8",
    "method.mask.unit=8", "method.decoder_dim=32", "method.decoder_depth=1", "method.decoder_heads=2",
    "train={steps: 4, batch_size: 8}", "optim.warmup_epochs=0", "optim.lr_reference_batch=8",
    "engine={device: cpu, threads: 1}", "checkpoint={every_steps: 2}", "data.threads=2", "data.shuffle_window=8",
    "tracking.log_every_steps=1", "tracking.pictures_every_steps=2", "tracking.wandb=disabled",
]  # fmt: skip


def image(number: int, channels: int) -> np.ndarray:
    """As sensors give: 12 bits of 16, brighter for the odd class."""
    return bands(number, channels, 40, 44) // 24 + 1000 * (number % 2)


def grey_tree(folder: Path, split: str, count: int) -> None:
    """Folders of two classes, of 16-bit PNG and TIFF."""
    for number in range(count):
        pixels = image(number, 1)[:, :, 0]
        suffix, content = ("png", deep_png(pixels)) if number % 4 < 2 else ("tiff", tiff(pixels, compression="zlib"))
        path = folder / split / f"class{number % 2}" / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed."""
    folder = tmp_path_factory.mktemp("grayscale")
    grey_tree(folder / "images", "train", 24)
    grey_tree(folder / "images", "val", 8)
    pack(folder / "images", folder / "shards", progress=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def multispectral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 bands from elsewhere, measured: TIFF and arrays, channels first and last."""
    folder = tmp_path_factory.mktemp("bands")
    for split, count in (("train", 24), ("val", 8)):
        files = []
        for number in range(count):
            pixels = image(number, 13)
            suffix, content = (
                ("tif", tiff(pixels, planarconfig="contig")),
                ("npy", npy(pixels)),
                ("npy", npy(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)))),
            )[number % 3]
            files += [(f"{number:03d}.{suffix}", content), (f"{number:03d}.cls", str(number % 2).encode())]
        write_tar(folder / f"{split}-000000.tar", files)
    data_stats(folder, write=True, progress=False)
    return folder


def preset(name: str, shards: Path, runs: Path, *changes: str) -> Config:
    return load_config(name, [*TINY, f"data.train={shards}", f"runs={runs}", "name=run", *changes])


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["mae_vit_16bit_grey", "mae_vit_13band"])
def test_a_preset_trains_resumes_is_shown_exported_and_probed(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    channels, shards = (1, "grey") if name == "mae_vit_16bit_grey" else (13, "multispectral")
    data = request.getfixturevalue(shards)
    run = pretrain(preset(name, data, tmp_path / "runs"))
    rows = rows_of(run)
    assert 0.5 < rows[0]["loss"] < 2.5  # of patches standardised each; unscaled pixels would be thousands

    # killed after its second step, and back
    copy = tmp_path / "other" / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "encoder")
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    stored = (copy / "config.yaml").read_text(encoding="utf-8")
    (copy / "config.yaml").write_text(stored.replace(str(tmp_path / "runs"), str(tmp_path / "other")), encoding="utf-8")
    assert pretrain(preset(name, data, tmp_path / "other", "data.threads=1")) == copy
    assert [(row["loss"], row["ids_digest"]) for row in rows_of(copy)] == [
        (row["loss"], row["ids_digest"]) for row in rows
    ]

    crops, *_ = sorted((run / "pictures").glob("crops-*.png"))
    shown = np.asarray(Image.open(crops))
    assert 60 < shown.mean() < 200  # 12 bits of 16 would be all but black as they are
    assert shown.std() > 20

    _, card = load_encoder(run / "encoder")
    info = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    assert (card.channels, card.bits) == (channels, 16)
    assert (list(card.mean), list(card.std)) == (info["mean"], info["std"])
    assert export_encoder(run / "encoder", tmp_path / "run.safetensors", "safetensors").difference == 0
    hub = export_encoder(run / "encoder", tmp_path / "hub", "hf", run=run)
    readme = (hub.path / "README.md").read_text(encoding="utf-8")
    assert f"(b, {channels}, h, w) uint16" in readme
    assert "Pixels of 16 bits are divided by 65535" in readme

    results = run_probe(str(run), str(data), device="cpu", epochs=2, seeds=(0,), progress=False, untrained_seeds=(0,))
    assert (results["target"]["channels"], results["target"]["bits"]) == (channels, 16)
    assert results["rows"]["pixels"]["linear"]["top1"] > 0.5  # brightness follows the label


def test_dino_leaves_out_what_needs_colours_and_says_so(
    multispectral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"size": 32, "scale": [0.5, 1.0], **COLOURS, "blur": 1.0}
    views = {"global_crops": [whole, {**whole, "solarise": 0.2}], "local_crops": {"count": 1, "size": 16, **COLOURS}}
    data = config_data("dino", "vit", multispectral, tmp_path / "runs", train={"steps": 1, "batch_size": 4})
    data["views"] = views
    data["data"] |= {"channels": 13, "bits": 16}
    data["tracking"]["pictures_every_steps"] = 1
    run = pretrain(parse_config(data))
    assert "left out of views: saturation, hue, grayscale, which need RGB" in capsys.readouterr().out
    assert list((run / "pictures").glob("attention-*.png"))


@pytest.mark.parametrize("method", ["mim", "hog", "dvae"])
def test_other_methods_see_13_bands(method: str, multispectral: Path, tmp_path: Path) -> None:
    data = config_data(method, "vit", multispectral, tmp_path / "runs", train={"steps": 1, "batch_size": 4})
    data["data"] |= {"channels": 13, "bits": 16}
    data["tracking"] |= {"pictures_every_steps": 1, "picture_channels": [12, 0, 5]}
    run = pretrain(parse_config(data))
    assert list((run / "pictures").glob("*.png"))


def test_no_statistics_no_run(multispectral: Path, grey: Path, tmp_path: Path) -> None:
    shutil.copytree(multispectral, tmp_path / "bare")
    (tmp_path / "bare" / "dataset.json").unlink()
    command = r"selfsight data stats .*bare --channels 13 --bits 16 --write"
    with pytest.raises(ConfigError, match=f"has no mean and deviation. Measure them: `{command}`"):
        pretrain(preset("mae_vit_13band", tmp_path / "bare", tmp_path / "runs"))
    with pytest.raises(ConfigError, match=r"is 13 and the images of .* have 1, .*Set data\.channels=1"):
        pretrain(preset("mae_vit_13band", grey, tmp_path / "runs"))
    with pytest.raises(ConfigError, match=r"is 3 and the images of .* have 13, .*Set data\.channels=13"):
        pretrain(parse_config(config_data("mae", "vit", multispectral, tmp_path / "runs")))
    info = json.loads((multispectral / "dataset.json").read_text(encoding="utf-8"))
    info["std"][9] = 0.0
    (tmp_path / "bare" / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a deviation of 0 in channel 9"):
        pretrain(preset("mae_vit_13band", tmp_path / "bare", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_grey_statistics_hold_for_rgb_made_of_grey(grey: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", grey, tmp_path / "runs", train={"steps": 1, "batch_size": 4})
    run = pretrain(parse_config(data))
    _, card = load_encoder(run / "encoder")
    info = json.loads((grey / "dataset.json").read_text(encoding="utf-8"))
    assert (card.bits, list(card.mean)) == (8, info["mean"] * 3)


def test_8_and_16_bits_of_the_same_image_are_the_same_to_a_network() -> None:
    crops = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    wide = crops.to(torch.uint16) * 257
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    normalised = pixels.normalised(crops, mean, std)
    torch.testing.assert_close(pixels.normalised(wide, mean, std), normalised)
    assert torch.equal(pixels.pictures(normalised, crops, mean, std), crops)
    shown = pixels.pictures(normalised, wide, mean, std)
    assert shown.dtype == torch.uint8
    assert torch.equal(shown, (normalised / 4 + 0.5).mul(255).round().clamp(0, 255).byte())


def test_which_channels_pictures_show() -> None:
    stack = torch.randint(0, 256, (2, 5, 64, 64), dtype=torch.uint8)
    sheet = contact_sheet(stack, (4, 0, 2))
    assert sheet.shape == (128, 64, 3)
    np.testing.assert_array_equal(sheet[:64, :, 0], stack[0, 4].numpy())
    np.testing.assert_array_equal(contact_sheet(stack, (3,))[64:, :, 1], stack[1, 3].numpy())
    with pytest.raises(
        ConfigError, match=r"picture_channels is \[3, 2, 13\]; name one or three of the channels 0 .. 12"
    ):
        load_config("mae_vit_13band", ["data.train=x", "tracking.picture_channels=[3, 2, 13]"])


def test_an_encoder_that_reads_rgb_says_so_of_13_bands(multispectral: Path, tmp_path: Path, shards: Path) -> None:
    run = pretrain(parse_config(config_data("mae", "vit", shards, tmp_path / "runs", train={"steps": 1})))
    with pytest.raises(ValueError, match="none of the 24 samples can be read as an image of 3 channels"):
        run_probe(str(run), str(multispectral), device="cpu", progress=False)
