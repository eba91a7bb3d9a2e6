from __future__ import annotations

from typing import Any

import pytest

from launch.cluster.arithmetic import solve_accumulation
from pretrain.config import Config
from pretrain.config.load import ConfigError, load_config


def config(batch: int, grad_accum_steps: int = 1) -> Config:
    changes = [f"train.batch_size={batch}", f"train.grad_accum_steps={grad_accum_steps}", "data.train=x"]
    return load_config("mae_vit_cifar_cpu", changes)


@pytest.mark.parametrize(
    ("batch", "ranks", "grad_accum_steps", "micro", "expected"),
    [
        (4096, 32, 1, 64, 2),
        (4096, 8, 1, 64, 8),
        (4096, 8, 4, 64, 8),  # the micro-batch decides, not what the preset says
        (4096, 64, 1, 64, 1),
        (4096, 16, 4, None, 4),  # the preset's divides
        (96, 8, 8, None, 12),  # 12 images a rank: no 8 steps, so more of them, and no larger micro-batch
        (24, 3, 3, None, 4),
        (8, 8, 8, None, 1),  # one image a rank can't be divided at all
    ],
)
def test_it_is_solved(batch: int, ranks: int, grad_accum_steps: int, micro: int | None, expected: int) -> None:
    solved = solve_accumulation(config(batch, grad_accum_steps), ranks, micro)
    assert solved == expected
    assert batch % (ranks * solved) == 0
    if micro is not None:
        assert ranks * micro * solved == batch


@pytest.mark.parametrize(
    ("batch", "ranks", "options", "message"),
    [
        (4096, 24, {}, r"4096 .* over 24 ranks.*batch sizes: 4080 or 4104;.*ranks for 4096: 16 or 32"),
        (4, 8, {}, r"batch sizes: 8; nearest numbers of ranks for 4: 4 "),
        (4096, 8, {"micro_batch": 96}, r"has 512 of the 4096 .*Nearest micro-batches: 64 or 128; .*=3840 or 4608"),
        (4096, 64, {"micro_batch": 128}, r"has 64 .*Nearest micro-batches: 64"),
        (64, 4, {"grad_accum_steps": 3, "fixed": True}, r"each of 4 ranks has 16 .*Nearest: 2 or 4; .*60 or 72"),
        (64, 4, {"grad_accum_steps": 2, "fixed": True, "micro_batch": 4}, r"grad_accum_steps 4, .*=2 was given"),
    ],
)  # fmt: skip
def test_it_is_refused_with_the_nearest_choices(batch: int, ranks: int, options: dict[str, Any], message: str) -> None:
    grad_accum_steps = options.pop("grad_accum_steps", 1)
    given = (
        config(batch * grad_accum_steps, grad_accum_steps)
        if batch % grad_accum_steps
        else config(batch, grad_accum_steps)
    )
    object.__setattr__(given.train, "batch_size", batch)
    with pytest.raises(ConfigError, match=message):
        solve_accumulation(given, ranks, **options)
