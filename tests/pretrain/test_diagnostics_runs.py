"""Diagnostics in real tiny runs: layers that fail, steps left out, collapses, k-NN on any number of ranks."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from prefork import OF_THIS_CHECKOUT
from safetensors.torch import load_file
from test_train import column, rows, run_all
from tiny import config_data

from pretrain.config.load import ConfigError, parse_config
from pretrain.diagnostics import named_data
from pretrain.survival.history import read_history
from pretrain.survival.stopping import EXIT_TROUBLE

HERE = Path(__file__).parent
LAYER = "encoder.vit.blocks.1.mlp.fc1"
QUIET = {"knn_every_epochs": None, "inspect_every_steps": 0}


def faulty(data: dict[str, Any], steps: list[int], kind: str, rank: int = 1) -> dict[str, Any]:
    return {**data, "fault": {"steps": steps, "kind": kind, "rank": rank, "layer": LAYER}}


def folder_of(data: dict[str, Any]) -> Path:
    return Path(data["runs"]) / data["name"]


def alarms_of(data: dict[str, Any], name: str | None = None) -> list[dict[str, Any]]:
    events = [event for event in read_history(folder_of(data)) if event["event"] == "alarm"]
    return [event for event in events if name in (None, event["name"])]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and val shards of 120 images each: flat colours that tell the ten classes, with some noise."""
    folder = tmp_path_factory.mktemp("labelled")
    for split in ("train", "val"):
        with wds.TarWriter(str(folder / f"{split}-000000.tar")) as writer:
            for number in range(120):
                generator = np.random.default_rng([number, split == "val"])
                colour = np.random.default_rng(number % 10).integers(40, 216, 3)
                image = np.clip(colour + generator.normal(0, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
                file = io.BytesIO()
                Image.fromarray(image).save(file, "PNG")
                writer.write({"__key__": f"{split}-{number:06d}", "png": file.getvalue(), "cls": str(number % 10)})
    return folder


def test_the_layer_and_the_samples_of_a_value_that_is_not_finite_are_named(shards: Path, tmp_path: Path) -> None:
    """On the rank where it happens, in the forward pass and in the backward pass, and written down."""
    runs = []
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")):
        for kind in ("forward", "gradient"):
            engine = {"zero_stage": stage, "precision": precision}
            data = config_data("mae", "vit", shards, tmp_path, engine=engine, diagnostics=QUIET)
            data |= {"name": f"{kind}-{stage}", "train": {"steps": 8, "batch_size": 8, "grad_accum_steps": 2}}
            runs.append(faulty(data, [5], kind))
    for method in ("dino", "vqkd"):  # whose centre and codebook are of all ranks by the time that it is heard of
        data = config_data(method, "vit", shards, tmp_path, diagnostics=QUIET)
        data["tracking"] |= {"log_every_steps": 100}
        data |= {"name": method, "train": {"steps": 8, "batch_size": 8, "grad_accum_steps": 2}}
        runs.append(faulty(data, [5], "forward"))
    output = run_all(runs, 2, tmp_path, worker="faulty_worker.py")
    assert output.count("NonFiniteError") == 2 * len(runs)  # on two ranks
    assert output.count("the last good checkpoint is") == 2 * len(runs)
    for data in runs:
        found = json.loads((folder_of(data) / "non_finite" / "step-00000006.json").read_text())
        assert list(found["rank"]) == ["1"]
        finding = found["rank"]["1"]
        assert (finding["layer"], finding["kind"], finding["where"]) == (LAYER, "Linear", data["fault"]["kind"])
        assert finding["micro_batch"] == 0
        assert [len(sample["key"]) for sample in finding["samples"]] == [6, 6]
        assert not found["skipped"]
        told = alarms_of(data, "non_finite")
        assert [event["step"] for event in told] == [6]
        assert LAYER in told[0]["text"]
        if data["engine"].get("zero_stage", 0) < 3 and finding["where"] == "gradient":
            assert any(name.startswith("encoder") for name in finding["parameters"])


@pytest.mark.parametrize("method", ["mae", pytest.param("dino", marks=pytest.mark.slow)])
def test_a_step_left_out_changes_nothing_but_the_count(shards: Path, tmp_path: Path, method: str) -> None:
    """Every later step has its own batch, and weights, moments and centre as if the bad step had not been."""
    settings = {"diagnostics": {**QUIET, "skip_non_finite": 2}, "train": {"steps": 8, "batch_size": 8}}
    settings["train"]["grad_accum_steps"] = 2
    runs: dict[tuple[int, str], dict[str, Any]] = {}
    late: dict[int, dict[str, Any]] = {}
    for stage in (0, 1, 2, 3):
        data = config_data(method, "vit", shards, tmp_path, engine={"zero_stage": stage}) | settings
        for kind in ("forward", "gradient"):
            runs[stage, kind] = faulty({**data, "name": f"{kind}-{stage}"}, [3], kind)
        seldom = {**data["tracking"], "log_every_steps": 100}  # heard of in the middle of the next step
        late[stage] = faulty({**data, "name": f"late-{stage}", "tracking": seldom}, [3], "gradient")
    plain = config_data(method, "vit", shards, tmp_path) | settings
    bounded, fine = faulty({**plain, "name": "bounded"}, [3, 4, 5], "gradient"), {**plain, "name": "fine"}
    output = run_all([*runs.values(), *late.values(), bounded, fine], 2, tmp_path, worker="faulty_worker.py")
    for stage, run in late.items():
        assert column(run, "loss")[-1] == column(runs[stage, "gradient"], "loss")[-1]
        assert [event["step"] for event in alarms_of(run, "non_finite")] == [4]
    for (stage, _), run in runs.items():
        losses = column(run, "loss")
        assert column(run, "step") == list(range(1, 9))
        assert column(run, "ids_digest") == column(fine, "ids_digest")
        assert losses[:3] == pytest.approx(column(fine, "loss")[:3], rel=2e-5)
        assert all(map(math.isfinite, losses[4:]))
        assert losses[4:] == column(runs[stage, "forward"], "loss")[4:]  # whatever it was, nothing of it is left
        assert losses[4:] == pytest.approx(column(runs[0, "forward"], "loss")[4:], rel=2e-5)
        assert [event["skipped"] for event in alarms_of(run, "non_finite")] == [True]
    assert "the step is left out, 1 more may be" in output
    assert [event["skipped"] for event in alarms_of(bounded)] == [True, True, False]
    assert len(rows(bounded)) == 5


def test_a_codebook_forgets_the_tokens_of_a_step_left_out(shards: Path, tmp_path: Path) -> None:
    """Whenever it is heard of: codes that die are put on tokens of their own step."""
    runs = []
    for every in (1, 100):
        data = config_data("vqkd", "vit", shards, tmp_path, tracking={"log_every_steps": every})
        data |= {"name": f"every-{every}", "diagnostics": {**QUIET, "skip_non_finite": 1}}
        data["method"] |= {"restart_below": 0.9}
        runs.append(faulty(data, [3], "forward"))
    run_all(runs, 2, tmp_path, worker="faulty_worker.py")
    books = [load_file(folder_of(run) / "tokenizer" / "model.safetensors") for run in runs]
    for name, value in books[0].items():
        assert torch.equal(value, books[1][name]), name


def test_looking_changes_no_bit_of_what_is_learned(labelled: Path, tmp_path: Path) -> None:
    """With k-NN and inspections in every step, and with none; drop path draws from the generator."""
    runs = []
    for method in ("mae", "dino", "mim"):
        for name, settings in (
            ("off", QUIET),
            ("on", {"knn_every_epochs": 0.01, "inspect_every_steps": 1, "skip_non_finite": 5}),
        ):
            family = "swin" if method == "mim" else "vit"
            data = config_data(method, family, labelled, tmp_path, diagnostics=settings)
            data["encoder"]["drop_path"] = 0.2
            runs.append(data | {"name": f"{method}-{name}"})
    run_all(runs, 1, tmp_path)
    for off, on in zip(runs[::2], runs[1::2], strict=True):
        for name in ("loss", "grad_norm", "ids_digest"):
            assert column(on, name) == column(off, name), name
        assert {"knn_top1", "rankme", "feature_std", "weight_norm"} <= set(rows(on)[-1])


def test_knn_is_the_same_on_any_number_of_ranks(labelled: Path, tmp_path: Path) -> None:
    found, rankme = [], []
    for ranks, stage in ((1, 0), (4, 0), (2, 3)):
        data = config_data("mae", "vit", labelled, tmp_path, engine={"zero_stage": stage}, optim={"lr": 1e-12})
        data |= {"name": f"{ranks}-{stage}", "diagnostics": {"knn_every_epochs": 0.2, "inspect_every_steps": 2}}
        run_all([data], ranks, tmp_path)
        measured = [row for row in rows(data) if "knn_top1" in row]
        assert [row["step"] for row in measured] == [3, 6]
        found.append([(row["knn_top1"], row["knn_standard_error"]) for row in measured])
        rankme.append([row["rankme"] for row in rows(data) if "rankme" in row])
        assert all(0 < row["knn_share"] < 1 for row in measured)
    assert found == [found[0]] * 3
    assert [len(each) for each in rankme] == [5] * 3  # after steps 1, 2, 4, 6, 8
    assert np.array(rankme) == pytest.approx(np.array([rankme[0]] * 3), rel=1e-3)
    accuracy, error = found[0][0]
    assert accuracy > 0.3  # by chance 0.1
    assert error == pytest.approx((accuracy * (1 - accuracy) / 40) ** 0.5)


def test_unlabelled_data_turn_knn_off_with_a_line(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 2})
    named = {**data, "name": "named", "diagnostics": {"knn_data": str(shards)}}
    output = run_all([data, named], 1, tmp_path, expect=0, worker="faulty_worker.py")
    assert "online k-NN is off: there are no val-*.tar in" in output
    assert "online k-NN is off: " in output.split("finished 2 steps")[1]
    with pytest.raises(ConfigError, match=r"diagnostics\.knn_data: .* holds no val-"):
        named_data(parse_config(named))  # which a run asks before it begins


def test_a_collapse_ends_the_run_with_87_where_asked(shards: Path, tmp_path: Path) -> None:
    """A teacher that is far too soft says the same of every image."""
    data = config_data("dino", "vit", shards, tmp_path, train={"steps": 200}, checkpoint={"every_steps": 30})
    data["method"] |= {"teacher_temperature": 100.0, "warmup_teacher_temperature": 100.0}
    data["diagnostics"] = {"stop_on": ["teacher_uniform"], "patience": 5}
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(data))
    command = [sys.executable, "-m", "launch", "launch", "--nproc", "2", str(preset)]
    done = subprocess.run(command, capture_output=True, text=True, env=OF_THIS_CHECKOUT, timeout=300)
    assert done.returncode == EXIT_TROUBLE, done.stdout + done.stderr
    assert done.stdout.count("ALARM teacher_uniform: teacher_entropy is 4.16") == 1
    assert "error: teacher_uniform, since step 50:" in done.stderr
    assert f"the last checkpoint from before is {tmp_path / 'dino-vit/checkpoints/step-00000030'}" in done.stderr
    told = {event["name"]: event["step"] for event in alarms_of(data)}
    assert {"teacher_uniform", "loss_at_ln_k"} <= set(told)
    (ended,) = (event for event in read_history(folder_of(data)) if event["event"] == "ended")
    assert (ended["code"], ended["reason"].partition(":")[0]) == (EXIT_TROUBLE, "teacher_uniform")
    assert rows(data)[-1]["alarm/teacher_uniform"] == 1.0
    assert ended["step"] in range(54, 57)


def test_what_goes_wrong_is_named_by_its_alarm(shards: Path, tmp_path: Path) -> None:
    """Blank images, a teacher that stands still, a rate that is none."""
    blank = tmp_path / "blank"
    blank.mkdir()
    with wds.TarWriter(str(blank / "train-000000.tar")) as writer:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (90, 120, 60)).save(file, "PNG")
        for number in range(60):
            writer.write({"__key__": f"{number:06d}", "png": file.getvalue()})
    often = {"inspect_every_steps": 10}
    long = {"steps": 80}
    constant = config_data("mae", "vit", blank, tmp_path, train=long, diagnostics=often, optim={"lr": 1e-2})
    constant |= {"name": "constant"}
    constant["method"] |= {"norm_pix_loss": True}
    runs = [constant]
    data = config_data("dino", "vit", shards, tmp_path, train=long, diagnostics=often) | {"name": "still"}
    data["method"] |= {"teacher_momentum": 1.0}
    runs.append(data)
    steps = {"schedule": "steps", "step_epochs": [1], "step_factor": 1e-12}
    runs.append(config_data("mae", "vit", shards, tmp_path, train=long, optim=steps) | {"name": "no-rate"})
    run_all(runs, 1, tmp_path)
    named = [{event["name"] for event in alarms_of(data)} for data in runs]
    assert {"loss_at_zero", "features_one_way"} <= named[0]
    assert "teacher_still" in named[1]
    assert "rate_zero" in named[2]


def test_a_rate_that_explodes_is_named(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 60}, optim={"lr": 1e-3, "clip_grad": 0.0})
    # flat for 25 steps, then a thousand times as much
    data["optim"] |= {"schedule": "steps", "step_epochs": [1.7], "step_factor": 1000.0}
    data["diagnostics"] = {"inspect_every_steps": 5}
    run_all([data], 1, tmp_path, worker="faulty_worker.py")
    named = {event["name"] for event in alarms_of(data)}
    assert "loss_spikes" in named
    assert {"gradient_spikes", "weights_grow", "non_finite"} & named


def test_tiny_healthy_runs_raise_no_alarm(labelled: Path, tmp_path: Path) -> None:
    runs = [
        config_data(method, "vit", labelled, tmp_path, train={"steps": 90}, diagnostics={"inspect_every_steps": 30})
        for method in ("mae", "mim", "dino")
    ]
    dino = runs[-1]  # as `config_data` has it, it does collapse: colours are all that these images differ in
    dino["optim"] |= {"lr": 3e-4}
    dino["method"] |= {"teacher_momentum": 0.99, "freeze_last_layer_epochs": 0.0}
    dino["views"] = {
        name: [{"size": 32, "scale": [0.5, 1.0]}] * 2
        if name == "global_crops"
        else {**crops, "jitter_prob": 0, "grayscale": 0}
        for name, crops in dino["views"].items()
    }
    run_all(runs, 1, tmp_path)
    beside = ("slow", "data_bound", "loss_at_mean")  # of a shared machine, and of images that are half noise
    for data in runs:
        assert not [event["text"] for event in alarms_of(data) if event["name"] not in beside]


@pytest.mark.parametrize("which", ["beside", "named"])
def test_a_rank_without_the_held_out_shards_turns_knn_off_on_all(which: str, labelled: Path, tmp_path: Path) -> None:
    """Neither do the others wait for it, nor does training end; whether its shards are named or lie beside train's."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "train-000000.tar").symlink_to(labelled / "train-000000.tar")
    (here / "data" / "val-000000.tar").symlink_to(labelled / "val-000000.tar")
    runs = []
    for name, folders in (("second", (here, there)), ("first", (there, here))):
        data = config_data("mae", "vit", Path("data"), tmp_path)
        data |= {"name": name, "folders": [*map(str, folders)]}
        data["diagnostics"] = {"knn_every_epochs": 0.2, **({"knn_data": "data"} if which == "named" else {})}
        runs.append(data)
    output = run_all(runs, 2, tmp_path, worker="faulty_worker.py")
    for data in runs:
        assert rows(data)[-1]["step"] == 8
        assert not [row for row in rows(data) if "knn_top1" in row]
    assert "rank 1: " in output
    assert "online k-NN is off" in output
