"""Tiny shards, tiny configurations of every method x encoder, and batches as the loader makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import config_data, write_shards, write_sources

from pretrain.config import Config
from pretrain.config.load import parse_config


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 32x32 px in two shards, and a tokenizer and a teacher."""
    folder = tmp_path_factory.mktemp("tiny-shards")
    write_shards(folder)
    write_sources(folder)
    return folder


@pytest.fixture(params=["mae", "mim", "hog", "normalised_pixels", "codes", "dino", "vqkd", "dvae"])
def method_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["vit", "swin"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cell(method_name: str, family: str, shards: Path, tmp_path: Path) -> Config:
    """One method x encoder."""
    return parse_config(config_data(method_name, family, shards, tmp_path / "runs"))


@pytest.fixture
def mae_data(shards: Path, tmp_path: Path) -> dict[str, Any]:
    """The nested dictionary of a MAE run on a ViT, to be changed by a test."""
    return config_data("mae", "vit", shards, tmp_path / "runs")


@pytest.fixture(scope="session")
def source(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of DINO on a small ViT, to go on from."""
    from pretrain.run import pretrain  # slow, and few tests need it

    return pretrain(parse_config(config_data("dino", "vit", shards, tmp_path_factory.mktemp("source"))))
