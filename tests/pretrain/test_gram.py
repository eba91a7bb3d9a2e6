"""Gram anchoring: its loss as slow loops, whose copy its teacher is and when, and the same on any ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cells import finish
from test_train import column, rows, run_all
from tiny import NORMALISATION, build, config_data, random_batch
from torch.nn import functional as F

from pretrain.checkpoints.pieces import Pieces
from pretrain.checkpoints.saving import piece_name
from pretrain.config.load import ConfigError, parse_config
from pretrain.interop.initialise import start_from
from pretrain.methods.dino.anchor import GramAnchor, check_teacher
from pretrain.methods.dino.config import GramConfig
from pretrain.methods.dino.method import Dino
from pretrain.methods.gram import gram_loss, on_grid
from pretrain.run import pretrain


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
def test_the_loss_is_the_papers(negatives: Any) -> None:
    student, teacher = noise(2, 3, 4), noise(2, 3, 6, seed=1)
    total = 0.0
    for image in range(2):
        for i in range(3):
            for j in range(3):
                ours, theirs = (
                    float(F.cosine_similarity(tokens[image, i], tokens[image, j], dim=0))
                    for tokens in (student, teacher)
                )
                theirs = theirs if negatives == "keep" else max(theirs, 0.0)
                ours = max(ours, 0.0) if negatives == "clip" else ours
                total += (ours - theirs) ** 2 / 18
    assert float(gram_loss(student, teacher, negatives=negatives)) == pytest.approx(total, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(gram_loss(student, teacher, negatives=negatives)) == pytest.approx(total, rel=1e-4)


def test_a_map_is_brought_to_another_grid() -> None:
    tokens = noise(2, 16, 3)
    assert on_grid(tokens, (4, 4), (4, 4)) is tokens
    flat = torch.ones(1, 24, 2)
    torch.testing.assert_close(on_grid(flat, (4, 6), (2, 3)), torch.ones(1, 6, 2))


def test_when_the_teacher_is_copied() -> None:
    def copies(**settings: Any) -> list[int]:
        anchor = GramAnchor(GramConfig(**settings), torch.nn.Identity())  # type: ignore[arg-type]
        return [steps for steps in range(1, 60) if anchor.is_copied(steps)]

    assert copies(start_step=10, refresh_every_steps=5, max_refreshes=3) == [10, 15, 20, 25]
    assert copies(start_step=10, refresh_every_steps=None) == [10]
    assert copies(start_step=0, refresh_every_steps=25, max_refreshes=None) == [25, 50]
    assert copies(start_step=10, refresh_every_steps=20, teacher="runs/x") == [30, 50]


@pytest.fixture
def gram_data(shards: Path, tmp_path: Path) -> dict[str, Any]:
    data = config_data("dino", "vit", shards, tmp_path)
    data["views"]["teacher_crops"] = {"size": 64}
    data["method"] |= {"gram": {"start_step": 2, "refresh_every_steps": 2, "max_refreshes": 1}}
    return data


def test_the_teacher_of_a_step_anchors_until_it_is_refreshed(gram_data: dict[str, Any]) -> None:
    config = parse_config(gram_data)
    method = build(config).train()
    assert isinstance(method, Dino)
    assert method.anchor is not None
    batch = random_batch(config)
    equal = []
    for step in range(6):
        result = method(batch, step)
        assert ("gram" in result) == (step >= 2)
        expected = result["dino"] + 2.0 * result["gram"] if "gram" in result else result["loss"]
        torch.testing.assert_close(result["loss"], expected)
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter.add_(0.01)
        method.after_step(step)
        pairs = zip(method.anchor.encoder.parameters(), method.teacher["encoder"].parameters(), strict=True)
        equal.append(all(torch.equal(ours, theirs) for ours, theirs in pairs))
    assert equal == [False, True, False, True, False, False]
    assert not any(parameter.requires_grad for parameter in method.anchor.parameters())
    assert not method.anchor.encoder.training


def test_what_the_gram_teacher_sees_is_its_own(gram_data: dict[str, Any]) -> None:
    """Other pixels in the teacher's crops change the wanted similarities and nothing else."""
    config = parse_config(gram_data)
    method = build(config).eval()
    batch = random_batch(config)
    other = {**batch, "teacher_crops": random_batch(config, seed=7)["teacher_crops"]}
    first, second = (method(each, 5) for each in (batch, other))
    assert torch.equal(first["dino"], second["dino"])
    assert not torch.equal(first["gram"], second["gram"])
    features = method.encoder(method.normalise(batch["global_crops"][:, 0]))
    wanted = method.anchor.encoder(method.normalise(batch["teacher_crops"][:, 0]))
    assert (features.grid, wanted.grid) == ((8, 8), (16, 16))
    maps = wanted.tokens.unflatten(1, (16, 16)).permute(0, 3, 1, 2)
    small = F.interpolate(maps, size=(8, 8), mode="bicubic", align_corners=False, antialias=False)
    expected = gram_loss(features.tokens, small.flatten(2).transpose(1, 2))
    one = {**batch, "global_crops": batch["global_crops"][:, :1].repeat(1, 2, 1, 1, 1)}
    one["teacher_crops"] = batch["teacher_crops"][:, :1].repeat(1, 2, 1, 1, 1)
    torch.testing.assert_close(method(one, 5)["gram"], expected)


def test_a_killed_run_goes_on_to_the_last_bit(gram_data: dict[str, Any], tmp_path: Path) -> None:
    gram_data |= {"name": "cell", "runs": str(tmp_path / "runs"), "checkpoint": {"every_steps": 1}}
    gram_data["train"] = {"steps": 2, "batch_size": 4}
    gram_data["method"]["gram"] = {"start_step": 1, "refresh_every_steps": 1}
    run = finish(gram_data, tmp_path, "encoder")
    assert "gram" in rows({"runs": str(run.parent), "name": run.name})[-1]


#: Ranks, accumulation and ZeRO stage, each compared with one process that takes all at once.
SPLITS = [((2, 2, 3),), pytest.param(((1, 2, 1), (2, 1, 2)), marks=pytest.mark.slow)]


@pytest.mark.parametrize("splits", SPLITS)
def test_ranks_and_micro_batches_learn_what_one_does(
    splits: tuple[tuple[int, int, int], ...], gram_data: dict[str, Any], tmp_path: Path
) -> None:
    cells = {}
    for ranks, accumulation, stage in ((1, 1, 0), *splits):
        data = {**gram_data, "name": f"{ranks}-{stage}", "engine": {**gram_data["engine"], "zero_stage": stage}}
        data["train"] = {"steps": 6, "batch_size": 16, "grad_accum_steps": accumulation}
        data["encoder"] = {**data["encoder"], "drop_path": 0.3}
        cells[ranks, stage] = data
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[0] == ranks], ranks, tmp_path)
    alone = cells.pop((1, 0))
    for key, data in cells.items():
        assert column(data, "ids_digest") == column(alone, "ids_digest")
        for name in ("loss", "grad_norm"):
            assert column(data, name) == pytest.approx(column(alone, name), rel=1e-4), (key, name)
        theirs, ours = ([row["gram"] for row in rows(each) if "gram" in row] for each in (alone, data))
        assert len(ours) == 4
        assert ours == pytest.approx(theirs, rel=1e-4), key


def test_an_earlier_checkpoint_of_another_run_teaches(shards: Path, gram_data: dict[str, Any], tmp_path: Path) -> None:
    first = config_data("dino", "vit", shards, tmp_path, train={"steps": 2}, checkpoint={"every_steps": 1})
    for data in (first, gram_data):
        data["data"] |= {"mean": NORMALISATION.mean, "std": NORMALISATION.std}
    run = pretrain(parse_config({**first, "name": "first"}))
    gram_data["method"]["gram"] = {"teacher": str(run / "checkpoints" / "step-00000001")}
    gram_data |= {"init_from": str(run), "name": "second"}
    gram_data["views"]["global_crops"] = [{**crop, "size": 64} for crop in gram_data["views"]["global_crops"]]
    gram_data["views"]["teacher_crops"] = {"size": 128}
    gram_data["train"] = {"steps": 1, "batch_size": 4}
    config = parse_config(gram_data)
    method = build(config)
    lines = start_from(method, str(run), "dino")
    assert any(line.strip() == "9 tensors of the method around it, of step-00000002" for line in lines)
    with Pieces([run / "checkpoints" / "step-00000002" / piece_name(0, 1)]) as pieces:
        for name, value in method.head.state_dict().items():
            assert torch.equal(value, pieces.whole(f"teacher.head.{name}")), name
            assert torch.equal(value, method.teacher["head"].state_dict()[name]), name
        assert torch.equal(method.center, pieces.whole("center"))
        assert method.center.abs().sum() > 0
    second = pretrain(config)
    assert rows({"runs": str(second.parent), "name": second.name})[0]["gram"] > 0
    gram_data["data"] |= {"mean": (0.4, 0.4, 0.3)}
    with pytest.raises(ValueError, match=r"knows images of mean \[0.5, 0.4, 0.3\]"):
        pretrain(parse_config({**gram_data, "name": "third"}))
    gram_data["encoder"] = {"family": "swin", "dim": 16, "depths": [2, 2], "heads": [1, 2], "patch": 2, "window": 4}
    with pytest.raises(ValueError, match="is an encoder of family vit, and the run trains swin"):
        check_teacher(parse_config({**gram_data, "init_from": None}))
    gram_data["method"]["gram"]["teacher"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"method.gram.teacher: .*nowhere is not a folder"):
        check_teacher(parse_config({**gram_data, "init_from": None}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": {"gram": {"start_step": 8}}}, "start_step is 8 and train.steps 8"),
        ({"method": {"gram": None}}, "reads no views.teacher_crops"),
        ({"views": {"teacher_crops": {"size": [64, 32]}}}, "their sides must be in one proportion"),
        ({"views": {"teacher_crops": {"size": 66}}}, "each side must be a multiple"),
        ({"optim": {"schedule": "constant", "lr_end": 1e-6}}, "belongs to schedule cosine"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], told: str, gram_data: dict[str, Any]) -> None:
    for name, values in change.items():
        gram_data[name] = {**gram_data[name], **values}
    with pytest.raises(ConfigError, match=told):
        parse_config(gram_data)


def test_constant_schedules_stay_after_their_warmup(gram_data: dict[str, Any]) -> None:
    constant = {"teacher_momentum_schedule": "constant", "teacher_temperature_warmup": "linear"}
    warmup = {"warmup_teacher_temperature_epochs": 2, "teacher_temperature": 0.07}
    gram_data["method"] |= {**constant, **warmup, "teacher_momentum": 0.994}
    method = build(parse_config(gram_data))  # 10 steps an epoch
    values = [method.schedules(step) for step in (0, 10, 20, 99)]
    assert [value["momentum"] for value in values] == [0.994] * 4
    assert [value["teacher_temperature"] for value in values] == pytest.approx([0.04, 0.055, 0.07, 0.07])
