"""`selfsight neighbours`: a page that needs no labels and no network, and a picture for the report."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from launch.cli import app
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig

ENCODER = VitConfig(size="tiny", dim=12, depth=1, heads=2, patch=4)


def shard(path: Path, num: int, labelled: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(png, "PNG")
            label = [("cls", str(number % 2).encode())] if labelled else []
            for suffix, content in [("png", png.getvalue()), *label]:
                entry = tarfile.TarInfo(f"{path.stem[:5]}-{number:03d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: small\n")
    torch.manual_seed(0)
    card = EncoderCard(ENCODER, (16, 16), 3, (0.5,) * 3, (0.25,) * 3, "dino", "class", 40, 1.5, "<b>small")
    save_encoder(folder / "encoder", build_encoder(ENCODER, (16, 16), 3).state_dict(), card)
    return folder


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, ["neighbours", *map(str, words), "--device", "cpu", "--no-progress"])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_page_of_queries_their_nearest_and_the_least_typical(tmp_path: Path, run: Path) -> None:
    shard(tmp_path / "data" / "train-000000.tar", 30, True, 0)
    shard(tmp_path / "data" / "val-000000.tar", 10, True, 1)
    invoke(run, "--data", tmp_path / "data", "--queries", 3, "--nearest", 4, "--least-typical", 5, "--most", 25)
    page = (run / "neighbours.html").read_text()
    assert len(re.findall(r'<figure class="asked">', page)) == 3
    assert len(re.findall(r'<figure class="(?:same|other)">', page)) == 12
    assert page.count("<figure>") == 5
    assert "&lt;b&gt;small, step 40" in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "25 images of train (of 30, drawn by seed 0)" in page
    assert Image.open(run / "pictures" / "neighbours-00000040.png").height == 300


def test_it_works_without_labels_and_without_a_val_split(tmp_path: Path, run: Path) -> None:
    shard(tmp_path / "data" / "train-000000.tar", 12, False, 0)
    asked = (run, "--data", tmp_path / "data", "--out", tmp_path / "page.html", "--nearest", 20)
    assert "page.html" in invoke(*asked, "--key", "train-003", "--least-typical", 0)
    page = (tmp_path / "page.html").read_text()
    near = page[page.index('class="asked"') :]
    assert near.count("train-003") == 3  # caption and both titles of the query, which is not its own neighbour
    assert page.count("<figure>") == 11
    done = CliRunner().invoke(app, ["neighbours", *map(str, asked), "--key", "train-099"])
    assert "no image of train has the key train-099; keys look like train-000" in done.output
