"""FLOPs, tokens and MFU: by formulas on paper, for masked encoders, teachers and recomputed blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from block_cases import CASES, config_of
from tiny import build, config_data, random_batch

from data_pipelines.loader import Batch
from pretrain.config.load import parse_config
from pretrain.engines.blocks import prepare_blocks
from pretrain.methods.base import Method
from pretrain.tracking.peaks import PEAKS, peak_flops, peak_of
from pretrain.tracking.work import Work, count_work, rates_of


def work_of(method: Method, batch: Batch) -> Work:
    return count_work(method, batch, lambda batch: method(batch, 1))


def transformer(dim: int, depth: int, tokens: int, queries_of_last: int | None = None) -> int:
    """FLOPs of the forward pass of so many blocks with an MLP of 4 dim: 24 n d^2 + 4 n^2 d each."""
    return depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim)


def test_mae_encodes_a_quarter_and_decodes_all(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "vit", shards, tmp_path)
    data["encoder"] = {"family": "vit", "dim": 64, "depth": 3, "heads": 2, "patch": 4, "pool": "mean"}
    data["method"] |= {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
    data["method"]["mask"] = {"ratio": 0.75, "unit": 4}
    config = parse_config(data)
    work = work_of(build(config), random_batch(config))
    tokens, hidden = 64, 48
    assert work.tokens == 16 + 1  # of 64 patches, and the class token
    pixels = 2 * tokens * 48 * 64  # the patch embedding sees the whole image
    encoder = transformer(64, 3, 17)
    decoder = 2 * 17 * 64 * 32 + transformer(32, 2, 65) - 16 * 32**2 * (65 - hidden) + 2 * hidden * 32 * 48
    assert work.flops == pytest.approx(3 * (pixels + encoder + decoder), rel=1e-6)


def test_a_teacher_counts_once_and_a_student_threefold(shards: Path, tmp_path: Path) -> None:
    config = config_of("dino", shards, tmp_path)
    method, batch = build(config), random_batch(config)
    total = work_of(method, batch).flops
    method.teacher.requires_grad_(True)
    threefold = work_of(method, batch).flops
    size = config.encoder.dim
    teacher = 2 * (transformer(size, 2, 65) + 2 * 64 * 48 * size)  # of two global crops, without its head
    assert (threefold - total) / 2 == pytest.approx(teacher, rel=0.5)
    assert (threefold - total) / 2 > teacher
    assert work_of(method, batch).tokens == 2 * 65 + 2 * 17


@pytest.mark.parametrize("case", CASES)
def test_counting_changes_nothing_and_sees_through_recomputed_blocks(case: str, shards: Path, tmp_path: Path) -> None:
    config = config_of(case, shards, tmp_path, activation_checkpointing=True)
    plain, twice = build(config).train(), build(config).train()
    batch = random_batch(config)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    counts = {name: value.clone() for name, value in plain.named_buffers()}
    found = work_of(plain, batch)
    assert found.flops > 0
    assert plain.training
    torch.testing.assert_close(dict(plain.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(plain.named_buffers()), counts, rtol=0, atol=0)
    prepare_blocks(twice.blocks(), config.engine)
    assert work_of(twice, batch) == found
    assert found.tokens is None if case == "dvae" else found.tokens > 0


def test_the_work_of_an_image_does_not_depend_on_the_batch(shards: Path, tmp_path: Path) -> None:
    config = config_of("mae", shards, tmp_path)
    method = build(config)
    assert work_of(method, random_batch(config, 2)) == work_of(method, random_batch(config, 6))


def test_attention_is_counted_on_this_device() -> None:
    from pretrain.tracking.work import FlopCounterMode, _attention

    query = torch.randn(2, 4, 16, 8)
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * (2 * 4 * 16 * 16 * 8) * 2


def test_rates() -> None:
    work = Work(flops=60e9, tokens=50.0)
    assert work.rates(1000.0, None, 2) == {"teraflops": 60.0, "tokens_per_second": 50_000.0}
    assert work.rates(1000.0, 300e12, 2)["mfu"] == pytest.approx(0.1)
    assert Work(1e9, None).rates(10.0, None, 1) == {"teraflops": 0.01}


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 311.9),
        ("NVIDIA A100-PCIE-40GB", "fp32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA L40S", "fp32", 183.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("Tesla V100-SXM2-16GB", "fp32", 15.7),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", None),
        ("a card of next year", "bf16", None),
    ],
)
def test_the_peak_is_known_by_the_devices_name(name: str, precision: str, tflops: float | None) -> None:
    assert peak_of(name, precision) == (None if tflops is None else tflops * 1e12)


def test_a_peak_that_is_given_and_that_of_a_cpu() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "fp32", 0.2) == 0.2e12


def test_a_longer_name_comes_before_those_it_holds() -> None:
    names = [name for name, *_ in PEAKS]
    held: list[Any] = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if f" {a} " in f" {b} "]
    assert not held


def test_what_cant_be_counted_is_told_and_left_out(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("mae", shards, tmp_path)
    method = build(config).train()

    def look(batch: Batch) -> None:
        raise NotImplementedError("no formula for this")

    rates = rates_of(method, random_batch(config), look, None, 1)
    assert rates(100.0) == {}
    assert "no MFU is told (NotImplementedError: no formula for this" in capsys.readouterr().out
    assert method.training
