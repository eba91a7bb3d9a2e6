"""I-JEPA: what it sees and predicts, its prediction as a slow loop, and the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import column, run_all
from tiny import build, config_data, random_batch

from pretrain.config.load import ConfigError, parse_config
from pretrain.interop.official import import_checkpoint
from pretrain.methods.ijepa.config import IjepaConfig
from pretrain.methods.ijepa.masks import block_size, ijepa_masks, plan
from pretrain.methods.ijepa.method import block_units

GRID = (16, 12)


def test_blocks_are_of_one_size_and_hidden_from_who_predicts_them() -> None:
    settings, rows = IjepaConfig(), 24
    draw = ijepa_masks(settings, GRID, rows)
    sizes = set()
    for step in range(12):
        whole = plan(settings, GRID, rows, 5, step)
        sizes.add(whole.target)
        height, width = whole.target
        assert 0.1 < height * width / (GRID[0] * GRID[1]) < 0.25
        for row in range(rows):
            fields = draw(5, step, row)
            assert int((~fields["drop_mask"]).sum()) == whole.count >= settings.min_context
            for top, left in fields["target_corners"]:
                block = fields["drop_mask"][top : top + height, left : left + width]
                assert block.shape == whole.target
                assert block.all()
    assert len(sizes) > 4


def test_a_row_is_drawn_alike_by_whoever_draws_it() -> None:
    first, second = (ijepa_masks(IjepaConfig(), GRID, 16) for _ in range(2))
    one = first(1, 2, 3)
    plan.cache_clear()
    second(1, 2, 9)
    for name, value in second(1, 2, 3).items():
        np.testing.assert_array_equal(value, one[name])
    assert any(not np.array_equal(one["drop_mask"], first(1, 2, row)["drop_mask"]) for row in (4, 5))


@pytest.mark.parametrize("sampling", ["fair", "as_published"])
def test_fair_blocks_reach_every_unit_and_published_ones_do_not(sampling: str) -> None:
    settings = IjepaConfig(sampling=sampling)
    seen, wanted = np.zeros(GRID), np.zeros(GRID)
    draw = ijepa_masks(settings, GRID, 32)
    for step in range(40):
        height, width = plan(settings, GRID, 32, 0, step).target
        for row in range(32):
            fields = draw(0, step, row)
            seen += ~fields["drop_mask"]
            for top, left in fields["target_corners"]:
                wanted[top : top + height, left : left + width] += 1
    for counts in (seen, wanted):
        assert (counts[-1].any() and counts[:, -1].any()) == (sampling == "fair")
    upper, lower = seen[:8].sum(), seen[8:].sum()
    assert (0.9 < upper / lower < 1.1) == (sampling == "fair")


def test_the_size_of_a_block_is_the_share_of_the_grid() -> None:
    assert block_size((16, 16), 0.2, 1.0, within=False) == (7, 7)
    assert block_size((16, 16), 1.0, 1.0, within=False) == (16, 16)
    assert block_size((16, 16), 1.0, 1.0, within=True) == (15, 15)
    assert block_size((4, 16), 0.5, 1.5, within=False) == (4, 5)


def test_each_block_is_predicted_by_itself(shards: Path, tmp_path: Path) -> None:
    config = parse_config(config_data("ijepa", "vit", shards, tmp_path))
    method, batch = build(config).eval(), random_batch(config, config.train.batch_size)
    images = method.normalise(batch["global_crops"][:, 0])
    sizes = plan(config.method, method.grid, config.train.batch_size, config.seed, 0)
    wanted = block_units(batch["target_corners"], sizes.target, method.grid[1])
    total = 0.0
    with torch.no_grad():
        for number, image in enumerate(images):
            whole = F.layer_norm(method.teacher(image[None]).tokens[0], (method.encoder.dim,))
            visible = (~batch["drop_mask"][number]).flatten().nonzero().flatten()
            tokens = method.encoder(image[None], type_mask(batch, number)).tokens[0]
            for block in wanted[number]:
                states = torch.cat(
                    [
                        method.predictor.embed(tokens) + method.predictor.positions[visible],
                        method.predictor.mask_token[0] + method.predictor.positions[block],
                    ]
                )[None]
                for layer in method.predictor.blocks:
                    states = layer(states)
                told = method.predictor.proj(method.predictor.norm(states))[0, len(visible) :]
                total += F.smooth_l1_loss(told, whole[block]) / wanted.shape[1] / len(images)
        found = method(batch, 0)["loss"]
    torch.testing.assert_close(found, total, rtol=1e-4, atol=1e-6)


def type_mask(batch: dict[str, torch.Tensor], number: int) -> Any:
    from pretrain.encoders.base import Mask

    return Mask(drop=batch["drop_mask"][number][None])


def test_two_ranks_and_micro_batches_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    cells: dict[int, dict[str, Any]] = {}
    for ranks, accumulation, stage in ((1, 1, 0), (2, 2, 3)):
        train = {"steps": 4, "batch_size": 16, "grad_accum_steps": accumulation}
        data = config_data("ijepa", "vit", shards, tmp_path, train=train, engine={"zero_stage": stage})
        data["encoder"]["drop_path"] = 0.3
        cells[ranks] = {**data, "name": str(ranks)}
        run_all([cells[ranks]], ranks, tmp_path)
    assert column(cells[2], "ids_digest") == column(cells[1], "ids_digest")
    for name in ("loss", "grad_norm"):
        assert column(cells[2], name) == pytest.approx(column(cells[1], name), rel=1e-4), name


@pytest.mark.parametrize(
    ("method", "encoder", "told"),
    [
        ({"targets": 9}, {}, "may hide all of it"),
        ({"min_context": 64}, {}, "method.min_context is 64 of 64 units"),
        ({"target_scale": [0.3, 0.2]}, {}, "must rise"),
        ({"unit": 5}, {}, "a token of this encoder is 4 px: they must be equal"),
    ],
)
def test_what_cannot_be_is_refused(
    method: dict[str, Any], encoder: dict[str, Any], told: str, shards: Path, tmp_path: Path
) -> None:
    data = config_data("ijepa", "vit", shards, tmp_path, encoder=encoder)
    data["method"] |= method
    with pytest.raises(ConfigError, match=told):
        parse_config(data)


def test_the_authors_checkpoints_are_read(shards: Path, tmp_path: Path) -> None:
    data = config_data("ijepa", "vit", shards, tmp_path, encoder={"class_token": False, "positions": "sincos"})
    method = build(parse_config(data))
    own = {name.removeprefix("vit."): value for name, value in method.encoder.state_dict().items()}
    predictor = {
        name if name == "mask_token" else f"predictor_{name}": value
        for name, value in method.predictor.state_dict().items()
    }
    wrapped = {"encoder": own, "target_encoder": {name: value + 1 for name, value in own.items()}}
    wrapped["predictor"] = predictor | {"predictor_pos_embed": method.predictor.positions[None]}
    for name in ("pos_embed",):
        wrapped["target_encoder"][name] = own[name]
    prefixed = {part: {f"module.{name}": value for name, value in state.items()} for part, state in wrapped.items()}
    torch.save({**prefixed, "opt": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    for which, more in (("teacher", 1.0), ("student", 0.0)):
        heads = f"heads={method.encoder.config.heads}"
        found = import_checkpoint(
            tmp_path / "checkpoint.pth", "ijepa", tmp_path / which, overrides=(heads,), which=which
        )
        torch.testing.assert_close(found.weights["norm.weight"], own["norm.weight"] + more)
        assert found.encoder.positions == "sincos"
        assert found.method.keys() == {f"predictor.{name}" for name in method.predictor.state_dict()}
