"""LiDAR against the definition written out, and the crops it is made of."""

import math

import pytest
import torch
import torch.nn.functional as F

from eval.base import FeatureSet, Store
from eval.probes.lidar import SPEC, LidarSettings, crops_of, scatter

VIEWS, NUM, DIM = 4, 60, 8


@pytest.fixture(scope="module")
def views():
    """(q, n, d): crops of an image are alike in the first dimensions and differ in the others."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, NUM, DIM, generator=generator) * torch.linspace(2, 0, DIM)
    return images + 0.3 * torch.randn(VIEWS, NUM, DIM, generator=generator) + 1


def slow(views, delta=1e-4):
    """Every scatter as a sum over images and crops."""
    views = views.double()
    means = views.mean(dim=0)
    centre = means.mean(dim=0)
    between = sum(torch.outer(mean - centre, mean - centre) for mean in means) / len(means)
    within = sum(torch.outer(x - mean, x - mean) for view in views for x, mean in zip(view, means, strict=True))
    within = within / (len(views) * len(means)) + delta * torch.eye(DIM)
    eigenvalues = torch.linalg.eigvals(torch.linalg.solve(within, between)).real.clamp_min(0)
    shares = eigenvalues / eigenvalues.sum() + 1e-7
    return math.exp(-(shares * shares.log()).sum())


def test_lidar_is_its_definition(views):
    blocks = torch.arange(NUM) % 10
    found, distances = scatter(lambda number: views[number], VIEWS, blocks)
    assert found.lidar(None, 1e-4) == pytest.approx(slow(views), rel=1e-4)
    assert found.lidar(3, 1e-4) == pytest.approx(slow(views[:, blocks != 3]), rel=1e-4)
    unit = F.normalize(views, dim=2)
    pairs = [(unit[a] - unit[b]).square().sum(dim=1) for a in range(VIEWS) for b in range(a)]
    torch.testing.assert_close(distances.float(), torch.stack(pairs).mean(dim=0), rtol=1e-4, atol=1e-5)


def store_of(views, pooled_as="mean", groups=None):
    number = torch.arange(NUM)
    calls = []

    def again(change, of_train):
        assert not of_train
        calls.append(change)
        return features(views[(len(calls) - 1) % VIEWS])

    def features(values):
        return FeatureSet({pooled_as: values}, pooled_as, torch.empty(0), number, number, groups)

    return Store(features(views[0]), features(views[0]), 0, pooled_as, again=again), calls


def test_run(views):
    store, calls = store_of(views)
    settings = LidarSettings(views=VIEWS)
    result = SPEC.run(store, settings)
    assert len(calls) == VIEWS
    assert result["lidar"]["value"] == pytest.approx(slow(views), rel=1e-4)
    assert 0 < result["lidar"]["standard_error"] < result["lidar"]["value"]
    assert [c.name for c in SPEC.columns(result, "mean")] == ["lidar", "alignment"]
    assert "60 held-out images" in SPEC.notes(result, settings)[0]
    grouped = SPEC.run(store_of(views, groups=torch.arange(NUM) // 20)[0], settings)
    assert grouped["lidar"]["value"] == pytest.approx(result["lidar"]["value"])
    assert SPEC.run(store_of(views, "pixels")[0], settings) == {}
    with pytest.raises(ValueError, match="1 image or group"):
        SPEC.run(store_of(views, groups=torch.zeros(NUM))[0], settings)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_crops_are_an_images_own(dtype):
    ramp = torch.linspace(0, 255, 32).expand(6, 3, 32, 32).to(dtype)
    ids = torch.tensor([3, 9, 4, 1, 0, 7])
    change = crops_of(5, (0.3, 0.6))
    found = change(ramp, ids)
    assert found.dtype == dtype
    assert found.shape == ramp.shape
    torch.testing.assert_close(found[2:4].float(), change(ramp[2:4], ids[2:4]).float())
    assert (crops_of(6, (0.3, 0.6))(ramp, ids).float() - found.float()).abs().max() > 10
    wide = (found.float()[:, 0, 0, -1] - found.float()[:, 0, 0, 0]).abs() / 255  # of the ramp, that is of the width
    assert ((wide > 0.4) & (wide < 0.92)).all()
    whole = crops_of(5, (1.0, 1.0))(ramp[:, :, :8, :8], ids)  # stretched: one side is whole
    assert whole.shape == (6, 3, 8, 8)
