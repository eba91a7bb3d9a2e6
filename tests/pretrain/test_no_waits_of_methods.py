"""No method's step waits for the device: its forward pass, and what it does before and after the optimizer's step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_cases import CASES, config_of
from fake_gpu import CUDA, OnHost, trace_on_fake_gpu
from tiny import build, random_batch
from torch import Tensor, nn

from pretrain.methods.base import Method
from pretrain.methods.frozen import Frozen
from pretrain.stream.batches import ON_THE_HOST
from pretrain.stream.hidden import note_hidden

VARIANTS = {name: {} for name in CASES} | {
    "center": {"ibot": {"min_block": 1}},
    "sinkhorn": {"ibot": {"min_block": 1, "separate_head": True, "unit": 8}, "centering": "sinkhorn"},
}


class StepOf(nn.Module):
    """All that a method does in a step but for the backward pass; frozen networks among its parts, to be faked too."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        for module in method.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Frozen):
                    setattr(self, f"frozen_{name}", value.network)
                    value._device = CUDA

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.method.before_step(1, [batch], lambda batch: None)
        output = self.method(batch, 1)
        self.method.after_step(1)
        self.method.after_step(1, output["loss"].isfinite())
        return output


@pytest.mark.parametrize("name", VARIANTS)
def test_no_method_waits(name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a generator on a GPU that is not there can't be made; seeding one is the host's business
    monkeypatch.setattr("pretrain.methods.dvae.method.gumbel_noise", lambda like, *_: like * 0)
    # numbers of fake tensors can't be had on the host either
    monkeypatch.setattr("pretrain.methods.finetune.method.on_host", lambda fake: np.indices(fake.shape)[0] % 100)
    monkeypatch.setattr("pretrain.methods.finetune.labels.Table.rows", lambda table, samples, _: np.zeros(4, np.int64))
    case = name if name in CASES else "dinov2"
    monkeypatch.setattr("pretrain.methods.clip.captions.DrawnCaptions.tokens", lambda *_: np.zeros((4, 12), np.int64))
    monkeypatch.setattr("pretrain.methods.clip.method.on_host", lambda fake: fake)
    config = config_of(case, shards, tmp_path, drop_path=0.0, method=VARIANTS[name])
    method = build(config).train()
    batch: dict[str, Any] = note_hidden(random_batch(config))
    batch = {key: OnHost(value) if key in ON_THE_HOST else value for key, value in batch.items()}
    output = trace_on_fake_gpu(StepOf(method), batch)
    assert {value.device for value in output.values()} == {CUDA}
    assert output["loss"].shape == ()
