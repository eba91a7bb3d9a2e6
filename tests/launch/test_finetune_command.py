from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import encode, picture, write_tar

from data_pipelines.packing.grouping import NO_GROUPS
from launch.finetune_command import prepare, start_of
from pretrain.config.load import load_config
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig
from pretrain.interop.initialise import check_init_from

VIT = VitConfig(dim=24, depth=2, heads=2, patch=4, pool="mean", positions="sincos", drop_path=0.4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which only the encoder is there, and shards."""
    torch.manual_seed(0)
    card = EncoderCard(VIT, (32, 32), 1, (0.4,), (0.3,), "mae", "mean", step=9, epoch=1.0, run="grey", bits=16)
    save_encoder(tmp_path / "runs" / "grey" / "encoder", build_encoder(VIT, (32, 32), 1).state_dict(), card)
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.png", encode(picture(n))) for n in range(4)])
    return tmp_path / "runs" / "grey"


def test_the_run_gets_the_encoder_of_its_target(run: Path) -> None:
    data = str(run.parents[1])
    chosen = prepare(str(run), None, ["method.rand_augment=null", "train.epochs=4"], data, NO_GROUPS)
    config = load_config(*chosen)
    assert chosen.preset == "finetune_own_data"
    assert (config.name, config.init_from, config.data.train) == ("grey-finetune", str(run), data)
    assert (config.views.global_size, config.data.channels, config.data.bits) == ((32, 32), 1, 16)
    assert config.encoder.shape == (24, 2, 2)
    assert config.encoder.positions == "learned"  # on from the fixed ones
    assert config.encoder.drop_path == 0.1  # the preset's, not pretraining's
    assert config.train.epochs == 4
    check_init_from(config)


def test_a_preset_keeps_its_size_and_a_user_has_the_last_word(run: Path) -> None:
    given = ["data.channels=3", "data.bits=8", "encoder.drop_path=0.3", "name=mine"]
    chosen = prepare(str(run), "finetune_own_data", given, str(run.parents[1]), NO_GROUPS)
    config = load_config(*chosen)
    assert config.views.global_size == (224, 224)
    assert (config.data.channels, config.encoder.drop_path, config.name) == (3, 0.3, "mine")


def test_a_checkpoint_gives_its_runs_name(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000009"
    (run / "encoder").rename(run / "moved")
    checkpoint.mkdir(parents=True)
    (run / "moved").rename(checkpoint / "encoder")
    assert start_of(str(checkpoint), keep_size=True)["name"] == "grey-finetune"


def test_from_scratch(run: Path) -> None:
    chosen = prepare("none", "finetune_vit_cifar_cpu", [], str(run.parents[1]), NO_GROUPS)
    config = load_config(*chosen)
    assert config.init_from is None
    assert config.name == "finetune_vit_cifar_cpu"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("none", None, [], "x"), "which encoder"),
        (("RUN", None, [], None), "which images"),
        (("RUN", "mae_vit_cifar_cpu", [], "x"), "preset of method mae"),
        (("RUN", "finetune_vit", [], "x"), "did you mean finetune_"),
        (("nowhere", None, [], "x"), "not a folder"),
    ],
)
def test_what_is_refused(given: tuple[Any, ...], message: str, run: Path) -> None:
    target, *rest = given
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(str(run) if target == "RUN" else target, *rest, NO_GROUPS)


def test_defaults_follow_the_task_the_length_and_the_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 images, masks, 2 epochs: nothing of it was the preset's, and nothing has to be typed."""
    data = str(run.parents[1])
    config = load_config(*prepare(str(run), None, ["method.task=segmentation", "train.epochs=2"], data, NO_GROUPS))
    assert (config.method.mixup, config.method.label_smoothing, config.method.rand_augment) == (0, 0, None)
    assert (config.optim.warmup_epochs, config.train.batch_size) == (0.2, 2)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "for task segmentation: method.label_smoothing=0 method.mixup=0 method.rand_augment=null in place of the "
        "preset's",
        "for 2 epochs: optim.warmup_epochs=0.2 in place of the 3 of 30",
        "for 4 images: train.batch_size=2 in place of 64",
    ]
    numbers = ["method.task=numbers", "method.label=age", "train.steps=10", "train.batch_size=4"]
    config = load_config(*prepare(str(run), None, numbers, data, NO_GROUPS))
    assert (config.method.mixup, config.method.label_smoothing, config.optim.warmup_epochs) == (0.2, 0, 1)
    assert "for 1 channel of 16 bits: method.rand_augment=null" in capsys.readouterr().out


def test_what_was_typed_stands_and_is_refused_for_all_reasons_at_once(run: Path) -> None:
    data = str(run.parents[1])
    typed = ["method.task=segmentation", "method.mixup=0.3", "method.cutmix=1", "method.rand_augment.ops=1"]
    with pytest.raises(ValueError, match=r"set method\.mixup=0 method\.cutmix=0 method\.rand_augment=null"):
        prepare(str(run), None, typed, data, NO_GROUPS)
    with pytest.raises(ValueError, match=r"warmup_epochs is 3, more than"):
        prepare(str(run), None, ["train.epochs=2", "optim.warmup_epochs=3"], data, NO_GROUPS)
    chosen = prepare(str(run), None, ["train.epochs=60", "train.batch_size=64"], data, NO_GROUPS)
    assert not [override for override in chosen.overrides if override.startswith(("optim.", "train.batch_size=2"))]
