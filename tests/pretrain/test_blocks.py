"""What is compiled or computed a second time: it changes no gradient, and nothing is counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_cases import CASES, config_of
from tiny import build, random_batch
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.encoders.drop_path import drawn
from pretrain.engines.blocks import keeps_statistics, prepare_blocks
from pretrain.methods.base import Method


def learned(method: Method, config: Config, steps: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and buffers after the forward and backward passes of so many micro-batches."""
    method.train()
    for number in range(steps):
        torch.manual_seed(number)
        batch = random_batch(config, seed=number)
        with drawn(0, number, batch["rows"]):
            loss = method(batch, 1)["loss"]
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return gradients, {name: buffer.clone() for name, buffer in method.named_buffers()}


@pytest.mark.parametrize("case", CASES)
def test_computing_blocks_twice_changes_no_gradient_and_counts_nothing_twice(
    case: str, shards: Path, tmp_path: Path
) -> None:
    config = config_of(case, shards, tmp_path, activation_checkpointing=True)
    plain, twice = build(config), build(config)
    prepare_blocks(twice.blocks(), config.engine)
    expected, found = learned(plain, config, steps=2), learned(twice, config, steps=2)
    assert expected[0]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_called_in_training_and_hold_the_work(case: str, shards: Path, tmp_path: Path) -> None:
    config = config_of(case, shards, tmp_path)
    method = build(config)
    blocks, called = method.blocks(), set[int]()
    assert len(set(blocks)) == len(blocks)
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: called.add(number))
    learned(method, config)
    assert called == set(range(len(blocks))), "what is compiled, but called past its own call, stays as it was"
    inside = {id(p) for block in blocks for p in block.parameters()}
    learning = [p for p in method.parameters() if p.requires_grad]
    share = sum(p.numel() for p in learning if id(p) in inside) / sum(p.numel() for p in learning)
    assert share > 0.5, f"{share:.0%} of what learns is in blocks"


def test_the_decoder_and_the_teacher_are_among_the_blocks(shards: Path, tmp_path: Path) -> None:
    mae = build(config_of("mae", shards, tmp_path))
    assert set(mae.encoder.blocks()) < set(mae.blocks())
    assert {*mae.decoder_blocks[:-1], mae.decoder_blocks[-1].mlp} < set(mae.blocks())
    dino = build(config_of("dino", shards, tmp_path))
    assert {*dino.encoder.blocks(), *dino.teacher["encoder"].blocks(), dino.head.mlp} < set(dino.blocks())
    vqkd = build(config_of("vqkd", shards, tmp_path))
    assert {*vqkd.decoder.blocks, *vqkd.teacher.network.blocks()} < set(vqkd.blocks())


def test_a_block_that_counts_is_not_computed_twice(shards: Path, tmp_path: Path) -> None:
    counting = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert keeps_statistics(counting)
    engine = config_of("mae", shards, tmp_path, activation_checkpointing=True).engine
    prepare_blocks([counting], engine)
    torch.manual_seed(0)
    images = torch.randn(8, 4)
    counting(images).sum().backward()
    assert int(counting[1].num_batches_tracked) == 1


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_a_method_without_blocks_says_so(setting: str, shards: Path, tmp_path: Path) -> None:
    engine = config_of("mae", shards, tmp_path, **{setting: True}).engine
    with pytest.raises(ConfigError, match=f"set engine.{setting}=false"):
        prepare_blocks([], engine)


@pytest.mark.parametrize("case", ["mae", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_compiled_blocks_give_what_eager_ones_do(
    case: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tracer, without code for this processor, which takes a compiler and minutes: see the slow test."""
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compile_(module, backend="eager", **options))
    config = config_of(case, shards, tmp_path, compile=True)
    plain, compiled = build(config), build(config)
    prepare_blocks(compiled.blocks(), config.engine)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        expected, found = learned(plain, config), learned(compiled, config)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)
