from __future__ import annotations

import pytest

from pretrain.config.load import as_shown, load_config
from pretrain.description import describe, own_words


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        (
            "mae_vit_cifar_cpu",
            ["train.epochs=null", "train.steps=400"],
            "MAE, ViT tiny with depth 6 and 4-px patches, crops of 32 px, 400 steps of 128 images, from random weights",
        ),
        (
            "dino_vit_cifar_cpu",
            ["train.epochs=3", "train.batch_size=64", "init_from=/home/me/runs/photos"],
            "DINO, ViT tiny with width 128, depth 4 and 8-px patches, crops of 2 x 32 and 2 x 16 px, "
            "3 epochs in batches of 64, from the weights of photos",
        ),
    ],
)
def test_a_run_is_described_by_its_settings_and_not_by_its_preset(preset: str, overrides: list[str], told: str) -> None:
    config = load_config(preset, ["data.train=shards/", *overrides])
    assert describe(config) == told
    assert describe(as_shown(config)) == told
    assert config.description
    assert own_words(config) == ""


def test_what_the_user_says_of_a_run_stays() -> None:
    config = load_config("mae_vit_cifar_cpu", ["data.train=shards/", "description=with the new lamp"])
    assert own_words(config) == "with the new lamp"


@pytest.mark.parametrize("broken", [{}, {"method": 3, "views": [], "train": None}, {"encoder": {"patch": "x"}}])
def test_of_a_damaged_configuration_what_can_be_read_is_told(broken: dict[str, object]) -> None:
    assert describe(broken) == ""
