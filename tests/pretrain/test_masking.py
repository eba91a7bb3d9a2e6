from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from einops import rearrange

from data_pipelines import loader, order, rows, sampler
from data_pipelines.rng import NamedDraw, PythonStream, Stream, permutation
from data_pipelines.transforms import params
from pretrain.config.load import ConfigError, list_presets, load_config, parse_config
from pretrain.methods.dino.config import DinoConfig, IbotConfig
from pretrain.methods.dino.masks import check_ibot_counts
from pretrain.methods.mae.config import MaeConfig
from pretrain.methods.mask_counts import check_mask_counts, mask_grid, num_hidden
from pretrain.methods.masks import MaskConfig
from pretrain.methods.mim.config import MimConfig
from pretrain.methods.registry import METHODS, draw_fields_for
from pretrain.stream import batches, masking
from pretrain.stream.masking import blockwise, one_in_2x2, random_units


def draw_for(section: Any, size: tuple[int, int], stride: int = 4, batch_size: int = 4) -> Any:
    return METHODS[section.name].draw(section, size, stride, batch_size)


@pytest.mark.parametrize("side", [4, 6, 7, 8, 14, 16, 20])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
def test_counts_are_those_of_the_papers(side: int, ratio: float) -> None:
    units = side * side
    assert num_hidden(MaskConfig(ratio=0.75), (side, side)) == units - int(units * (1 - 0.75))  # MAE
    assert num_hidden(MaskConfig(ratio=0.6), (side, side)) == math.ceil(units * 0.6)  # SimMIM
    assert 0 < num_hidden(MaskConfig(ratio=ratio), (side, side)) < units


def test_random_masks_hide_the_count_everywhere_alike() -> None:
    masks = np.stack([random_units(Stream(number), (4, 6), 18) for number in range(4000)])
    assert (masks.sum(axis=(1, 2)) == 18).all()
    assert np.abs(masks.mean(axis=0) - 0.75).max() < 0.04  # 5.8 standard errors


def test_one_in_2x2_shows_one_unit_a_quad_and_balances_the_corners() -> None:
    shown = np.zeros(4)
    for number in range(200):
        visible = ~one_in_2x2(Stream(number), (8, 12))
        quads = rearrange(visible, "(h dy) (w dx) -> (h w) (dy dx)", dy=2, dx=2)
        assert (quads.sum(axis=1) == 1).all()
        assert quads.sum(axis=0).tolist() == [6, 6, 6, 6]
        shown += quads[0]
    assert shown.min() > 20  # a quad's visible corner varies


def test_secondary_masks_lie_on_visible_units() -> None:
    config = MaeConfig(mask=MaskConfig(kind="one_in_2x2", unit=4, secondary=0.25))
    draw = draw_for(config, (32, 32))
    assert draw is not None
    drawn = draw(0, 0, 0)
    dropped, replaced = drawn["drop_mask"], drawn["token_mask"]
    assert not (dropped & replaced).any()
    assert (dropped.sum(), replaced.sum()) == (48, 4)


def test_blockwise_is_beits_distribution() -> None:
    """14x14 units, at most 75 hidden, blocks of 16 and more: 70 to 75 are hidden but for a tail, 74.5 on average."""
    config = MaskConfig(kind="blockwise", ratio=75 / 196, unit=16)
    assert num_hidden(config, mask_grid(config, (224, 224))) == 75
    counts = [int(blockwise(Stream(seed), (14, 14), 75, min_block=16, min_aspect=0.3).sum()) for seed in range(2000)]
    assert np.mean(np.array(counts) < 70) < 0.01  # the authors' code: 0.6 %
    assert max(counts) == 75
    assert np.mean(counts) == pytest.approx(74.5, abs=0.15)


def test_blockwise_hides_something_even_where_no_block_fits() -> None:
    for seed in range(50):
        assert blockwise(Stream(seed), (2, 2), 1, min_block=16, min_aspect=0.3).sum() == 1


def test_methods_drop_or_replace() -> None:
    mae, mim = draw_for(MaeConfig(), (224, 224)), draw_for(MimConfig(), (192, 192))
    assert mae is not None
    assert mim is not None
    assert {name: part.shape for name, part in mae(0, 0, 0).items()} == {"drop_mask": (14, 14)}
    assert {name: part.shape for name, part in mim(0, 0, 0).items()} == {"token_mask": (6, 6)}
    assert draw_for(DinoConfig(), (224, 224)) is None


def packed(mask: np.ndarray | None) -> str:
    assert mask is not None
    return np.packbits(mask).tobytes().hex()


def test_masks_are_the_same_for_good() -> None:
    """NumPy's Generator may draw otherwise in its next version; a run continued under it must see the same masks."""
    mask = MaskConfig(kind="random", ratio=0.6, unit=8)
    mim = draw_for(MimConfig(mask=mask), (32, 32))
    block = draw_for(MimConfig(mask=MaskConfig(kind="blockwise", ratio=0.4, unit=4, min_block=4)), (32, 32))
    pyramid = MaskConfig(kind="one_in_2x2", unit=4, secondary=0.25)
    ummae = draw_for(MaeConfig(mask=pyramid), (32, 32))
    ibot = draw_for(DinoConfig(ibot=IbotConfig(masked_share=1.0)), (32, 32), stride=4, batch_size=4)
    assert mim is not None
    assert block is not None
    assert ummae is not None
    assert ibot is not None
    assert packed(mim(7, 11, 3)["token_mask"]) == "5bc7"
    assert packed(block(7, 11, 3)["token_mask"]) == "0000687e7e7e3c00"
    assert [packed(part) for part in ummae(7, 11, 3).values()] == ["f69fefb5ddb7e6bf", "0840000220000000"]
    assert packed(ibot(7, 11, 3)["token_mask"]) == "000000410118180000003e3e3e0f0f07"


def test_masks_are_a_function_of_seed_step_and_row() -> None:
    draw = draw_for(MimConfig(mask=MaskConfig(ratio=0.6, unit=4)), (32, 32))
    assert draw is not None
    masks = {packed(draw(seed, step, row)["token_mask"]) for seed in range(3) for step in range(5) for row in range(7)}
    assert len(masks) == 105
    assert packed(draw(2, 4, 6)["token_mask"]) in masks


def test_no_draw_of_the_order_contract_is_numpys() -> None:
    """What decides samples, crops or masks draws from `data_pipelines/rng.py` alone."""
    for module in (loader, order, rows, sampler, params, masking, batches):
        source = inspect.getsource(module)
        assert "np.random" not in source, module.__name__
        assert "numpy.random" not in source, module.__name__


def test_the_permutations_are_even_and_the_same_in_c_and_python() -> None:
    assert permutation(Stream(1, 2), 9).tolist() == permutation(PythonStream(1, 2), 9).tolist()  # type: ignore[arg-type]
    assert sorted(permutation(Stream(5), 100).tolist()) == list(range(100))
    first = np.bincount([permutation(Stream(number), 6)[0] for number in range(6000)], minlength=6)
    assert np.abs(first - 1000).max() < 120  # 4 standard errors


@pytest.mark.parametrize("masked_share", [0.25, 0.5, 1.0])
def test_what_one_view_hides_says_nothing_of_the_other(masked_share: float) -> None:
    """Of pairs of views, the shares in which both, one and none is masked are those of independent draws."""
    ibot, batch = IbotConfig(masked_share=masked_share), 32
    draw = draw_for(DinoConfig(ibot=ibot), (64, 64), stride=16, batch_size=batch)
    assert draw is not None
    masked = np.zeros((40, batch, 2), bool)
    sizes = np.zeros((40, batch, 2))
    for step in range(40):
        for row in range(batch):
            maps = draw(3, step, row)["token_mask"]
            assert maps is not None
            masked[step, row], sizes[step, row] = maps.any(axis=(1, 2)), maps.sum(axis=(1, 2))
    assert (masked.sum(axis=(1, 2)) == round(2 * batch * masked_share)).all()  # of every step
    pairs = masked.reshape(-1, 2).sum(axis=1)
    both, one, none = ((pairs == count).mean() for count in (2, 1, 0))
    share = masked_share
    expected = (share**2, 2 * share * (1 - share), (1 - share) ** 2)
    assert (both, one, none) == pytest.approx(expected, abs=0.03)
    if share == 1:  # then the sizes, stratified over the batch, must be unrelated as well
        assert abs(np.corrcoef(sizes.reshape(-1, 2).T)[0, 1]) < 0.06
    assert abs(np.corrcoef(sizes[:, :-1, 1].ravel(), sizes[:, 1:, 0].ravel())[0, 1]) < 0.08  # of neighbouring rows


@pytest.mark.parametrize(
    ("mask", "size", "message"),
    [
        ({"unit": 32, "ratio": 0.75}, (32, 32), r"leaves no unit visible: at unit=32 px .*has 1 \(1x1\)"),
        ({"unit": 16, "ratio": 0.9}, (32, 32), r"leaves no unit visible: at unit=16 px .*has 4 \(2x2\)"),
        ({"unit": 16, "ratio": 0.6}, (16, 16), "leaves no unit visible"),
        ({"unit": 16, "ratio": 0.2, "kind": "blockwise"}, (32, 32), "hides no unit"),
        ({"unit": 32, "ratio": 0.9, "kind": "blockwise"}, (32, 32), "hides no unit"),
        ({"unit": 16, "kind": "one_in_2x2", "secondary": 0.25}, (32, 32), "leaves no unit visible.*secondary"),
    ],
)
def test_masks_that_hide_or_leave_nothing_are_refused(
    mask: dict[str, Any], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_mask_counts(MaskConfig(**mask), size)


@pytest.mark.parametrize(("method", "ratio"), [("mae", 0.75), ("mim", 0.6)])
@pytest.mark.parametrize("family", ["vit", "timm"])
def test_a_run_on_one_mask_unit_is_refused_with_its_configuration(
    method: str, ratio: float, family: str, tmp_path: Path
) -> None:
    """MIM would train on a loss of 0, MAE on one of NaN."""
    data: dict[str, Any] = {
        "name": "x",
        "data": {"train": str(tmp_path)},
        "views": {"global_crops": [{"size": 32}]},
        "encoder": {"family": "vit", "patch": 8} if family == "vit" else {"family": "timm", "model": "convnext_atto"},
        "method": {"name": method, "mask": {"unit": 32, "ratio": ratio}},
        "optim": {"lr": 1e-3},
        "train": {"steps": 10},
    }
    with pytest.raises(ConfigError, match="no unit visible"):
        parse_config(data)


@pytest.mark.parametrize(
    ("size", "unit", "ratio"), [(16, 16, (0.1, 0.5)), (32, 32, (0.1, 0.5)), (32, 16, (0.1, 0.2)), (48, 16, (0.01, 0.1))]
)
def test_ibot_masks_that_hide_all_or_nothing_are_refused(size: int, unit: int, ratio: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"method.ibot hides (0|all) of the units"):
        check_ibot_counts(IbotConfig(ratio=ratio), unit, (size, size))
    check_ibot_counts(IbotConfig(), 16, (32, 32))


@pytest.mark.parametrize("preset", [preset.name for preset in list_presets()])
def test_what_is_drawn_can_be_told_to_another_process(preset: str) -> None:
    config = load_config(preset, ["data.train=nowhere"])
    draw = draw_fields_for(config)
    if draw is None:
        return
    assert isinstance(draw, NamedDraw)
    again = NamedDraw(draw.maker, json.loads(json.dumps(draw.given)))
    for place in ((0, 0, 0), (3, 7, 11)):
        expected, found = draw(*place), again(*place)
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
