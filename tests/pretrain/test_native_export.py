"""Exports for images at their own shape, opened by those who will read them, on images that are not square."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_export import SMALL, VIT, expected, left_in, saved

from pretrain.config import EncoderConfig
from pretrain.encoders.dinov3.config import Dinov3Config
from pretrain.encoders.navit.config import NavitConfig
from pretrain.encoders.patches import patchify
from pretrain.encoders.positions import Interpolation, positions_by_matrices, resize_positions
from pretrain.encoders.saved import load_encoder
from pretrain.encoders.vit.config import VitConfig
from pretrain.interop.naflex import open_naflex, recipe_of
from pretrain.interop.native_export import export_native
from pretrain.interop.onnx_graph import run_onnx

ROTARY = VitConfig(**SMALL, positions="rotary", registers=2, layer_scale=0.3)
GRAPHS = {
    "navit": NavitConfig(**SMALL, pool="attention"),
    "navit, fractional": NavitConfig(**SMALL, positions="fractional"),
    "vit": VIT,
    "vit, sin-cos, mean": VitConfig(**SMALL, positions="sincos", pool="mean", class_token=False),
    "vit, smoothed": VitConfig(**SMALL, interpolation="antialias"),
    "vit, rotary": ROTARY,
    "dinov3": Dinov3Config(**SMALL, registers=1, rope={"normalise": "max"}),
}
SIZES = ((16, 48), (40, 24), (32, 32), (56, 16), (8, 72))


@pytest.mark.parametrize("how", get_args(Interpolation))
@pytest.mark.parametrize("new", [(3, 5), (4, 4), (4, 7), (9, 2)])
def test_positions_by_matrices_are_the_interpolated_ones(new: tuple[int, int], how: Interpolation) -> None:
    table = torch.randn(1, 16, 6, generator=torch.Generator().manual_seed(0))
    by_matrices = positions_by_matrices(table, (4, 4), new, how)
    torch.testing.assert_close(by_matrices, resize_positions(table, (4, 4), new, how), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name if name == "vit" else pytest.param(name, marks=pytest.mark.slow) for name in GRAPHS]
)
def test_a_graph_takes_an_image_of_any_shape(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "encoder", GRAPHS[name])
    done = export_native(folder, tmp_path / "out.onnx", "onnx")
    assert done.difference <= done.tolerance
    for size in SIZES:
        image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(7))
        found, wanted = run_onnx(tmp_path / "out.onnx", image), expected(folder, image)
        torch.testing.assert_close(found["pooled"], wanted.pooled, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["tokens"], wanted.tokens, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        ROTARY,
        VitConfig(**SMALL, positions="rotary", rotary={"base": 50.0}, pool="mean", class_token=False),
        VitConfig(**SMALL, positions="none", pool="mean", layer_scale=0.3),
        VitConfig(**SMALL, registers=2, interpolation="bicubic"),
        VitConfig(**SMALL, pool="mean", class_token=False, registers=1, interpolation="antialias"),
    ],
    ids=["rotary", "rotary, mean", "none", "learned", "learned, smoothed"],
)
def test_naflexvit_computes_the_same(tmp_path: Path, config: VitConfig) -> None:
    folder = saved(tmp_path / "encoder", config)
    done = export_native(folder, tmp_path / "out.safetensors", "timm")
    assert done.difference <= 1e-5
    _, card = load_encoder(folder)
    model = open_naflex(tmp_path / "out.safetensors", recipe_of(card))
    images = [torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(7)) for size in SIZES[:3]]
    most = max(image.shape[2] * image.shape[3] // 64 for image in images)
    batch: dict[str, Any] = {
        "patches": torch.zeros(3, most, 192),
        "patch_coord": torch.zeros(3, most, 2, dtype=torch.int64),
        "patch_valid": torch.zeros(3, most, dtype=torch.bool),
    }
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.mean, card.std))
    for number, image in enumerate(images):
        rows, columns = image.shape[2] // 8, image.shape[3] // 8
        own = slice(0, rows * columns)
        batch["patches"][number, own] = patchify((image - mean) / std, 8)[0]
        batch["patch_coord"][number, own] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][number, own] = True
    with torch.no_grad():
        found = model(batch)
    for number, image in enumerate(images):
        torch.testing.assert_close(found[number], expected(folder, image).pooled[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (VIT, "stretches tables of positions"),
        (GRAPHS["navit"], "norms no patches before they are embedded"),
        (GRAPHS["dinov3"], "another epsilon"),
        (dataclasses.replace(ROTARY, rotary={"normalise": "max"}), "normalise=separate"),
    ],
)
def test_what_naflexvit_computes_otherwise_is_refused(tmp_path: Path, config: EncoderConfig, why: str) -> None:
    folder = saved(tmp_path / "encoder", config)
    with pytest.raises(ValueError, match=why):
        export_native(folder, tmp_path / "out.safetensors", "timm")
    assert left_in(tmp_path) == {"encoder"}


def test_a_folder_for_the_hub_opens_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder", GRAPHS["navit"])
    done = export_native(folder, tmp_path / "hub", "hf")
    assert done.difference == 0
    assert left_in(tmp_path / "hub") == {"README.md", "config.json", "model.safetensors"}
    readme = (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")
    assert "library_name: selfsight" in readme
    assert "patches of 8 px" in readme
    assert load_encoder(tmp_path / "hub")[1] == load_encoder(folder)[1]
    with pytest.raises(FileExistsError, match="choose another place"):
        export_native(folder, tmp_path / "hub", "hf")
    assert export_native(folder, tmp_path / "hub", "hf", overwrite=True).difference == 0


def test_what_takes_no_such_images_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "encoder", VitConfig(**SMALL, stem="conv"))
    with pytest.raises(ValueError, match="takes no images of their own shape"):
        export_native(folder, tmp_path / "out.onnx", "onnx")
    with pytest.raises(ValueError, match="with --native it is one of onnx, timm, hf"):
        export_native(folder, tmp_path / "out", "features")
