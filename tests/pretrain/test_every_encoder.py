"""Every row of the table of encoders by the command line: pretrained, continued, probed, exported, imported.

Which rows there are, the registry says. Some run by default, one of each way that an encoder can be built; the others
are slow.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_supported import SMALL
from tiny import config_data

from launch.cli import main
from pretrain.encoders.saved import read_card, timm_recipe

#: A sequence and a pyramid.
BY_DEFAULT = ("vit", "hornet")
ROWS = [row if row in BY_DEFAULT else pytest.param(row, marks=pytest.mark.slow) for row in SMALL]
#: Of those, what torch's exporter to ONNX does not take.
NOT_ONNX = ("swin_moe",)


def command(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code, words


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str | None:
    """What a command says that refuses what it is asked for; None where it does it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code in (0, None, 2)
    return " ".join(capsys.readouterr().err.split()) if ended.value.code else None


def preset_of(row: str, shards: Path, folder: Path) -> Path:
    """A preset of DINO on the row's small form: two steps of four images of its own side."""
    encoder, side = SMALL[row]
    data: dict[str, Any] = config_data("dino", "vit", shards, folder / "runs", train={"steps": 2, "batch_size": 4})
    data |= {"name": "run", "encoder": encoder, "checkpoint": {"every_steps": 1}}
    for crop in data["views"]["global_crops"]:
        crop["size"] = side
    data["views"]["local_crops"] = None
    data["data"]["train"] = None
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def figures(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("row", ROWS)
def test_an_encoder_from_pretraining_to_the_next_run(
    row: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, run = preset_of(row, shards, tmp_path), tmp_path / "runs" / "run"
    training = ("pretrain", preset, "--data", shards)
    command(*training)
    whole = figures(run)
    assert np.isfinite(whole).all()

    shutil.rmtree(run / "checkpoints" / "step-00000002")  # killed after its first step
    shutil.rmtree(run / "encoder")
    command(*training)
    assert figures(run) == whole

    learn, measure = (shards / f"train-00000{number}.tar" for number in (0, 1))
    command("probe", run, "--data", learn, "--val-data", measure, "--only", "knn", "--out", tmp_path / "probe.json")
    results = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))
    assert results["target"]["step"] == 2

    graph, weights = tmp_path / "run.onnx", tmp_path / "run.safetensors"
    said = told(capsys, "export", run, graph, "--to", "onnx")
    assert graph.is_file() == (said is None)
    if said is not None:
        assert row not in BY_DEFAULT or row in NOT_ONNX, said
        assert "the export to onnx failed, and nothing was kept of it" in said
        assert "Try instead: --to safetensors" in said
    command("export", run, weights, "--to", "safetensors")
    assert read_card(weights) == read_card(run / "encoder")
    if timm_recipe(read_card(weights)) is None:
        said = told(capsys, "export", run, tmp_path / "timm.safetensors", "--to", "timm")
        assert said is not None
        assert "has no model that takes these weights" in said

    said = told(capsys, "import", weights, tmp_path / "imported")
    assert said is not None
    assert f"init_from={weights}" in said
    command(*training, "name=on", "train.steps=1", f"init_from={weights}")
    assert (tmp_path / "runs" / "on" / "encoder").is_dir()
