from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from making import encode, picture, write_tar

from launch.cli import main
from launch.pretrain_command import plan, show_plan
from pretrain.config.load import ConfigError, load_config

PRESET = "mae_vit_cifar_cpu"


def test_the_plan_does_the_arithmetic(tmp_path: Path) -> None:
    changes = ["train.batch_size=64", "train.grad_accum_steps=2", "train.epochs=3", "optim.lr=0.001"]
    config = load_config(PRESET, [f"data.train={tmp_path}", *changes, "optim.lr_reference_batch=128"])
    text = "\n".join(plan(config, "1,001 samples in 2 shards", steps_per_epoch=15, world_size=4))
    assert "1,001 samples in 2 shards" in text
    assert "64 = 4 ranks x 8 x 2 accumulated" in text
    assert "45, 15 an epoch, 3.0 epochs; 2,880 samples seen" in text
    assert "0.0005 at its peak (optim.lr x 64 / 128)" in text


def test_the_plan_says_by_which_rule_the_rate_follows_the_batch(tmp_path: Path) -> None:
    changes = ["train.batch_size=512", "optim.lr=0.004", "optim.lr_reference_batch=128", "optim.lr_scaling=sqrt"]
    text = "\n".join(plan(load_config(PRESET, [f"data.train={tmp_path}", *changes]), "600 samples", 1, world_size=1))
    assert "0.008 at its peak (optim.lr x sqrt(512 / 128))" in text


def test_a_dry_run_refuses_a_batch_that_does_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match=r"does not divide over 3 ranks x 1 .* nearest batch sizes are 126 or 129"):
        show_plan(PRESET, [f"data.train={tmp_path}"])


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no-shards"):
        show_plan(PRESET, ["data.train=no-shards"])
    assert not list(tmp_path.iterdir())


def test_a_dry_run_tells_of_validation_shards_among_the_training_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-000000.tar", [(f"{n}.png", encode(picture(n))) for n in range(4)])
    for data, told in ((f"{tmp_path}/*.tar", True), (str(tmp_path), False)):
        show_plan(PRESET, [f"data.train={data}", "train.batch_size=4"])
        assert ("names shards of val beside those of train" in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    ("given", "steps"),
    [([], [10, 12]), (["tracking.profile_steps=[2,3]"], [2, 3]), (["train.epochs=null", "train.steps=6"], None)],
)
def test_profile_traces_the_steps_that_are_named_else_10_to_12(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], steps: list[int] | None
) -> None:
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.png", encode(picture(n))) for n in range(4)])
    arguments = ["pretrain", PRESET, "--data", str(tmp_path), "--dry-run", "--profile", "train.batch_size=4"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "optim.warmup_epochs=0", *given])
    shown = capsys.readouterr()
    if steps is None:
        assert ended.value.code == 2
        assert "tracking.profile_steps is [10, 12] (--profile: 10 to 12), and the run ends with step 6" in shown.err
        assert "tracking.profile_steps=[4,6]" in shown.err
    else:
        assert ended.value.code == 0
        assert yaml.safe_load(shown.out)["tracking"]["profile_steps"] == steps


@pytest.mark.parametrize(("bits", "highest", "told"), [(16, 0.0625, True), (8, 1.0, False)])
def test_a_dry_run_tells_of_levels_that_8_bits_lose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, highest: float, told: bool
) -> None:
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.png", encode(picture(n))) for n in range(4)])
    (tmp_path / "dataset.json").write_text(json.dumps({"statistics": {"bits": bits, "max": [highest] * 3}}))
    show_plan(PRESET, [f"data.train={tmp_path}", "train.batch_size=4"])
    assert ("keeps the high byte: 17 grey levels of 4,097" in capsys.readouterr().out) == told
