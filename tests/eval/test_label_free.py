"""Numbers without labels against slow forms, and their errors against many draws of the data."""

import math

import pytest
import torch
import torch.nn.functional as F

from eval import label_free
from eval.base import FeatureSet, Store
from eval.probes.label_free import SPEC, LabelFreeSettings


def drawn(seed, num=300, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.8 + 0.5


def slow_rank(values):
    singular = torch.linalg.svdvals(values.double())
    shares = singular / singular.sum() + 1e-7
    return math.exp(-(shares * shares.log()).sum())


@pytest.mark.parametrize("num", [300, 9])  # more images than dimensions, and fewer
def test_ranks(num):
    features = drawn(0, num)
    assert label_free.rankme(features)["value"] == pytest.approx(slow_rank(features), rel=1e-4)
    centred = features.double() - features.double().mean(dim=0)
    assert label_free.centred_rank(features)["value"] == pytest.approx(slow_rank(centred), rel=1e-4)
    tokens = drawn(1, num).view(num, 4, 4)
    wanted = [slow_rank(each - each.mean(dim=0)) for each in tokens.double()]
    torch.testing.assert_close(label_free.ranks_within(tokens), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-4)


def test_collapsed_features():
    assert label_free.rankme(torch.ones(50, 8))["value"] == pytest.approx(1, abs=1e-4)
    assert label_free.centred_rank(torch.ones(50, 8))["value"] == 1
    assert label_free.alpha_req(torch.ones(50, 32)) is None
    assert label_free.uniformity(torch.ones(50, 8))["value"] == pytest.approx(0, abs=1e-5)
    assert label_free.uniformity(torch.ones(50, 8))["standard_error"] == pytest.approx(0, abs=1e-6)


def test_alpha_is_the_exponent():
    rank = torch.arange(1, 200).double()
    assert float(label_free.power_law(3 * rank**-1.3)) == pytest.approx(1.3)
    basis = torch.linalg.qr(torch.randn(400, 150, generator=torch.Generator().manual_seed(0)).double()).Q
    basis = torch.linalg.qr(basis - basis.mean(dim=0)).Q
    features = basis * torch.arange(1, 151) ** -0.5  # so that the covariance falls like 1 / rank
    assert label_free.alpha_req(features)["value"] == pytest.approx(1, abs=0.02)
    assert label_free.alpha_req(features[:, :12]) is None  # nine ranks from the fourth on


def test_uniformity():
    features = drawn(2, 60)
    distances = F.pdist(F.normalize(features, dim=1)).square()
    assert label_free.uniformity(features)["value"] == pytest.approx(float((-2 * distances).exp().mean().log()))


@pytest.mark.parametrize("number", ["rankme", "centred_rank", "alpha_req", "uniformity"])
def test_errors_are_those_of_many_draws(number):
    found = [getattr(label_free, number)(drawn(seed)) for seed in range(60)]
    deviation = float(torch.tensor([each["value"] for each in found]).std())
    said = float(torch.tensor([each["standard_error"] for each in found]).mean())
    assert 0.7 < said / deviation < 1.4


def test_groups_make_errors_larger():
    features = drawn(0, 60).repeat_interleave(5, dim=0)
    alone, grouped = (
        label_free.rankme(features, groups)["standard_error"] for groups in (None, torch.arange(300) // 5)
    )
    assert grouped == pytest.approx(alone * 5**0.5)


class Kept:
    grid, dim = (2, 2), 16

    def __getitem__(self, rows):
        return torch.randn(300, 4, 16, generator=torch.Generator().manual_seed(0))[rows]


def of(features, tokens=None, pooled_as="mean"):
    number = torch.arange(len(features))
    found = FeatureSet({pooled_as: features}, pooled_as, torch.empty(0), number, number, tokens=tokens)
    return Store(found, found, 0, pooled_as)


def test_run_needs_no_labels():
    result = SPEC.run(of(drawn(0)), LabelFreeSettings())
    assert result["images"] == 300
    assert result["rankme"]["value"] == label_free.rankme(drawn(0))["value"]
    assert [c.name for c in SPEC.columns(result, "mean")] == ["rankme", "alpha_req", "effective_rank", "uniformity"]
    with_tokens = SPEC.run(of(drawn(0), Kept()), LabelFreeSettings(images=100, token_images=50))
    assert with_tokens["images"] == 100
    assert 1 < with_tokens["patch_rank_within"]["value"] <= 3 < with_tokens["patch_rank"]["value"] <= 16
    assert len(SPEC.columns(with_tokens, "mean")) == 6
    assert "300 train images" in SPEC.notes(result, LabelFreeSettings())[0]
    assert SPEC.run(of(drawn(0), pooled_as="pixels"), LabelFreeSettings()) == {}
    assert SPEC.takes("number")
