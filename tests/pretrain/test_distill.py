"""Distillation: its losses as slow loops, the queue of all images, and the same on any ranks and after a restart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cells import finish
from test_train import column, run_all
from tiny import build, config_data, random_batch
from torch.nn import functional as F

from pretrain.config.load import ConfigError, check_batch, parse_config
from pretrain.methods.distill.method import Distill
from pretrain.methods.distill.queue import FeatureQueue
from pretrain.methods.distill.teacher import check
from pretrain.methods.gram import gram_loss, on_grid
from pretrain.stream.pixels import normalised


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method_of(shards: Path, tmp_path: Path, **changes: Any) -> tuple[Distill, dict[str, Any]]:
    data = config_data("distill", "vit", shards, tmp_path)
    data["method"] |= changes
    config = parse_config(data)
    method = build(config).train()
    assert isinstance(method, Distill)
    return method, random_batch(config)


def test_the_divergence_is_that_of_softmaxes_over_the_queue() -> None:
    queue = FeatureQueue(5, 3)
    queue.note(F.normalize(noise(3, 3), dim=-1))
    queue.push()
    student, teacher = (F.normalize(noise(2, 3, seed=seed), dim=-1) for seed in (1, 2))
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        scores = [[math.exp(float(row @ feature) / 0.1) for row in queue.rows[:3]] for feature in (ours, theirs)]
        q, p = ([score / sum(each) for score in each] for each in scores)
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)) / 2
    assert float(queue.divergence(student, teacher, 0.1)) == pytest.approx(total, rel=1e-4)
    assert float(queue.divergence(teacher, teacher, 0.1)) == pytest.approx(0.0, abs=1e-6)


def test_the_queue_holds_the_newest_first_and_forgets_the_oldest() -> None:
    queue = FeatureQueue(5, 1)
    for first in (0, 2, 4):
        queue.note(torch.tensor([[float(first)], [first + 1.0]]))
        with queue.forgetting():
            queue.note(torch.tensor([[99.0]]))
        queue.push()
    assert queue.rows.flatten().tolist() == [4, 5, 2, 3, 0]
    assert int(queue.filled) == 5
    queue.note(torch.arange(7.0)[:, None])
    queue.push()
    assert queue.rows.flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("patches", ["cosine", "mse", "similarity"])
@pytest.mark.parametrize("images", ["cosine", "mse"])
def test_the_losses_are_of_what_both_say(images: str, patches: str, shards: Path, tmp_path: Path) -> None:
    weights = {"image_weight": 0.5, "patch_weight": 2.0}
    method, batch = method_of(shards, tmp_path, image_loss=images, patch_loss=patches, **weights)
    crops = batch["global_crops"][:, 0]
    ours = method.encoder(method.normalise(crops))
    teacher = method.teacher.network(normalised(crops, torch.tensor((0.4,) * 3), torch.tensor((0.3,) * 3)))
    assert (ours.grid, teacher.grid) == ((8, 8), (4, 4))

    def compared(kind: str, told: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if kind == "mse":
            return (told - wanted).square().mean()
        return (1 - (F.normalize(told, dim=-1) * F.normalize(wanted, dim=-1)).sum(dim=-1)).mean()

    image = compared(images, method.image_head(ours.pooled), teacher.pooled)
    if patches == "similarity":
        patch = gram_loss(on_grid(ours.tokens, (8, 8), (4, 4), "bilinear"), teacher.tokens)
    else:
        maps = method.patch_head(ours.tokens).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        small = F.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False)
        patch = compared(patches, small.flatten(2).transpose(1, 2), teacher.tokens)
    result = method(batch, 3)
    torch.testing.assert_close(result["image_loss"], image)
    torch.testing.assert_close(result["patch_loss"], patch)
    torch.testing.assert_close(result["loss"], 0.5 * image + 2.0 * patch)
    result["loss"].backward()
    for name, parameter in method.named_parameters():
        if name not in ("encoder.vit.cls_token",):
            assert parameter.grad is not None, name


def test_mixup_blends_pairs_alike_for_both(shards: Path, tmp_path: Path) -> None:
    method, batch = method_of(shards, tmp_path, mixup=True)
    images = method.normalise(batch["global_crops"][:, 0])
    blended = method._blended(images, batch, 4)
    torch.testing.assert_close(blended[0] + blended[1], images[0] + images[1])
    torch.testing.assert_close(blended[2] + blended[3], images[2] + images[3])
    share = ((blended[0] - images[1]) / (images[0] - images[1])).nanmedian()
    torch.testing.assert_close(blended[0], share * images[0] + (1 - share) * images[1], atol=1e-3, rtol=1e-3)
    later = {name: value[2:] for name, value in batch.items()}
    torch.testing.assert_close(method._blended(images[2:], later, 4), blended[2:])
    assert not torch.equal(method._blended(images, batch, 5), blended)


def test_the_student_alone_does_not_see_what_is_hidden(shards: Path, tmp_path: Path) -> None:
    method, batch = method_of(shards, tmp_path, mask={"unit": 8, "ratio": 0.5})
    hidden = batch["token_mask"].repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None, None]
    other = {**batch, "global_crops": torch.where(hidden, 255 - batch["global_crops"], batch["global_crops"])}
    assert not torch.equal(method.taught(batch, 0).tokens, method.taught(other, 0).tokens)
    told = []
    method.encoder.register_forward_hook(lambda module, given, output: told.append(output.tokens))
    for each in (batch, other):
        method(each, 1)
    torch.testing.assert_close(told[0], told[1])


def test_a_teacher_may_see_crops_of_its_own_size(shards: Path, tmp_path: Path) -> None:
    data = config_data("distill", "swin", shards, tmp_path)
    data["views"]["teacher_crops"] = {"size": 64}
    config = parse_config(data)
    check(config)
    method, batch = build(config).train(), random_batch(config)
    assert method.taught(batch, 0).grid == (8, 8)
    assert method(batch, 0)["loss"].isfinite()


@pytest.fixture
def distill_data(shards: Path, tmp_path: Path) -> dict[str, Any]:
    return config_data("distill", "vit", shards, tmp_path)


#: Ranks, accumulation and ZeRO stage, each compared with one process that takes all at once.
SPLITS = [((2, 2, 3),), pytest.param(((1, 2, 1), (2, 1, 2)), marks=pytest.mark.slow)]


@pytest.mark.parametrize("splits", SPLITS)
def test_ranks_and_micro_batches_learn_what_one_does(
    splits: tuple[tuple[int, int, int], ...], distill_data: dict[str, Any], tmp_path: Path
) -> None:
    """The queue of 24 is full after the second step of 16."""
    cells = {}
    for ranks, accumulation, stage in ((1, 1, 0), *splits):
        data = {**distill_data, "name": f"{ranks}-{stage}", "engine": {**distill_data["engine"], "zero_stage": stage}}
        data["train"] = {"steps": 5, "batch_size": 16, "grad_accum_steps": accumulation}
        data["method"] = {**data["method"], "mixup": True, "mask": {"unit": 8, "ratio": 0.5}}
        data["encoder"] = {**data["encoder"], "drop_path": 0.3}
        cells[ranks, stage] = data
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[0] == ranks], ranks, tmp_path)
    alone = cells.pop((1, 0))
    assert column(alone, "image_loss")[0] > 0
    for key, data in cells.items():
        assert column(data, "ids_digest") == column(alone, "ids_digest")
        for name in ("loss", "image_loss", "patch_loss", "grad_norm"):
            assert column(data, name) == pytest.approx(column(alone, name), rel=1e-4), (key, name)


def test_a_killed_run_goes_on_to_the_last_bit(distill_data: dict[str, Any], tmp_path: Path) -> None:
    distill_data |= {"name": "cell", "runs": str(tmp_path / "runs"), "checkpoint": {"every_steps": 1}}
    distill_data["train"] = {"steps": 2, "batch_size": 4}
    finish(distill_data, tmp_path, "encoder")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": {"image_weight": 0, "patch_weight": 0}}, "nothing is learned"),
        ({"method": {"mask": {"kind": "one_in_2x2", "unit": 8}}}, "distillation replaces them"),
        ({"method": {"mask": {"unit": 6}}}, "does not divide the image"),
        ({"views": {"local_crops": {"size": 16}}}, "sees no local crops"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], told: str, distill_data: dict[str, Any]) -> None:
    for name, values in change.items():
        distill_data[name] = {**distill_data[name], **values}
    with pytest.raises(ConfigError, match=told):
        parse_config(distill_data)


def test_a_teacher_that_does_not_fit_is_refused(distill_data: dict[str, Any]) -> None:
    teacher = distill_data["method"]["teacher"]
    distill_data["method"]["teacher"] = "/nowhere"
    with pytest.raises(ValueError, match=r"method.teacher: /nowhere is not a folder"):
        check(parse_config(distill_data))
    distill_data["method"]["teacher"] = teacher
    distill_data["views"]["teacher_crops"] = {"size": 36}
    with pytest.raises(ValueError, match=r"its tokens are 8 px, which do not divide views.teacher_crops of 36x36 px"):
        check(parse_config(distill_data))
    distill_data["method"]["mixup"] = True
    with pytest.raises(ConfigError, match=r"method.mixup pairs rows within 2 .* a micro-batch has 3"):
        check_batch(parse_config({**distill_data, "train": {"steps": 2, "batch_size": 6}}), 2)


def test_a_teacher_that_says_one_thing_raises_an_alarm(distill_data: dict[str, Any]) -> None:
    from pretrain.diagnostics.alarms import Moment
    from pretrain.methods.distill.alarms import alarms

    (rule,) = alarms(parse_config(distill_data), None, lambda now: True)
    assert rule.trouble(Moment(100, 1.0, {"teacher_std": 0.01}), standing=False) is not None
    assert rule.trouble(Moment(100, 1.0, {"teacher_std": 0.4}), standing=False) is None
