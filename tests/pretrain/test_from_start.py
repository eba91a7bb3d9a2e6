"""A run compared with the weights that it goes on from: what is measured, what is best, what is worse, what is held."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_continuing import continued
from test_train import rows
from tiny import build, random_batch

from launch.report.page import write_report
from pretrain.checkpoints.folder import CheckpointFolder, read_state
from pretrain.config import CheckpointConfig
from pretrain.config.load import ConfigError, parse_config
from pretrain.continuing.start import Hold, relative_distance
from pretrain.diagnostics.alarms import Alarms, Moment
from pretrain.diagnostics.start import linear_cka, weight_distance
from pretrain.diagnostics.worse_than_start import WorseThanStart
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import load_encoder
from pretrain.methods.frozen import Frozen
from pretrain.methods.gram import gram_loss
from pretrain.run import pretrain
from pretrain.tracking.course import Course, measured_rows


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_linear_cka_is_the_papers_and_blind_to_turning_and_scale() -> None:
    x, y = noise(20, 5), noise(20, 7, seed=1)
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    k, own = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # HSIC of linear kernels, equation 3
    slow = (k * own).sum() / ((k * k).sum() * (own * own).sum()).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(slow))
    turned = x @ torch.linalg.qr(noise(5, 5, seed=2))[0] * 3 + 1
    assert linear_cka(x, turned) == pytest.approx(1.0)


def course(*values: float) -> list[tuple[int, dict[str, float]]]:
    return [(10 * place, {"knn_top1": value, "knn_standard_error": 0.01}) for place, value in enumerate(values)]


def test_the_best_is_marked_and_worse_is_beyond_two_errors() -> None:
    known = course(0.30, 0.31, 0.35, 0.275, 0.27, 0.25)
    told = Course()
    assert [told.take(*row) for row in known] == [False, True, True, False, False, False]
    assert [Course.of(known[: count + 1]).is_worse for count in range(6)] == [False, False, False, False, True, True]
    assert told.words() == (
        "step 20 is best by k-NN (35.0% against the start's 30.0%); now, at step 50, it is worse than the start (25.0%)"
    )
    assert Course.of(known[:3]).words() == "step 20 is best by k-NN (35.0% against the start's 30.0%); that is now"
    assert Course.of(course(0.3, 0.29)).words() == (
        "the start is best by k-NN (30.0%); now, at step 10, it is not shown to be worse than the start (29.0%)"
    )
    unlabelled = [(0, {"slice_rankme": 20.0}), (5, {"slice_rankme": 18.5}), (9, {"slice_rankme": 17.0})]
    assert [Course.of(unlabelled[:count]).is_worse for count in (2, 3)] == [False, True]


def test_the_alarm_ends_a_run_after_two_measurements() -> None:
    told = Course()
    alarms = Alarms([WorseThanStart(told)], stop_on=("worse_than_start",))
    fatal = []
    for step, metrics in course(0.30, 0.2, 0.31, 0.2, 0.2):
        told.take(step, metrics)
        alarms.look(Moment(step, 0.0, metrics))
        alarms.look(Moment(step + 1, 0.0, {"loss": 1.0}))  # a line that says nothing of it
        fatal.append(alarms.fatal())
    assert fatal == [None, None, None, None, "worse_than_start"]


def test_a_run_is_measured_from_before_its_first_step(source: Path, tmp_path: Path) -> None:
    data = continued(source, tmp_path, measure_images=40, measure_every_epochs=0.1)
    data["checkpoint"] = {"every_steps": 100, "keep_last": 1}
    run = pretrain(parse_config(data))
    found = [row for row in rows(data) if "drift_cka" in row]
    assert [row["step"] for row in found] == [0, 2, 3, 5, 6, 8]
    assert found[0]["drift_weights"] == found[0]["drift_patches"] == 0.0
    assert found[0]["drift_cka"] == pytest.approx(1.0)
    assert all(row["drift_weights"] > 0 and row["drift_cka"] < 1 for row in found[1:])
    start, _ = load_encoder(run / "start")
    began, _ = load_encoder(source / "encoder")
    assert all(torch.equal(a, b) for a, b in zip(start.state_dict().values(), began.state_dict().values(), strict=True))
    last, _ = load_encoder(run / "encoder")
    assert weight_distance(last, start) == pytest.approx(found[-1]["drift_weights"], rel=1e-5)
    best = Course.of(measured_rows(run / "metrics.jsonl", 8)).best
    assert best is not None
    kept = {int(path.name[5:]): read_state(path).best for path in (run / "checkpoints").glob("step-*")}
    assert kept == {**({best.step: True} if best.step else {}), 8: best.step == 8}
    known = (run / "metrics.jsonl").read_text()
    for path in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    shutil.rmtree(run / "encoder")
    again = pretrain(parse_config(data))  # from the beginning once more, which is in the file already
    assert [row["step"] for row in rows(data) if "drift_cka" in row] == [0, 2, 3, 5, 6, 8]
    assert known.splitlines()[0] == (again / "metrics.jsonl").read_text().splitlines()[0]


def test_the_best_checkpoint_is_kept_until_there_is_a_better(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, CheckpointConfig(keep_last=1))
    for step, best in ((1, False), (2, True), (3, False), (4, False), (5, True), (6, False)):
        place = folder.path(step)
        place.mkdir(parents=True)
        state = {"step": step, "world_size": 1, "zero_stage": 0, "order": {}, "best": best}
        (place / "state.json").write_text(json.dumps({"state": state, "files": {}}))
        folder._prune(just_saved=place)
        kept = [int(path.name[5:]) for path in folder.all()]
        assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6]}[step]


@pytest.mark.parametrize("name", ["mae", "mim", "dino", "ijepa", "lejepa", "mp3"])
def test_what_holds_is_nothing_at_the_start_and_pulls_back(
    name: str,
    source: Path,
    tmp_path: Path,
) -> None:
    data = continued(source, tmp_path, method=name, feature_weight=2.0, gram_weight=3.0)
    config = parse_config(data)
    method = build(config).train()
    export = method.frozen_encoder()
    assert export is not None
    assert method.encoder is not None
    assert config.encoder is not None
    start = build_encoder(config.encoder, (32, 32))
    state = {key: value for key, value in method.encoder.state_dict().items() if key != "mask_token"}
    start.load_state_dict(state)
    batch = random_batch(config)
    plain = method(batch, 0)
    handle = method.register_forward_hook(Hold(config, Frozen(start)))  # type: ignore[arg-type]
    held = method(batch, 0)
    assert float(held["start_features"]) == float(held["start_gram"]) == 0.0
    torch.testing.assert_close(held["loss"], plain["loss"])
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(0.05 * noise(*parameter.shape).float())
    held = method(batch, 0)
    handle.remove()
    plain = method(batch, 0)
    expected = plain["loss"] + 2 * held["start_features"] + 3 * held["start_gram"]
    torch.testing.assert_close(held["loss"], expected)
    images = method.normalise(batch["global_crops"][:, 0])
    ours, theirs = method.encoder(images), start.eval()(images)
    torch.testing.assert_close(held["start_gram"], gram_loss(ours.tokens, theirs.tokens))


def test_the_distance_is_relative_to_the_start() -> None:
    wanted = noise(4, 6).float()
    assert float(relative_distance(wanted * 1.5, wanted)) == pytest.approx(0.25, rel=1e-5)


def test_a_start_that_is_gone_is_told(source: Path, tmp_path: Path) -> None:
    data = continued(source, tmp_path) | {"train": {"steps": 2, "batch_size": 8}, "checkpoint": {"every_steps": 1}}
    run = pretrain(parse_config(data))
    shutil.rmtree(run / "encoder")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "start").rename(run / "gone")
    with pytest.raises(ConfigError, match="start is gone"):
        pretrain(parse_config(data))


def test_the_page_opens_with_the_course(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: on\ncontinuing: {ramp_steps: 1}\n")
    lines = [json.dumps({"step": step, "epoch": step / 10, **metrics}) for step, metrics in course(0.3, 0.35, 0.2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "knn']))
    page = write_report([tmp_path]).read_text(encoding="utf-8")
    told = "Step 10 is best by k-NN (35.0% against the start&#39;s 30.0%); now, at step 20, it is worse than the start"
    assert '<div class="verdict bad"><p class="words">' + told in page
    assert '"label":"the start","y":0.3' in page.replace('": ', '":').replace(', "', ',"')
