"""Checkpoints on other ranks and ZeRO stages: every number exact, and the run goes on as if nothing had changed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import column, run_all
from tiny import config_data
from torch import Tensor

from pretrain.checkpoints.folder import FORM, ResumeState, check_continues, check_resume, damage, read_state
from pretrain.checkpoints.pieces import MOMENTS, VALUE, HostCopy, Part, Pieces
from pretrain.config import CheckpointConfig
from pretrain.config.load import ConfigError

STAGES = (0, 1, 2, 3)


def consolidated(path: Path) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a checkpoint, whole, and the steps of the moments."""
    with Pieces(path.glob("piece-*.safetensors")) as pieces:
        state = {(VALUE, name): pieces.whole(name) for name, shape in pieces.shapes.items() if math.prod(shape)}
        for moment in MOMENTS:
            for name in pieces.steps:
                state[moment, name] = pieces.read(moment, name, 0, math.prod(pieces.shapes[name]))
        return state | {("steps", name): torch.tensor(steps) for name, steps in pieces.steps.items()}


def assert_same(first: Path, second: Path) -> None:
    before, after = consolidated(first), consolidated(second)
    assert before.keys() == after.keys()
    assert not [key for key, value in before.items() if not torch.equal(value, after[key])]


def killed_at_2(run: Path, runs: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A copy of a run of 4 steps as it was when its first checkpoint had been written; its configuration."""
    copy = runs / run.name
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000004")
    shutil.rmtree(copy / "encoder")
    return {**data, "runs": str(runs)}


def dino(shards: Path, runs: Path, stage: int, precision: str = "fp32", **engine: Any) -> dict[str, Any]:
    """Several groups of parameters, some frozen at first, a teacher and a centre; sizes that no number divides."""
    data = config_data("dino", "vit", shards, runs, engine={"zero_stage": stage, "precision": precision, **engine})
    data |= {"name": f"{precision}-{stage}", "train": {"steps": 4, "batch_size": 12, "grad_accum_steps": 2}}
    data["checkpoint"] = {"every_steps": 2}
    data["optim"] |= {"layer_decay": 0.9, "weight_decay": 0.1}
    data["method"] |= {"prototypes": 61, "head_hidden_dim": 31, "freeze_last_layer_epochs": 0.3}
    return data


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Any]]:
    """Four steps under every stage, in fp32 and bf16, on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    runs = [dino(shards, folder, stage) for stage in STAGES] + [dino(shards, folder, stage, "bf16") for stage in (1, 3)]
    run_all(runs, 2, folder)
    return runs


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_stage_and_number_of_ranks_continues_from_any_other(
    of_two_ranks: list[dict[str, Any]], tmp_path: Path, ranks: int
) -> None:
    """Between the two numbers of ranks, every pair of stages in fp32."""
    again = []
    for data in of_two_ranks:
        for further in {1: (0, 3), 3: (1, 2)}[ranks] if data["engine"]["precision"] == "fp32" else (1,):
            stage = (data["engine"]["zero_stage"] + further) % len(STAGES)
            run = Path(data["runs"]) / data["name"]
            copied = killed_at_2(run, tmp_path / f"{data['name']}-to-{stage}", data)
            again.append({**copied, "engine": {**data["engine"], "zero_stage": stage}, "save_at_start": True})
            again[-1]["train"] = {**data["train"], "grad_accum_steps": 2 if ranks == 1 else 1}
    run_all(again, ranks, tmp_path)
    for data in again:
        source = next(run for run in of_two_ranks if run["name"] == data["name"])
        first, second = (Path(run["runs"]) / run["name"] / "checkpoints" / "step-00000002" for run in (source, data))
        assert_same(first, second)
        state = read_state(second)
        assert (state.world_size, state.zero_stage) == (ranks, data["engine"]["zero_stage"])
        assert column(data, "ids_digest") == column(source, "ids_digest")
        exact = source["engine"]["precision"] == "fp32"
        assert column(data, "loss") == pytest.approx(column(source, "loss"), rel=1e-4 if exact else 0.02)


def test_the_same_stage_and_ranks_continue_to_the_last_bit(of_two_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    again = [killed_at_2(Path(data["runs"]) / data["name"], tmp_path / "again", data) for data in of_two_ranks]
    run_all(again, 2, tmp_path)
    for data, source in zip(again, of_two_ranks, strict=True):
        assert column(data, "loss") == column(source, "loss")
        first, second = (Path(run["runs"]) / run["name"] / "checkpoints" / "step-00000004" for run in (source, data))
        assert_same(first, second)


def test_every_rank_writes_its_share_and_nothing_is_pickled(of_two_ranks: list[dict[str, Any]]) -> None:
    for data in of_two_ranks:
        checkpoint = Path(data["runs"]) / data["name"] / "checkpoints" / "step-00000004"
        files = {path.name for path in checkpoint.iterdir()}
        pieces = {f"piece-0000{rank}-of-00002.safetensors" for rank in (0, 1)}
        assert files == pieces | {"state.json", "encoder"}
        small, large = sorted((checkpoint / name).stat().st_size for name in pieces)
        assert large < 1.1 * small
        for name in pieces:  # as safetensors itself reads them
            assert all(values.ndim == 1 for values in load_file(checkpoint / name).values())
        assert set(json.loads((checkpoint / "state.json").read_text())["files"]) == pieces | {
            "encoder/model.safetensors", "encoder/config.json"
        }  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_in_host_memory(shards: Path, tmp_path: Path, stage: int) -> None:
    offloaded = {"zero_force_ds_cpu_optimizer": False, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    data = dino(shards, tmp_path, stage, deepspeed=offloaded)
    run_all([data], 1, tmp_path)
    again = killed_at_2(tmp_path / data["name"], tmp_path / "again", data) | {"save_at_start": True}
    run_all([again], 1, tmp_path)
    assert column(again, "loss") == column(data, "loss")
    assert_same(*(Path(run["runs"]) / data["name"] / "checkpoints" / "step-00000002" for run in (data, again)))


def test_pieces_are_read_slice_by_slice(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    counts = torch.arange(5)
    pieces = (
        [Part(VALUE, "a.b", (4, 6), 0, 10, whole, 0), Part(VALUE, "n", (5,), 0, 5, counts)],
        [Part(VALUE, "a.b", (4, 6), 10, 14, whole, 10), Part("exp_avg", "a.b", (4, 6), 3, 4, whole, 3, steps=7.0)],
    )
    for number, parts in enumerate(pieces):
        copy = HostCopy()
        copy.take(parts, torch.device("cpu"))
        written = copy.write(tmp_path / f"piece-{number}.safetensors")
        assert written.bytes == (tmp_path / f"piece-{number}.safetensors").stat().st_size
    with Pieces(tmp_path.glob("*.safetensors")) as read:
        assert torch.equal(read.whole("a.b"), whole)
        assert torch.equal(read.whole("n"), counts)
        assert read.read(VALUE, "a.b", 8, 5).tolist() == [8, 9, 10, 11, 12]
        assert read.read("exp_avg", "a.b", 4, 2).tolist() == [4, 5]
        assert read.steps == {"a.b": 7.0}
        with pytest.raises(ValueError, match=r"hold exp_avg of a\.b to element 7 only, not to 8"):
            read.read("exp_avg", "a.b", 4, 4)


def test_a_tensor_that_is_not_contiguous(tmp_path: Path) -> None:
    turned = torch.arange(6.0).view(2, 3).T
    copy = HostCopy()
    copy.take([Part(VALUE, "t", (3, 2), 2, 4, turned, 2)], torch.device("cpu"))
    copy.write(tmp_path / "piece-0.safetensors")
    with Pieces([tmp_path / "piece-0.safetensors"]) as read:
        assert read.read(VALUE, "t", 2, 4).tolist() == turned.flatten().tolist()[2:]
    other = torch.zeros(2, 3).T
    Part(VALUE, "t", (3, 2), 0, 6, other).write(turned.flatten())
    assert torch.equal(other, turned)


def test_files_of_deepspeed_itself_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "step-00000004"
    path.mkdir(parents=True)
    old = {"step": 4, "world_size": 2, "zero_stage": 1, "order": {"seed": 0}, "milestone": False}
    (path / "state.json").write_text(json.dumps({"state": old, "files": {}}))
    assert damage(path, contents=True) is None
    with pytest.raises(ConfigError, match=r"DeepSpeed itself.*name=\.\.\. init_from="):
        check_resume(path, read_state(path))
    with pytest.raises(ConfigError, match="holds the files of DeepSpeed itself"):
        check_continues(tmp_path / "run", CheckpointConfig())
    check_resume(path, ResumeState(4, 2, 1, {"seed": 0}, form=FORM), {"seed": 0})
    with pytest.raises(ConfigError, match="reached with seed = 0, now it is 1"):
        check_resume(path, ResumeState(4, 2, 1, {"seed": 0}, form=FORM), {"seed": 1})
    with pytest.raises(ConfigError, match=r"earlier version of selfsight, which kept no masks.*init_from="):
        check_resume(path, ResumeState(4, 2, 1, {"seed": 0}, form=FORM), {"seed": 0, "masks": "splitmix64"})
