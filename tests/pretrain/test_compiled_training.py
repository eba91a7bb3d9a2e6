"""Compiled training against eager training, from the same weights on the same batches.

Each method's blocks are compiled for this processor, which takes minutes; `COMPILED_STEPS=300` looks further:
`pytest -s -m slow tests/pretrain/test_compiled_training.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from block_cases import CASES, config_of
from tiny import build, random_batch

from pretrain.config import Config
from pretrain.engines.blocks import prepare_blocks

STEPS = int(os.environ.get("COMPILED_STEPS", "30"))


def losses(config: Config, steps: int) -> list[float]:
    """The loss of each of so many steps of AdamW over four batches."""
    torch._dynamo.reset()
    method = build(config).train()
    prepare_blocks(method.blocks(), config.engine)
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), 1e-3)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = method(random_batch(config, 8, seed=step % 4), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
        found.append(float(loss.detach()))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (graphs > 0) == config.engine.compile, f"{graphs} graphs were compiled"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_training_follows_eager_training(case: str, shards: Path, tmp_path: Path) -> None:
    sides = {}
    for compiled in (False, True):
        # drop path draws from another generator when it is compiled
        config = config_of(case, shards, tmp_path, drop_path=0.0, compile=compiled)
        sides[compiled] = losses(config, STEPS)
    gaps = [abs(a - b) / abs(a) for a, b in zip(sides[False], sides[True], strict=True)]
    first, last = sides[False][0], sides[False][-1]
    print(f"{case}: {STEPS} steps, loss {first:.4f} -> {last:.4f}; gap at most {max(gaps):.1e}, last {gaps[-1]:.1e}")
    assert max(gaps) < 0.01
