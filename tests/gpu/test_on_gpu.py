"""What only a GPU can fail. Skipped without one; SELFSIGHT_REHEARSE=1 runs it on the CPU, to see that it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from block_cases import CASES, config_of
from tiny import build, random_batch, write_shards, write_sources

from data_pipelines.buffers import map_batch
from pretrain.encoders.packed import attend_at_once, attend_packed
from pretrain.tracking.step_clock import StepClock
from pretrain.tracking.work import count_work

REHEARSED = os.environ.get("SELFSIGHT_REHEARSE") == "1"
DEVICE = torch.device("cpu" if REHEARSED else "cuda")
pytestmark = pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="there is no GPU")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-shards")
    write_shards(folder)
    write_sources(folder)
    return folder


def on_device(batch: Any) -> Any:
    return map_batch(batch, lambda tensor: tensor.to(DEVICE))


@pytest.mark.parametrize("case", CASES)
def test_a_method_learns_on_the_device_what_it_learns_on_the_cpu(case: str, shards: Path, tmp_path: Path) -> None:
    config = config_of(case, shards, tmp_path, drop_path=0.0)
    sides = {}
    for device in (torch.device("cpu"), DEVICE):
        method = build(config).to(device).train()
        batch = random_batch(config)
        loss = method(batch if device.type == "cpu" else on_device(batch), 1)["loss"]
        loss.backward()
        sides[device] = loss.detach().cpu(), [p.grad.cpu() for p in method.parameters() if p.grad is not None]
    (exact, gradients), (found, others) = sides[torch.device("cpu")], sides[DEVICE]
    if case == "dvae":  # whose noise is drawn on the device
        assert torch.isfinite(found)
        return
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=0.02, atol=1e-3 * float(one.abs().max()) + 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_near_fp32(case: str, shards: Path, tmp_path: Path) -> None:
    config = config_of(case, shards, tmp_path, drop_path=0.0)
    method, batch = build(config).to(DEVICE).train(), on_device(random_batch(config))
    exact = method(batch, 1)["loss"]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rounded = method(batch, 1)["loss"]
    assert float(rounded) == pytest.approx(float(exact), rel=0.03)


def test_the_same_work_is_counted_as_on_the_cpu(shards: Path, tmp_path: Path) -> None:
    config = config_of("dinov2", shards, tmp_path, drop_path=0.0)
    method, batch = build(config), random_batch(config)
    expected = count_work(method, batch, lambda batch: method(batch, 0))
    method, batch = method.to(DEVICE), on_device(batch)
    assert count_work(method, batch, lambda batch: method(batch, 0)) == expected


def test_the_clock_of_a_step_measures_the_device() -> None:
    clock = StepClock(DEVICE)
    values = torch.randn(512, 512, device=DEVICE)
    for _ in range(3):
        with clock.part("forward"):
            for _ in range(20):
                values = (values @ values).clamp(-1, 1)
        with clock.part("backward"):
            values = values + 1
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    shares = clock.read(10.0)
    assert shares["forward_share"] > shares["backward_share"] > 0


@pytest.mark.skipif(REHEARSED, reason="the kernel for sequences of any length is for GPUs only")
def test_many_lengths_in_one_call_are_a_call_each() -> None:
    groups = ((3, 17), (1, 5), (2, 197), (4, 37), (1, 1))
    qkv = torch.randn(sum(n * length for n, length in groups), 3 * 128, device=DEVICE, dtype=torch.bfloat16)
    sides = []
    for attend in (attend_at_once, lambda part, heads, groups: attend_packed(part.float(), heads, groups)):
        given = qkv.clone().requires_grad_()
        attended = attend(given, 2, groups).float()
        attended.square().sum().backward()
        sides.append((attended.detach(), given.grad.float()))
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
