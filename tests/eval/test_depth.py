"""Depths from frozen patches: against scikit-learn, on what can be known, and what is refused."""

from __future__ import annotations

import pytest
import torch
from patchwork import InMemory, features, store
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from eval.probes.depth import SPEC, DepthSettings, run


def planes(num: int, noise: float, seed: int, unknown: float = 0.1) -> tuple[InMemory, torch.Tensor]:
    """Tokens (n, 16, 6) and depths (n, 8, 8) that are linear in them, in part unknown."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num, 16, 6, generator=generator)
    patches = 3000 + 100 * tokens @ torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0])
    patches += noise * torch.randn(num, 16, generator=generator)
    depths = patches.unflatten(1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    depths[torch.rand(depths.shape, generator=generator) < unknown] = float("nan")
    return InMemory(tokens, (4, 4)), depths


def of(num: int, noise: float, seed: int) -> object:
    tokens, depths = planes(num, noise, seed)
    return features(tokens, depths=depths)


def test_the_numbers_are_scikit_learns() -> None:
    (train, train_depths), (val, val_depths) = planes(60, 300, 1, 0.0), planes(40, 300, 2, 0.0)
    found = run(store(features(train, depths=train_depths), features(val, depths=val_depths)), DepthSettings())
    targets = train_depths[:, ::2, ::2].flatten()
    x = train.values.flatten(0, 1)
    unit = float((x - x.mean(dim=0)).square().sum() / x.shape[1])
    slow = Ridge(alpha=found["strength"] * unit).fit(x.numpy(), targets.numpy())
    true, said = val_depths[:, ::2, ::2].flatten().numpy(), slow.predict(val.values.flatten(0, 1).numpy())
    assert found["r2"]["value"] == pytest.approx(r2_score(true, said), abs=1e-4)
    assert found["mae"]["value"] == pytest.approx(mean_absolute_error(true, said), rel=1e-3)
    assert found["rmse"]["value"] == pytest.approx(root_mean_squared_error(true, said), rel=1e-3)
    assert found["chance"]["mae"] == pytest.approx(
        mean_absolute_error(true, 0 * true + targets.mean().item()), rel=1e-4
    )
    assert 0 < found["r2"]["standard_error"] < 0.1


def test_what_patches_tell_is_found_where_it_is_known() -> None:
    found = run(store(of(60, 1, 1), of(30, 1, 2)), DepthSettings(patches=500, train_images=40, val_images=20))
    assert found["r2"]["value"] > 0.999
    assert (found["num_train"], found["num_val"]) == (40, 20)
    assert len(found["mae"]["outcome"].rows) == 20
    assert run(store(of(60, 1, 1), of(30, 1, 2)), DepthSettings(full=True))["num_val"] == 30
    assert [column.headline for column in SPEC.columns(found, "")] == [True, False, False]
    assert "means of patches in 20 val images" in SPEC.notes(found, DepthSettings())[0]


def test_what_cannot_be_probed_is_refused() -> None:
    tokens, depths = planes(10, 1, 1)
    for wrong, words in (
        (features(tokens), "train has no depths"),
        (features(tokens, depths=torch.full_like(depths, float("nan"))), "nothing is known of any pixel"),
        (features(tokens, depths=torch.full_like(depths, 7.0)), "every patch of train has the depth 7"),
    ):
        with pytest.raises(ValueError, match=words):
            run(store(wrong, of(10, 1, 2)), DepthSettings())
