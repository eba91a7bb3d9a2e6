"""Crops whose sizes change from step to step: how often, of what they are made, and the same on any ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import column, run_all
from tiny import build, config_data, random_batch

from data_pipelines.transforms.config import MixedSizes
from pretrain.config.load import ConfigError, parse_config
from pretrain.stream.mixed_sizes import resized, sizes_of_step

SMALL = {"share": 3, "global_crops": 16, "local_crops": 8, "teacher_crops": 32}


@pytest.fixture
def mixed_data(shards: Path, tmp_path: Path) -> dict[str, Any]:
    data = config_data("dino", "vit", shards, tmp_path)
    data["views"] |= {"teacher_crops": {"size": 64}, "mixed_sizes": [SMALL, {"global_crops": 32}]}
    data["method"] |= {"gram": {}, "ibot": {"unit": 8, "min_block": 1}}
    return data


def test_sizes_are_drawn_by_their_shares() -> None:
    mixed = (MixedSizes(share=3, global_crops=16), MixedSizes(share=1, global_crops=32))
    drawn = [sizes_of_step(mixed, 5, step).global_crops[0] for step in range(4000)]
    assert Counter(drawn)[16] / len(drawn) == pytest.approx(0.75, abs=0.03)
    assert drawn[:50] == [sizes_of_step(mixed, 5, step).global_crops[0] for step in range(50)]
    assert drawn[:50] != [sizes_of_step(mixed, 6, step).global_crops[0] for step in range(50)]


def test_smaller_crops_show_the_same() -> None:
    flat = torch.full((2, 2, 3, 32, 32), 200, dtype=torch.uint8)
    batch = {"global_crops": flat, "rows": torch.arange(2)}
    found = resized(batch, MixedSizes(global_crops=16, local_crops=8))
    assert torch.equal(found["global_crops"], flat[..., :16, :16])
    assert found["rows"] is batch["rows"]
    assert resized(batch, MixedSizes(global_crops=32))["global_crops"] is flat


def test_student_and_teachers_see_the_sizes_of_the_step(mixed_data: dict[str, Any]) -> None:
    config = parse_config(mixed_data)
    method, batch = build(config).train(), random_batch(config)
    seen: dict[str, set[tuple[int, ...]]] = {"student": set(), "teacher": set(), "anchor": set()}
    named = {"student": method.encoder, "teacher": method.teacher["encoder"], "anchor": method.anchor.encoder}
    for name, encoder in named.items():
        encoder.register_forward_pre_hook(
            lambda module, given, name=name: seen[name].update(
                {tuple(part.shape[2:]) for part in (given[0] if isinstance(given[0], tuple) else (given[0],))}
            )
        )
    for step in range(8):
        for sizes in seen.values():
            sizes.clear()
        result = method(batch, step)
        assert result["loss"].isfinite()
        small = sizes_of_step(config.views.mixed_sizes, config.seed, step).global_crops == (16, 16)
        side, local, anchor = (16, 8, 32) if small else (32, 16, 64)
        assert seen == {
            "student": {(side, side), (local, local)},
            "teacher": {(side, side)},
            "anchor": {(anchor, anchor)},
        }


@pytest.mark.slow
def test_ranks_and_micro_batches_learn_what_one_does(mixed_data: dict[str, Any], tmp_path: Path) -> None:
    cells = {}
    for ranks, accumulation, stage in ((1, 1, 0), (2, 2, 3)):
        data = {**mixed_data, "name": str(ranks), "engine": {**mixed_data["engine"], "zero_stage": stage}}
        data["train"] = {"steps": 5, "batch_size": 16, "grad_accum_steps": accumulation}
        cells[ranks] = data
        run_all([data], ranks, tmp_path)
    for name in ("loss", "grad_norm", "gram"):
        assert column(cells[2], name) == pytest.approx(column(cells[1], name), rel=1e-4), name


@pytest.mark.parametrize(
    ("mixed", "told"),
    [
        ({"global_crops": 48}, "it must be smaller, and in the same proportion"),
        ({"global_crops": [16, 32]}, "in the same proportion"),
        ({"global_crops": 18}, "each side must be a multiple"),
        ({"global_crops": 24}, "which are no whole tokens"),
    ],
)
def test_what_cannot_be_is_refused(mixed: dict[str, Any], told: str, mixed_data: dict[str, Any]) -> None:
    mixed_data["views"]["mixed_sizes"] = [mixed]
    with pytest.raises(ConfigError, match=told):
        parse_config(mixed_data)


def test_other_methods_take_one_size(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path)
    data["views"]["mixed_sizes"] = [{"global_crops": 16}]
    with pytest.raises(ConfigError, match="mae takes crops of the same sizes in all steps"):
        parse_config(data)
