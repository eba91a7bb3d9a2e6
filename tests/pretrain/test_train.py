"""Runs of the whole trainer in processes of their own: ranks, accumulation, ZeRO, kill -9, signals, resuming."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prefork import OF_THIS_CHECKOUT, run_ranks
from tiny import config_data, write_shards

from data_pipelines.shards.scan import build_index
from pretrain.checkpoints.folder import CheckpointFolder, damage, read_state
from pretrain.config.load import ConfigError, parse_config
from pretrain.diagnostics import NonFiniteError, check_finite
from pretrain.encoders.saved import load_encoder
from pretrain.run import pretrain
from pretrain.survival.run_folder import alone_in, check_run_folder, write_config
from pretrain.survival.stopping import StopRequest

HERE = Path(__file__).parent


def run_all(
    configs: list[dict[str, Any]], ranks: int, tmp_path: Path, expect: int = 0, worker: str = "worker.py"
) -> str:
    """Run the configurations one after the other on so many ranks; the output of all of them."""
    listed = tmp_path / f"configs-{ranks}-{len(list(tmp_path.glob('configs-*')))}.json"
    listed.write_text(json.dumps(configs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [listed.with_suffix(f".{rank}.log") for rank in range(ranks)]
    ranked = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    codes = run_ranks(worker, [str(listed)], ranked, logs)
    outputs = [log.read_text() for log in logs]
    assert codes == [expect] * ranks, "\n".join(outputs)
    return "\n".join(outputs)


def rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    path = Path(data["runs"]) / data["name"] / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(data: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in rows(data)]


METHODS = ("mae", "mim", "dino")
STAGES = ((0, 2), (1, 1), (2, 2), (3, 1))  # of ZeRO, each with one or two micro-batches a step


@pytest.fixture(scope="module")
def one_and_two_ranks(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """10 steps, over an epoch's end, of every method, on 1 rank with accumulation 1 and 2, and on 2 ranks by STAGES."""
    folder = tmp_path_factory.mktemp("ranks")
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for method, ranks in itertools.product(METHODS, (1, 2)):
        for stage, grad_accum_steps in ((0, 1), (0, 2)) if ranks == 1 else STAGES:
            data = config_data(
                method,
                "vit" if method != "mim" else "swin",
                shards,
                folder,
                train={"steps": 10, "batch_size": 16, "grad_accum_steps": grad_accum_steps},
                engine={"zero_stage": stage},
                checkpoint={"every_steps": 100},
            )
            data["name"] = f"{method}-{ranks}-{stage}-{grad_accum_steps}"
            cells[method, ranks, stage, grad_accum_steps] = data
    for method, ranks in itertools.product(METHODS, (1, 2)):  # a few at a time: DeepSpeed's engines hold their memory
        run_all([data for key, data in cells.items() if key[:2] == (method, ranks)], ranks, folder)
    return cells


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("stage", "grad_accum_steps"), STAGES)
def test_two_ranks_learn_what_one_does(
    one_and_two_ranks: dict[tuple[Any, ...], dict[str, Any]], method: str, stage: int, grad_accum_steps: int
) -> None:
    alone = one_and_two_ranks[method, 1, 0, 1]
    together = one_and_two_ranks[method, 2, stage, grad_accum_steps]
    assert column(together, "ids_digest") == column(alone, "ids_digest")
    assert len(set(column(alone, "ids_digest"))) == 10
    assert column(together, "loss") == pytest.approx(column(alone, "loss"), rel=2e-5)
    assert column(together, "grad_norm") == pytest.approx(column(alone, "grad_norm"), rel=1e-4)
    assert column(alone, "loss")[-1] != column(alone, "loss")[0]


def test_two_ranks_learn_the_patch_loss_as_one_does(shards: Path, tmp_path: Path) -> None:
    """Masks are stratified over the global batch, and masked tokens differ in number from rank to rank."""
    cells = []
    for name, stage, grad_accum_steps in (("alone", 0, 1), ("together", 3, 2)):
        data = config_data("dino", "vit", shards, tmp_path, train={"steps": 10, "grad_accum_steps": grad_accum_steps})
        data |= {"name": name, "engine": {**data["engine"], "zero_stage": stage}}
        data["method"] |= {"ibot": {"separate_head": True}}
        cells.append(data)
    run_all(cells[:1], 1, tmp_path)
    run_all(cells[1:], 2, tmp_path)
    assert column(cells[1], "ids_digest") == column(cells[0], "ids_digest")
    for name in ("loss", "ibot", "dino"):
        assert column(cells[1], name) == pytest.approx(column(cells[0], name), rel=2e-5), name


def test_drop_path_is_the_same_on_any_ranks_and_accumulation(shards: Path, tmp_path: Path) -> None:
    """What is dropped belongs to a row of the global batch; a method that scores images one by one learns the same."""
    cells = {}
    for ranks, accumulation in ((1, 1), (1, 4), (2, 2), (3, 4)):
        train = {"steps": 4, "batch_size": 24, "grad_accum_steps": accumulation}
        data = config_data("dino", "vit", shards, tmp_path, train=train)
        data["encoder"]["drop_path"] = 0.5
        stage = 3 if accumulation == 2 else 0  # whose hooks look into what blocks are given
        data |= {"name": f"{ranks}-{accumulation}", "engine": {**data["engine"], "zero_stage": stage}}
        cells[ranks, accumulation] = data
    for ranks in (1, 2, 3):
        run_all([data for key, data in cells.items() if key[0] == ranks], ranks, tmp_path)
    alone = cells.pop((1, 1))
    for name, data in cells.items():
        assert column(data, "ids_digest") == column(alone, "ids_digest"), name
        assert column(data, "loss") == pytest.approx(column(alone, "loss"), rel=2e-5), name
        assert column(data, "grad_norm") == pytest.approx(column(alone, "grad_norm"), rel=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_alone_changes_nothing(
    one_and_two_ranks: dict[tuple[Any, ...], dict[str, Any]], method: str
) -> None:
    whole, halves = (one_and_two_ranks[method, 1, 0, grad_accum_steps] for grad_accum_steps in (1, 2))
    assert column(halves, "loss") == pytest.approx(column(whole, "loss"), rel=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_stage_publishes_the_same_encoder(
    one_and_two_ranks: dict[tuple[Any, ...], dict[str, Any]], method: str
) -> None:
    """Under ZeRO 3 each rank holds a piece of student and teacher; what is exported is whole."""
    states = []
    for stage, grad_accum_steps in (STAGES[0], STAGES[-1]):
        data = one_and_two_ranks[method, 2, stage, grad_accum_steps]
        encoder, card = load_encoder(Path(data["runs"]) / data["name"] / "encoder")
        assert (card.method, card.step) == (method, 10)
        states.append(encoder.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=2e-4, rtol=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_fp32_and_keeps_its_parameters_fp32(shards: Path, tmp_path: Path, stage: int) -> None:
    """At a low rate: Adam's first step is the sign of each gradient, which rounding turns where that is near nothing.

    At ten times the rate other seeds' losses part by a half after it, in every stage alike. From the second step on,
    stage 3 also gathers the weights of linear layers in bf16, those of the prototypes too.
    """
    runs = [
        config_data(
            "dino", "vit", shards, tmp_path, engine={"zero_stage": stage, "precision": precision}, optim={"lr": 1e-4}
        )
        | {"name": precision}
        for precision in ("fp32", "bf16")
    ]
    run_all(runs, 1, tmp_path)
    exact, rounded = (column(data, "loss") for data in runs)
    assert exact != rounded
    assert rounded[0] == pytest.approx(exact[0], rel=0.005)  # nothing is learned yet
    assert rounded == pytest.approx(exact, rel=0.02)
    saved = CheckpointFolder(tmp_path / "bf16", parse_config(runs[1]).checkpoint).all()[-1]
    encoder, _ = load_encoder(saved / "encoder")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    # a teacher in bf16 would have moved in steps of 2^-8 or not at all
    values = torch.cat([parameter.flatten() for parameter in encoder.parameters()])
    assert (values != values.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name == "mim" else []) for name in METHODS]
)
def test_kill_9_and_the_same_command_again(shards: Path, tmp_path: Path, method: str) -> None:
    """Every later step has the ids and the loss of a run that nobody killed, to the last bit, each step once."""
    plan = {"steps": 60, "batch_size": 8}
    quiet = config_data(method, "vit", shards, tmp_path, train=plan) | {"name": "quiet"}
    killed = config_data(method, "vit", shards, tmp_path, train=plan) | {"name": "killed"}
    for data in (quiet, killed):
        data["encoder"]["drop_path"] = 0.2
        data["checkpoint"] = {"every_steps": 7}
    path = tmp_path / "killed.json"
    path.write_text(json.dumps([killed]))
    log = tmp_path / "killed" / "metrics.jsonl"
    checkpoints = CheckpointFolder(tmp_path / "killed", parse_config(killed).checkpoint)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "worker.py"), str(path)], stdout=subprocess.DEVNULL, env=OF_THIS_CHECKOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 10 and checkpoints.all()):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert len(rows(killed)) < 60
    output = run_all([killed, quiet], 1, tmp_path)
    assert "continuing from" in output
    assert column(killed, "step") == list(range(1, 61))
    for name in ("ids_digest", "loss", "grad_norm", "lr"):
        assert column(killed, name) == column(quiet, name), name


def test_term_saves_and_ends_with_85(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 5000, "batch_size": 8})
    data["checkpoint"] = {"every_steps": 4000}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "mae-vit" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 85, output
    checkpoint, passed_over = CheckpointFolder(tmp_path / "mae-vit", parse_config(data).checkpoint).last()
    assert checkpoint is not None
    assert not passed_over
    assert read_state(checkpoint).step == column(data, "step")[-1]


def test_two_ranks_stop_continue_and_finish_as_a_user_starts_them(shards: Path, tmp_path: Path) -> None:
    data = config_data("dino", "vit", shards, tmp_path, train={"steps": 120}, engine={"zero_stage": 1})
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(data))
    command = [sys.executable, "-m", "launch", "launch", "--nproc", "2", str(preset)]
    log = tmp_path / "log"
    codes = []
    for stop in (True, False, False):  # stopped in the middle, continued to the end, started once more
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            metrics = tmp_path / data["name"] / "metrics.jsonl"
            while stop and process.poll() is None and not (metrics.is_file() and len(metrics.read_text()) > 2000):
                time.sleep(0.05)
            if stop:
                process.terminate()
            codes.append(process.wait(timeout=120))
    assert codes == [85, 0, 0], log.read_text()
    assert column(data, "step") == list(range(1, 121))
    assert "finished 120 steps" in log.read_text()
    assert load_encoder(tmp_path / data["name"] / "encoder")[1].step == 120


@pytest.mark.parametrize("harm", ["cut", "flipped bit"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(shards: Path, tmp_path: Path, harm: str) -> None:
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 12})
    run_all([data], 1, tmp_path)
    checkpoints = CheckpointFolder(tmp_path / "mae-vit", parse_config(data).checkpoint)
    assert [path.name for path in checkpoints.all()] == ["step-00000008", "step-00000012"]  # keep_last: 2
    assert (checkpoints.folder / "latest").read_text() == "step-00000012\n"
    last = checkpoints.all()[-1]
    file = next(last.glob("piece-*"))
    content = bytearray(file.read_bytes())
    if harm == "cut":
        del content[1000:]
    else:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = "has 1000 bytes instead of" if harm == "cut" else "its checksum differs"
    assert told in str(damage(last, contents=True))
    output = run_all([data], 1, tmp_path)
    assert "is damaged" in output
    assert "continuing from" in output
    assert column(data, "step") == list(range(1, 13))
    assert damage(checkpoints.all()[-1], contents=True) is None


def test_milestones_are_kept_for_good(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 30, "batch_size": 24})
    data["checkpoint"] = {"every_steps": 2, "keep_last": 1, "milestone_every_epochs": 2}  # 5 steps an epoch
    run_all([data], 1, tmp_path)
    kept = [path.name for path in CheckpointFolder(tmp_path / "mae-vit", parse_config(data).checkpoint).all()]
    assert kept == ["step-00000010", "step-00000020", "step-00000030"]


def test_bad_samples_are_counted_and_named_and_the_order_stays_on_any_number_of_ranks(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards)
    shard = sorted(shards.glob("train-*.tar"))[0]
    index = build_index(shard)
    with shard.open("r+b") as file:
        for row in (3, 4, 11):
            file.seek(index.entry(0, row).image_offset)
            file.write(b"not an image")
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 10, "batch_size": 24})  # two epochs
    data["data"]["max_bad_share"] = 0.5
    digests = []
    for ranks in (1, 2):
        data["name"] = f"ranks-{ranks}"
        run_all([data], ranks, tmp_path)
        digests.append(column(data, "ids_digest"))
        assert column(data, "bad_samples")[-1] in range(2 * 4, 3 * 4 + 1)  # 3, 4, 4 again, 11; and what is read ahead
        files = sorted((tmp_path / data["name"] / "bad_samples").iterdir())
        assert {path.name for path in files} <= {f"rank-{rank:05d}.jsonl" for rank in range(ranks)}
        lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        keys = index.keys
        assert {(line["key"], line["instead"]) for line in lines} == {
            (keys[bad], keys[instead]) for bad, instead in ((3, 5), (4, 5), (11, 12))
        }
    assert digests[0] == digests[1]


def test_who_makes_the_batches_changes_no_digit(shards: Path, tmp_path: Path) -> None:
    runs = [
        config_data("dino", "vit", shards, tmp_path, train={"steps": 4}, data={"workers": workers})
        | {"name": f"by-{workers}"}
        for workers in (0, 2)
    ]
    run_all(runs, 1, tmp_path)
    for name in ("ids_digest", "loss", "bad_samples"):
        assert column(runs[0], name) == column(runs[1], name)


def test_another_order_is_refused(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path, engine={"zero_stage": 1}, train={"steps": 8})
    run_all([data], 2, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, num_images=100)
    changed = {**data, "data": {**data["data"], "train": str(other)}}
    assert "the run would see other batches" in run_all([changed], 2, tmp_path, expect=1)


def test_another_configuration_in_the_same_folder_is_refused(mae_data: dict[str, Any]) -> None:
    write_config(check_run_folder(parse_config(mae_data)), parse_config(mae_data))
    mae_data["tracking"]["log_every_steps"] = 3
    mae_data["data"]["threads"] = 2
    check_run_folder(parse_config(mae_data))
    mae_data["optim"]["lr"] = 5.0
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.001 -> 5\.0"):
        check_run_folder(parse_config(mae_data))


def test_a_run_is_trained_by_one_job_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    told = rf"being trained by another process .*{os.getpid()}"
    with alone_in(folder), pytest.raises(ConfigError, match=told), alone_in(folder):
        pytest.fail("locked twice")
    with alone_in(folder):
        assert (folder / ".lock").is_file()  # the first has let go


def test_a_finished_run_is_left_as_it_is(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = config_data("mae", "vit", shards, tmp_path)
    run_all([data], 1, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mae-vit").rglob("*")}
    assert pretrain(parse_config(data), StopRequest()) == tmp_path / "mae-vit"
    assert "mae-vit is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mae-vit").rglob("*")} == before
    (tmp_path / "others").mkdir()
    shutil.copy(shards / "train-000000.tar", tmp_path / "others")
    data["data"]["train"] = str(tmp_path / "others")
    with pytest.raises(ConfigError, match="the data are not those that"):
        pretrain(parse_config(data), StopRequest())


def test_a_folder_that_is_no_run_is_refused(mae_data: dict[str, Any]) -> None:
    folder = Path(mae_data["runs"]) / mae_data["name"]
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is not a run"):
        check_run_folder(parse_config(mae_data))


def test_a_loss_that_is_not_finite_stops_the_run_in_words(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path, optim={"lr": 1e30, "clip_grad": 0.0}, train={"steps": 50})
    data["checkpoint"] = {"every_steps": 1}
    output = run_all([data], 2, tmp_path, expect=1)
    assert "loss became" in output
    assert "NonFiniteError" in output
    assert "the last good checkpoint is" in output


def test_non_finite_names_step_rank_and_checkpoint() -> None:
    check_finite([1.0, 2.0], 3.0, step=7, last_checkpoint=None)
    with pytest.raises(NonFiniteError, match=r"loss became nan on rank 1 in step 7; the last good checkpoint is here"):
        check_finite([1.0, float("nan")], 3.0, step=7, last_checkpoint="here")
    with pytest.raises(NonFiniteError, match=r"gradient norm became inf in step 7"):
        check_finite([1.0, 1.0], float("inf"), step=7, last_checkpoint=None)
