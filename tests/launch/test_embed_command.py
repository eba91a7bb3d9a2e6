"""What `selfsight embed` hands on, and that `selfsight launch` starts it as well as a training."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from launch.cli import app


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr("pretrain.encoder_folder.check_target", lambda target: None)
    monkeypatch.setattr(
        "eval.embed.embed", lambda target, data, out, **more: found.update(target=target, data=data, out=out, **more)
    )
    return found


def test_options(asked: dict[str, Any]) -> None:
    options = ["--split", "val", "--tokens", "--npy", "--image-size", "32", "--last-blocks", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, ["embed", "runs/x", "--data", "s3://shards", "--out", "f", *options])
    assert done.exit_code == 0, done.output
    assert (asked["target"], asked["data"], str(asked["out"])) == ("runs/x", "s3://shards", "f")
    assert (asked["split"], asked["tokens"], asked["npy"], asked["image_size"]) == ("val", True, True, 32)
    assert (asked["last_blocks"], asked["precision"], asked["batch_size"]) == (1, "auto", 256)
    assert (asked["rank"], asked["world_size"], asked["device"]) == (0, 1, "cpu")


def test_a_rank_takes_its_share_and_a_gpu_of_its_own(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "LOCAL_RANK": 3, "WORLD_SIZE": 8, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    done = CliRunner().invoke(app, ["embed", "runs/x", "--data", "s3://shards", "--out", "f"])
    assert done.exit_code == 0, done.output
    assert (asked["rank"], asked["world_size"], asked["device"]) == (5, 8, "cuda:1")


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["mae_vit_cifar_cpu", "--data", "s"], ["pretrain", "mae_vit_cifar_cpu", "--data", "s"]),
        (["pretrain", "mine.yaml"], ["pretrain", "mine.yaml"]),
        (["embed", "runs/x", "--out", "f"], ["embed", "runs/x", "--out", "f"]),
        (["--data", "s"], ["pretrain", "--data", "s"]),
    ],
)
def test_launch_starts_either(monkeypatch: pytest.MonkeyPatch, given: list[str], command: list[str]) -> None:
    started: list[Any] = []
    monkeypatch.setattr(
        "launch.local.launch_local", lambda whole, nproc: started.append((whole[-len(command) :], nproc))
    )
    done = CliRunner().invoke(app, ["launch", "--nproc", "2", *given])
    assert done.exit_code == 0, done.output
    assert started == [(command, 2)]
