"""`selfsight data trace` against what the loader really makes, and of a run what its checkpoints say."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import config_data, write_shards
from typer.testing import CliRunner

from data_pipelines.images.decode import decode
from data_pipelines.loader import Loader
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.backends.select import backend
from data_pipelines.transforms.params import CropParams
from launch.cli import app
from launch.trace_command import _text
from pretrain.config.load import parse_config
from pretrain.methods.registry import draw_fields_for
from pretrain.stream.datasets import open_datasets, sampler_of
from pretrain.stream.growth import continued, pin
from pretrain.survival.run_folder import write_config


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Two data sets of 40 and 30 images for a tiny run."""
    for name, count in (("one", 40), ("two", 30)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, count)
    data = config_data("mae", "vit", tmp_path / "one", tmp_path / "runs")
    data["data"]["train"] = [{"path": str(tmp_path / "one"), "weight": 3}, {"path": str(tmp_path / "two"), "weight": 1}]
    return data


def trace(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", "trace", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def traced(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trace(*arguments, "--json").splitlines()]


def test_it_tells_what_the_loader_makes(data: dict[str, Any], tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(data))  # JSON is YAML
    rows = traced(str(preset), "--step", "11", "--crops")
    config = parse_config(data)
    sampler = sampler_of(config, open_datasets(config.data))
    with Loader(sampler, config.views, draw=draw_fields_for(config), backend="opencv", threads=1) as loader:
        (batch,) = next(loader.steps(11))
        assert [[row["dataset"], row["sample"]] for row in rows] == batch["ids"].tolist()
        assert [row["row"] for row in rows] == list(range(8))
        for place, row in enumerate(rows):
            dataset = sampler.datasets[row["dataset"]]
            assert (row["key"], row["shard"]) == tuple(map(str, dataset.key(row["sample"])))
            assert row["name"] == ("one", "two")[row["dataset"]]
            crop = row["crops"][0]
            crop |= {"box": tuple(crop["box"]), "jitter": tuple(map(tuple, crop["jitter"]))}
            made = np.empty((3, 32, 32), np.uint8)
            job = CropJob(CropParams(**crop), config.views.global_crops[0].interpolation, made)
            backend("opencv")(decode(dataset.read(row["sample"])), [job])
            np.testing.assert_array_equal(made, batch["global_crops"][place, 0].numpy())
            mask = batch["drop_mask"][place].numpy()
            assert row["mask"] == hashlib.sha256(b"drop_mask" + mask.tobytes()).hexdigest()[:16]


def test_ranks_and_forms(data: dict[str, Any], tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(data))
    whole = traced(str(preset), "--step", "3", "--world-size", "4")
    assert [row["rank"] for row in whole] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert traced(str(preset), "--step", "3", "--world-size", "4", "--rank", "2") == whole[4:6]
    head, *lines = trace(str(preset), "--step", "3").splitlines()  # piped: tab-separated values
    assert [line.split("\t")[4] for line in lines] == [str(row["sample"]) for row in whole]
    assert head.split("\t")[:5] == ["row", "rank", "dataset", "name", "sample"]
    for arguments, told in ((["--rank", "4", "--world-size", "4"], "rank 4 of 4"), (["--world-size", "3"], "divide")):
        result = CliRunner().invoke(app, ["data", "trace", str(preset), *arguments])
        assert result.exit_code == 2
        assert told in result.stderr


def test_of_a_run_it_tells_what_was_shown(data: dict[str, Any], tmp_path: Path) -> None:
    """A run whose first data set grew in step 11 of its 8.75 an epoch: before step 18 the earlier shards are told."""
    config = parse_config(data)
    sampler = sampler_of(config, open_datasets(config.data))
    run = tmp_path / "runs" / config.name
    write_config(run, config)
    pin(run, sampler.datasets)
    before = [sampler.rows(step, range(8)) for step in range(30)]
    (tmp_path / "more").mkdir()
    write_shards(tmp_path / "more", 26, shards=1)
    shutil.copy(tmp_path / "more" / "train-000000.tar", tmp_path / "one" / "train-000009.tar")
    fresh = sampler_of(config, open_datasets(config.data))
    grown, _ = continued(json.loads(json.dumps(sampler.state())), fresh, 11, run, adopt=True)
    pin(run, grown.datasets)
    checkpoint = run / "checkpoints" / "step-00000020"
    checkpoint.mkdir(parents=True)
    state = {"step": 20, "world_size": 1, "zero_stage": 0, "order": grown.state()}
    (checkpoint / "state.json").write_text(json.dumps({"state": state, "files": {}}))
    for step in (0, 17):
        rows = traced(str(run), "--step", str(step))
        assert [(row["dataset"], row["sample"], row["epoch"]) for row in rows] == [row[:3] for row in before[step]]
    rows = traced(str(run), "--step", "18")
    assert [(row["dataset"], row["sample"], row["epoch"]) for row in rows] == [r[:3] for r in grown.rows(18, range(8))]
    assert {row["dataset"] for row in rows} == {1, 2}
    result = CliRunner().invoke(app, ["data", "trace", str(run), "--step", "25"])
    assert "what it is going to see" in result.stderr
    (tmp_path / "one" / "train-000000.tar").unlink()
    result = CliRunner().invoke(app, ["data", "trace", str(run), "--step", "3"])
    assert "missing: train-000000.tar" in result.stderr


@pytest.mark.parametrize(
    ("key", "told"),
    [("a\tb\nc", r"a\tb\nc"), ("\x1b[2Jred", r"\x1b[2Jred"), ("caf\udce9", r"caf\xe9"), ("a\\b é", r"a\\b é")],
)
def test_names_from_strangers_are_one_line_without_control_letters(key: str, told: str) -> None:
    assert _text(key) == told
