from __future__ import annotations

import math

import numpy as np
import pytest
from einops import rearrange

from pretrain.methods.dino.config import DinoConfig
from pretrain.methods.mae.config import MaeConfig
from pretrain.methods.masks import MaskConfig
from pretrain.methods.mim.config import MimConfig
from pretrain.methods.registry import METHODS
from pretrain.stream.masking import blockwise, mask_grid, num_hidden, one_in_2x2, random_units


@pytest.mark.parametrize("side", [4, 6, 7, 8, 14, 16, 20])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
def test_counts_are_those_of_the_papers(side: int, ratio: float) -> None:
    units = side * side
    assert num_hidden(MaskConfig(ratio=0.75), (side, side)) == units - int(units * (1 - 0.75))  # MAE
    assert num_hidden(MaskConfig(ratio=0.6), (side, side)) == math.ceil(units * 0.6)  # SimMIM
    assert 0 < num_hidden(MaskConfig(ratio=ratio), (side, side)) < units


def test_random_masks_hide_the_count_everywhere_alike() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([random_units(rng, (4, 6), 18) for _ in range(4000)])
    assert (masks.sum(axis=(1, 2)) == 18).all()
    assert np.abs(masks.mean(axis=0) - 0.75).max() < 0.04  # 5.8 standard errors


def test_one_in_2x2_shows_one_unit_a_quad_and_balances_the_corners() -> None:
    rng = np.random.default_rng(0)
    shown = np.zeros(4)
    for _ in range(200):
        visible = ~one_in_2x2(rng, (8, 12))
        quads = rearrange(visible, "(h dy) (w dx) -> (h w) (dy dx)", dy=2, dx=2)
        assert (quads.sum(axis=1) == 1).all()
        assert quads.sum(axis=0).tolist() == [6, 6, 6, 6]
        shown += quads[0]
    assert shown.min() > 20  # a quad's visible corner varies


def test_secondary_masks_lie_on_visible_units() -> None:
    config = MaeConfig(mask=MaskConfig(kind="one_in_2x2", unit=4, secondary=0.25))
    draw = METHODS["mae"].draw(config, (32, 32), 4, 1)
    assert draw is not None
    drawn = draw(np.random.default_rng(0), 0, 0)
    dropped, replaced = drawn["drop_mask"], drawn["token_mask"]
    assert not (dropped & replaced).any()
    assert (dropped.sum(), replaced.sum()) == (48, 4)


def test_blockwise_is_beits_distribution() -> None:
    """14x14 units, at most 75 hidden, blocks of 16 and more: 70 to 75 are hidden but for a tail, 74.5 on average."""
    config = MaskConfig(kind="blockwise", ratio=75 / 196, unit=16)
    assert num_hidden(config, mask_grid(config, (224, 224))) == 75
    counts = [
        int(blockwise(np.random.default_rng(seed), (14, 14), 75, min_block=16, min_aspect=0.3).sum())
        for seed in range(2000)
    ]
    assert np.mean(np.array(counts) < 70) < 0.01  # the authors' code: 0.6 %
    assert max(counts) == 75
    assert np.mean(counts) == pytest.approx(74.5, abs=0.15)


def test_blockwise_hides_something_even_where_no_block_fits() -> None:
    for seed in range(50):
        assert blockwise(np.random.default_rng(seed), (2, 2), 1, min_block=16, min_aspect=0.3).sum() == 1


def test_methods_drop_or_replace() -> None:
    rng = np.random.default_rng(0)
    mae = METHODS["mae"].draw(MaeConfig(), (224, 224), 16, 1)
    mim = METHODS["mim"].draw(MimConfig(), (192, 192), 16, 1)
    assert mae is not None
    assert mim is not None
    assert {name: part.shape for name, part in mae(rng, 0, 0).items()} == {"drop_mask": (14, 14)}
    assert {name: part.shape for name, part in mim(rng, 0, 0).items()} == {"token_mask": (6, 6)}
    assert METHODS["dino"].draw(DinoConfig(), (224, 224), 16, 1) is None
