"""LeJEPA: its statistic against the paper's formula, and the loss of the global batch however that is divided."""

from __future__ import annotations

import cmath
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import column, run_all
from tiny import build, config_data, random_batch

from pretrain.config import Config
from pretrain.config.load import ConfigError, parse_config
from pretrain.methods import sigreg

CPU = torch.device("cpu")


def configuration(folder: Path = Path("nowhere")) -> Config:
    return parse_config(config_data("lejepa", "vit", folder, folder))


def slow_statistic(rows: list[float], places: list[float]) -> float:
    """N times the weighted square of the distance of characteristic functions, by the trapezoid rule on both halves."""
    total = 0.0
    for number, place in enumerate(places):
        found = sum(cmath.exp(1j * place * row) for row in rows) / len(rows)
        normal = math.exp(-(place**2) / 2)
        share = 1 if number in (0, len(places) - 1) else 2
        total += abs(found - normal) ** 2 * normal * share * (places[1] - places[0])
    return len(rows) * total


def test_the_statistic_is_the_papers() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    slices = sigreg.directions(seed=3, step=7, dim=5, count=4, device=CPU)
    places, normal, weights = sigreg.knots(0.0, 3.0, 17, CPU)
    own = sigreg.waves(rows, slices, places)
    found = sigreg.epps_pulley(own, own, normal, weights, count=9)
    for slice_, value in zip(slices.T, found.tolist(), strict=True):
        assert value == pytest.approx(slow_statistic((rows @ slice_).tolist(), places.tolist()), rel=1e-4)


def test_directions_are_unit_columns_of_seed_and_step() -> None:
    drawn = sigreg.directions(0, 1, 64, 512, CPU)
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(512))
    assert float(drawn.mean()) == pytest.approx(0.0, abs=3 * (1 / 64 / drawn.numel()) ** 0.5)
    torch.testing.assert_close(drawn, sigreg.directions(0, 1, 64, 512, CPU), rtol=0, atol=0)
    for other in (sigreg.directions(1, 1, 64, 512, CPU), sigreg.directions(0, 2, 64, 512, CPU)):
        assert not torch.equal(drawn, other)


def test_a_normal_cloud_costs_little_and_a_point_most() -> None:
    method = build(configuration())
    places, normal, weights = sigreg.knots(0.0, 3.0, 17, CPU)
    slices = sigreg.directions(0, 0, 8, 16, CPU)
    cloud = sigreg.waves(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), slices, places)
    value = sigreg.epps_pulley(cloud, cloud, normal, weights, method.batch_size).mean()
    assert float(value) < 0.01 * method.statistic_of_a_point()


def test_shares_of_a_batch_have_its_value_and_their_gradients_its_gradient() -> None:
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    slices, (places, normal, weights) = sigreg.directions(0, 0, 6, 5, CPU), sigreg.knots(0.0, 3.0, 17, CPU)
    whole = sigreg.waves(rows, slices, places)
    expected = sigreg.epps_pulley(whole, whole.detach(), normal, weights, 12).mean()
    (gradient,) = torch.autograd.grad(expected, rows, retain_graph=True)
    shares = [
        sigreg.epps_pulley(sigreg.waves(part, slices, places), whole.detach(), normal, weights, 12).mean()
        for part in rows.chunk(3)
    ]
    for share in shares:
        torch.testing.assert_close(share, expected)
    torch.testing.assert_close(torch.autograd.grad(sum(shares) / 3, rows)[0], gradient)


def test_two_ranks_and_micro_batches_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    """With batch normalisation, too, as long as a step has one micro-batch."""
    cells: dict[tuple[str, int, int], dict[str, Any]] = {}
    for norm, ranks, accumulation, stage in (
        ("layer", 1, 1, 0),
        ("layer", 2, 2, 3),
        ("batch", 1, 1, 0),
        ("batch", 2, 1, 1),
    ):
        train = {"steps": 4, "batch_size": 16, "grad_accum_steps": accumulation}
        data = config_data("lejepa", "vit", shards, tmp_path, train=train, engine={"zero_stage": stage})
        data["encoder"]["drop_path"] = 0.3
        data["method"]["projector_norm"] = norm
        data["name"] = f"{norm}-{ranks}-{accumulation}"
        cells[norm, ranks, accumulation] = data
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[1] == ranks], ranks, tmp_path)
    for (norm, _, _), data in cells.items():
        alone = cells[norm, 1, 1]
        assert column(data, "ids_digest") == column(alone, "ids_digest")
        for name in ("loss", "sigreg", "disagreement", "grad_norm"):
            assert column(data, name) == pytest.approx(column(alone, name), rel=1e-4), (data["name"], name)


def test_what_cannot_be_is_refused(shards: Path, tmp_path: Path) -> None:
    data = config_data("lejepa", "vit", shards, tmp_path)
    data["method"]["views"], data["views"]["local_crops"] = 1, None
    data["views"]["global_crops"] = data["views"]["global_crops"][:1]
    with pytest.raises(ConfigError, match="no second view to agree with"):
        parse_config(data)


def test_the_projector_normalises_as_torch_does() -> None:
    method = build(configuration()).train()
    ours = method.projector[1]
    theirs = torch.nn.BatchNorm1d(ours.num_features)
    rows = torch.randn(10, ours.num_features) * 3 + 1
    torch.testing.assert_close(ours(rows), theirs(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    assert method(random_batch(configuration()), 0)["loss"].isfinite()
