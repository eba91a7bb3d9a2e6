"""A small encoder, shards to embed, and the store of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eval.embed import embed
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig

CONFIG = VitConfig(size="tiny", dim=12, depth=5, heads=2, patch=4)


def save(folder: Path, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    card = EncoderCard(CONFIG, (16, 16), 3, (0.5,) * 3, (0.25,) * 3, "dino", "class", 40, 1.5, "small")
    save_encoder(folder, build_encoder(CONFIG, (16, 16), 3).state_dict(), card)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save(tmp_path / "encoder")


@pytest.fixture
def data(tmp_path: Path, write_shard: Callable) -> Path:
    """150 samples of train in two shards, some without a label, each with a `.json`; 8 of val."""
    labels = [0, 1, None, 2, 1] * 15
    for shard in range(2):
        jsons = [{"patient": f"p{number % 7}", "age": number} for number in range(75)]
        write_shard(tmp_path / "data" / f"train-{shard:06d}.tar", labels, seed=shard, jsons=jsons)
    write_shard(tmp_path / "data" / "val-000000.tar", [0, 1, 2, 0] * 2, seed=5)
    return tmp_path / "data"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 32 samples."""
    monkeypatch.setattr("eval.embed.rows_per_part", lambda num_bytes: 32)


@pytest.fixture
def make(target: Path, data: Path, tmp_path: Path, small_parts: None) -> Callable:
    """make(out="store", **options) -> the folder."""

    def run(out: str = "store", whose: Path = target, **options) -> Path:
        embed(str(whose), str(data), tmp_path / out, progress=False, say=lambda line: None, **options)
        return tmp_path / out

    return run
