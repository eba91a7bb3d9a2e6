"""`selfsight compare`: probes what is not measured yet, and only that; prints and writes the difference."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from eval import probe
from launch.cli import app
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig

pytestmark = pytest.mark.filterwarnings("ignore:k = ")
ENCODER = VitConfig(size="tiny", dim=12, depth=1, heads=2, patch=4)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (split, num) in enumerate((("train", 40), ("val", 24))):
        rng = np.random.default_rng(seed)
        with tarfile.open(folder / f"{split}-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(num):
                image = np.clip(rng.normal(80 + 60 * (number % 2), 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                for suffix, content in (("png", png.getvalue()), ("cls", str(number % 2).encode())):
                    entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def run_folder(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\n")
    torch.manual_seed(seed)
    card = EncoderCard(ENCODER, (16, 16), 3, (0.5,) * 3, (0.25,) * 3, "dino", "class", 40, 1.5, folder.name)
    save_encoder(folder / "encoder", build_encoder(ENCODER, (16, 16), 3).state_dict(), card)
    return folder


def test_two_runs_are_probed_once_and_compared(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (run_folder(tmp_path / name, seed) for seed, name in enumerate("ab"))
    asked = ["compare", str(a), str(b), "--data", str(data), "--only", "knn", "--device", "cpu", "--no-progress"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "k-NN class" in done.output
    (written,) = (a / "eval").glob("compare-40-*.json")
    found = json.loads(written.read_text())
    assert (found["first"]["name"], found["second"]["name"]) == ("a", "b")
    assert {each["images"] for each in found["measures"]} == {24}

    monkeypatch.setattr(probe, "run_probe", lambda *_, **__: pytest.fail("it was measured already"))
    files = [str(next((run / "eval").glob("probe-*.json"))) for run in (a, b)]
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0, again.output
    of_files = CliRunner().invoke(app, ["compare", *files, "--out", str(tmp_path / "both.json")])
    assert of_files.exit_code == 0, of_files.output
    assert json.loads((tmp_path / "both.json").read_text())["measures"] == found["measures"]


def test_what_it_needs_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b")])
    assert "--data must say" in done.output
