"""DINOv2's additions and DINO's `auto`: slow loops from the papers, several ranks, and what the masks promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_train import column, run_all
from tiny import build, config_data, random_batch

from pretrain.config.auto_hparams import resolve_auto
from pretrain.config.load import ConfigError, check_batch, parse_config
from pretrain.methods.dino.config import DinoConfig, IbotConfig
from pretrain.methods.dino.koleo import koleo_among, koleo_loss
from pretrain.methods.dino.losses import ibot_loss, sinkhorn_knopp
from pretrain.methods.dino.method import Dino
from pretrain.methods.registry import METHODS


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sinkhorn_is_the_papers() -> None:
    outputs = noise(6, 4)
    table = [[math.exp(float(outputs[n, k]) / 0.1) for k in range(4)] for n in range(6)]
    for _ in range(3):
        for k in range(4):
            total = sum(table[n][k] for n in range(6))
            for n in range(6):
                table[n][k] /= total * 4
        for n in range(6):
            total = sum(table[n])
            table[n] = [value / (total * 6) for value in table[n]]
    found = sinkhorn_knopp(outputs, 0.1, 3)
    assert found.flatten().tolist() == pytest.approx([6 * value for row in table for value in row], rel=1e-4)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))
    assert sinkhorn_knopp(outputs[:0], 0.1, 3).shape == (0, 4)


def test_sinkhorn_gives_every_row_its_share_at_the_coldest_temperature() -> None:
    """Outputs are cosines: one row may lie 1.6 / .02 = 80 below the others, e^-80 of them."""
    outputs = torch.full((8, 4), 0.9) + 0.05 * noise(8, 4)
    outputs[3] = -0.7 + 0.05 * noise(4, seed=1)
    table = (outputs.double() / 0.02).exp()
    for _ in range(3):
        table /= table.sum(dim=0) * 4
        table /= table.sum(dim=1, keepdim=True) * 8
    torch.testing.assert_close(sinkhorn_knopp(outputs, 0.02, 3), (8 * table).float(), rtol=1e-3, atol=1e-5)


def _one_rank(rank: int, folder: str, parts: list[torch.Tensor]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(parts))
    torch.save(sinkhorn_knopp(parts[rank], 0.05, 3), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_sinkhorn_over_ranks_of_unequal_numbers_is_that_of_all_rows(tmp_path: Path) -> None:
    outputs = noise(7, 5)
    mp.spawn(_one_rank, (str(tmp_path), [outputs[:5], outputs[5:]]), nprocs=2)
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)])
    torch.testing.assert_close(found, sinkhorn_knopp(outputs, 0.05, 3))


def test_koleo_is_the_papers_and_bears_duplicates() -> None:
    features = noise(5, 3)
    unit = [row / row.norm() for row in features]
    total = 0.0
    for i in range(5):
        nearest = min(float((unit[i] - unit[j]).norm()) for j in range(5) if j != i)
        total -= math.log(nearest + 1e-8) / 5
    assert float(koleo_loss(features)) == pytest.approx(total, rel=1e-4)
    doubled = features.repeat(2, 1).requires_grad_()
    loss = koleo_loss(doubled)
    loss.backward()
    assert loss.isfinite()
    assert doubled.grad is not None
    assert doubled.grad.isfinite().all()


def test_koleo_draws_away_from_several_neighbours() -> None:
    rows = torch.nn.functional.normalize(noise(6, 3), dim=-1)
    total = 0.0
    for i in range(6):
        distances = sorted(float((rows[i] - rows[j]).norm()) for j in range(6) if j != i)
        total -= sum(math.log(distance + 1e-8) for distance in distances[:2]) / 12
    assert float(koleo_loss(rows, neighbours=2)) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_the_parts_of_a_step_have_the_gradient_of_the_whole(neighbours: int) -> None:
    rows = noise(8, 4).requires_grad_()
    whole = koleo_loss(rows, neighbours)
    (expected,) = torch.autograd.grad(whole, rows)
    parts = [koleo_among(rows[first : first + 2], rows.detach(), first, neighbours) for first in (0, 2, 4, 6)]
    assert all(part.item() == pytest.approx(whole.item(), rel=1e-6) for part in parts)
    (found,) = torch.autograd.grad(torch.stack(parts).mean(), rows)
    torch.testing.assert_close(found, expected)


def test_ibot_weighs_every_masked_crop_alike() -> None:
    student, teacher = noise(5, 4), noise(5, 4, seed=1).softmax(dim=-1)
    counts = [2, 3]  # hidden tokens of two masked crops, of four global ones
    weights = torch.tensor([1 / 2] * 2 + [1 / 3] * 3)
    total, row = 0.0, 0
    for count in counts:
        for _ in range(count):
            log = student[row].log_softmax(dim=-1)
            total += -sum(float(teacher[row, k] * log[k]) for k in range(4)) / count
            row += 1
    assert float(ibot_loss(student, teacher, weights, 4)) == pytest.approx(total / 4, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(ibot_loss(student, teacher, weights, 4)) == pytest.approx(total / 4, rel=1e-5)


def test_ibot_masks_are_stratified_over_the_batch_and_drawn_row_by_row() -> None:
    size, batch = (224, 224), 64
    draw = METHODS["dino"].draw(DinoConfig(ibot=IbotConfig()), size, 16, batch)
    assert draw is not None
    for step in (0, 7):
        maps = np.stack([draw(0, step, row)["token_mask"] for row in range(batch)])
        assert maps.shape == (batch, 2, 14, 14)
        shares = np.sort(maps.reshape(2 * batch, -1).mean(axis=1))
        assert (shares[:batch] == 0).all()  # exactly half of the crops are whole
        assert shares[batch:].min() >= 0.08
        assert shares[batch:].max() <= 0.5
        assert shares[batch:].mean() == pytest.approx(0.3, abs=0.02)  # of .1 to .5
        again = draw(0, step, 5)["token_mask"]
        assert (again == maps[5]).all()


@pytest.fixture
def dinov2_data(shards: Path, tmp_path: Path) -> dict[str, Any]:
    data = config_data("dino", "vit", shards, tmp_path)
    data["method"] |= {"ibot": {"min_block": 1}, "koleo_weight": 0.1, "sigreg_weight": 2.0}
    return data


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
def test_the_loss_is_the_sum_of_its_terms(dinov2_data: dict[str, Any], separate: bool, centering: str) -> None:
    dinov2_data["method"] |= {"centering": centering}
    dinov2_data["method"]["ibot"] |= {"separate_head": separate, "weight": 0.5}
    config = parse_config(dinov2_data)
    method = build(config).train()
    assert isinstance(method, Dino)
    result = method(random_batch(config), 0)
    expected = result["dino"] + 0.1 * result["koleo"] + 2.0 * result["sigreg"] + 0.5 * result["ibot"]
    torch.testing.assert_close(result["loss"], expected)
    result["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    before = method.teacher["encoder"].state_dict()["vit.norm.weight"].clone()
    with torch.no_grad():
        method.encoder.vit.norm.weight.add_(1.0)
    method.after_step(0)
    assert not torch.equal(before, method.teacher["encoder"].state_dict()["vit.norm.weight"])
    moved = {name: bool(getattr(method, name).abs().sum() > 0) for name in method.centers}
    assert moved == dict.fromkeys(("center", "patch_center"), centering == "center")


def test_the_student_does_not_see_what_is_hidden(dinov2_data: dict[str, Any]) -> None:
    """Other pixels below the masks change the teacher's targets, not the student's prediction of them."""
    config = parse_config(dinov2_data)
    method = build(config).eval()
    first, second = random_batch(config), random_batch(config)
    hidden = first["token_mask"]
    assert hidden is not None
    pixels = hidden.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)[:, :, None]
    second["global_crops"] = torch.where(pixels, random_batch(config, seed=9)["global_crops"], first["global_crops"])
    seen = []
    for batch in (first, second):
        images = method.normalise(batch["global_crops"].flatten(0, 1))
        from pretrain.encoders import Mask

        seen.append(method.encoder(images, Mask(token=hidden.flatten(0, 1))).tokens)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("images", "prototypes", "temperature", "momentum"),
    [
        (640, 1024, 0.02, 0.99),
        (20_000, 2048, 0.02, 0.99),
        (150_000, 16384, 0.025, 0.991),
        (1_281_167, 65536, 0.07, 0.996),
    ],
)
def test_auto_is_chosen_from_the_number_of_images(
    dinov2_data: dict[str, Any], images: int, prototypes: int, temperature: float, momentum: float
) -> None:
    auto = {"prototypes": "auto", "teacher_temperature": "auto", "teacher_momentum": "auto"}
    dinov2_data["method"] |= auto
    config, lines = resolve_auto(parse_config(dinov2_data), images)
    method = config.method
    assert isinstance(method, DinoConfig)
    assert (method.prototypes, method.teacher_temperature, method.teacher_momentum) == (
        prototypes, temperature, momentum,
    )  # fmt: skip
    assert method.warmup_teacher_temperature <= temperature
    assert sum(str(value) in " ".join(lines) for value in (prototypes, f"{images:,}")) == 2
    assert resolve_auto(config, images) == (config, [])


def test_koleo_needs_two_images_in_a_micro_batch(dinov2_data: dict[str, Any]) -> None:
    config = parse_config(dinov2_data)
    check_batch(config, 4)
    with pytest.raises(ConfigError, match=r"koleo_weight is 0.1, which spreads the images .* leaves one in each"):
        check_batch(config, 8)
    dinov2_data["method"] |= {"koleo_over": "batch", "koleo_neighbours": 7}
    check_batch(parse_config(dinov2_data), 8)
    dinov2_data["method"]["koleo_neighbours"] = 8
    with pytest.raises(ConfigError, match=r"koleo_neighbours is 8, and an image has 7 others"):
        check_batch(parse_config(dinov2_data), 8)


def test_koleo_over_the_batch_is_the_same_on_any_ranks_and_accumulation(shards: Path, tmp_path: Path) -> None:
    cells = {}
    for ranks, accumulation, stage in ((1, 1, 0), (2, 2, 3)):
        train = {"steps": 4, "batch_size": 16, "grad_accum_steps": accumulation}
        data = config_data("dino", "vit", shards, tmp_path, train=train, engine={"zero_stage": stage})
        data["method"] |= {"koleo_weight": 1.0, "koleo_over": "batch", "koleo_neighbours": 2, "local_weight": 0.5}
        data["method"] |= {"ibot": {"min_block": 1}, "last_layer": "plain", "norm_last_layer": False}
        data["encoder"]["drop_path"] = 0.3
        cells[ranks, accumulation] = {**data, "name": f"{ranks}-{accumulation}"}
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[0] == ranks], ranks, tmp_path)
    alone = cells.pop((1, 1))
    for key, data in cells.items():
        for name in ("loss", "koleo", "grad_norm"):
            assert column(data, name) == pytest.approx(column(alone, name), rel=1e-4), (key, name)


def test_a_patch_loss_on_units_that_are_no_tokens_is_refused(dinov2_data: dict[str, Any]) -> None:
    dinov2_data["method"]["ibot"]["unit"] = 6
    with pytest.raises(ValueError, match=r"ibot.unit is 6 px; the teacher's tokens are 4 px"):
        parse_config(dinov2_data)
