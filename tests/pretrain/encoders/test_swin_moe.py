"""Swin-MoE: routes against a slow loop over tokens, and what does not change them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from tiny import build, config_data, random_batch
from torch import Tensor, nn

from data_pipelines.rng import bits_at, stream_keys
from pretrain.config.load import ConfigError, check_batch, parse_config
from pretrain.encoders import build_encoder
from pretrain.encoders.drop_path import drawn
from pretrain.encoders.swin_moe import routing
from pretrain.encoders.swin_moe.blocks import MoeBlock, WindowAttention
from pretrain.encoders.swin_moe.config import SwinMoeConfig
from pretrain.encoders.swin_moe.encoder import SwinMoeEncoder
from pretrain.encoders.swin_moe.experts import MoeMlp
from pretrain.encoders.swin_moe.gate import bits_of, normals
from pretrain.engines.blocks import recomputed
from pretrain.interop.export import export_encoder
from pretrain.interop.official import import_checkpoint

SMALL: dict[str, Any] = {
    "dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 4, "window": 4, "experts": 3, "mlp_ratio": 2.0, "group": 2,
}  # fmt: skip


def config_of(**settings: Any) -> SwinMoeConfig:
    return SwinMoeConfig(**{**SMALL, **settings})


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> SwinMoeEncoder:
    torch.manual_seed(0)
    encoder = build_encoder(config_of(**settings), size, mask_token=True)
    for parameter in encoder.parameters():  # experts start too small to show anything
        nn.init.normal_(parameter, std=0.2)
    return encoder


def images(count: int = 4, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def slow_kept(gates: Tensor, experts: Tensor, capacity: int | None, prioritised: bool, num: int) -> Tensor:
    """(t, k) bool of one group: token by token, as the paper says it."""
    order = sorted(range(len(gates)), key=lambda t: -float(gates[t, 0].detach())) if prioritised else range(len(gates))
    taken, kept = [0] * num, torch.zeros(experts.shape, dtype=torch.bool)
    for choice in range(experts.shape[1]):
        for token in order:
            expert = int(experts[token, choice])
            kept[token, choice] = capacity is None or taken[expert] < capacity
            taken[expert] += 1
    return kept


def slow_layer(layer: MoeMlp, tokens: Tensor, group: int, factor: float | None) -> tuple[Tensor, Tensor]:
    """What the layer should give (b, h, w, d), and the share of choices without a place."""
    config, outcome, dropped = layer.config, torch.zeros_like(tokens), []
    flat, flat_outcome = (rearrange(x, "(g m) h w d -> g (m h w) d", m=group) for x in (tokens, outcome))
    rows = []
    for x in flat:
        gates, experts = layer.gate(x).softmax(-1).topk(config.top_k)
        share = math.ceil(len(x) / config.experts)
        capacity = None if factor is None else config.top_k * int(factor * share)
        kept = slow_kept(gates, experts, capacity, config.prioritised, config.experts)
        dropped.append(1 - kept.float().mean())
        for token in range(len(x)):
            total = torch.zeros_like(x[token])
            for choice in range(config.top_k):
                if kept[token, choice]:
                    e = int(experts[token, choice])
                    fc1, fc2 = layer.experts.fc1, layer.experts.fc2
                    hidden = F.gelu(F.linear(x[token], fc1.weight[e], fc1.bias[e]))
                    bias = None if fc2.bias is None else fc2.bias[e]
                    total = total + gates[token, choice] * F.linear(hidden, fc2.weight[e], bias)
            rows.append(total)
    assert flat_outcome.shape == flat.shape
    return torch.stack(rows).view(tokens.shape), torch.stack(dropped).mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prioritised": False},
        {"top_k": 2, "fc2_bias": True, "capacity_factor": 0.7},
        {"router": "cosine", "cosine_dim": 4, "capacity_factor": None},
    ],
)
def test_a_layer_is_the_loop_over_its_tokens(settings: dict[str, Any], training: bool) -> None:
    torch.manual_seed(1)
    layer = MoeMlp(6, config_of(**settings), 0).train(training)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(4, 2, 3, 6, requires_grad=True)
    cotangent = torch.randn(4, 2, 3, 6)
    given = [tokens, *layer.parameters()]
    routed = layer(tokens, 2, None)
    fast = torch.autograd.grad((routed.tokens * cotangent).sum(), given)
    expected, dropped = slow_layer(layer, tokens, 2, layer.config.capacity_factor if training else None)
    slow = torch.autograd.grad((expected * cotangent).sum(), given)
    torch.testing.assert_close(routed.tokens, expected)
    torch.testing.assert_close(routed.dropped, dropped)
    assert training == bool(routed.balance > 0)
    if training and layer.config.capacity_factor is not None:
        assert dropped > 0
    for own, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [[0] * 12, [2] * 11 + [0], [0, 1, 2, 3] * 3, [3, 3, 1, 3, 1, 3, 1, 1, 3, 3, 3, 1]])
def test_every_token_finds_a_place_whatever_they_ask_for(asked: list[int]) -> None:
    experts = torch.tensor(asked).view(2, 6, 1)
    plan = routing.unlimited(routing.Choice(experts, torch.ones(2, 6, 1)), 4)
    assert plan.kept.all()
    places = plan.places.flatten()
    assert len(set(places.tolist())) == 12
    assert plan.expert_of_block is not None
    assert plan.expert_of_block[places // plan.block_size].tolist() == asked
    tokens = torch.randn(2, 6, 5)
    torch.testing.assert_close(routing.returned(routing.gathered(tokens, plan), plan, torch.ones(2, 6, 1)), tokens)


@pytest.mark.parametrize("kind", ["importance_load", "shazeer", "gshard"])
def test_balance_losses_are_their_formulas(kind: routing.Balance) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, noise = (torch.randn(2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    noisy, deviation = logits + 0.25 * noise, 0.25
    choice = routing.choose(noisy.softmax(-1), 2)
    losses = []
    for clean, rough in zip(logits.numpy(), noisy.numpy(), strict=True):
        soft, gate = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (clean, rough))
        if kind == "gshard":
            share = np.bincount(rough.argmax(1), minlength=4) / 9
            losses.append(4 * float((gate.mean(0) * share).sum()))
            continue
        compared = soft if kind == "importance_load" else clean
        load = np.zeros(4)
        for token in range(9):
            second = np.sort(rough[token])[-2]
            for expert in range(4):
                load[expert] += NormalDist(0, deviation).cdf(compared[token, expert] - second)
        losses.append(sum(x.var(ddof=1) / (x.mean() ** 2 + 1e-10) for x in (soft.sum(0), load)) / 2)
    ours = routing.balance_loss(kind, logits, noisy, choice, deviation)
    assert float(ours) == pytest.approx(np.mean(losses), rel=1e-9)


def test_noise_is_the_streams_numbers_and_normal() -> None:
    keys = stream_keys(3, np.arange(5))
    ours = bits_of(torch.from_numpy(keys.view(np.int64)), 1 << 33, 7).numpy().view(np.uint64)
    for key, row in zip(keys, ours, strict=True):
        np.testing.assert_array_equal(row, bits_at(int(key), np.arange(7) + (1 << 33)))
    many = normals(torch.arange(4000), 0, (5, 4))
    assert abs(float(many.mean())) < 0.01
    assert float(many.std()) == pytest.approx(1, abs=0.01)
    assert many.isfinite().all()


def learned(encoder: SwinMoeEncoder, parts: Sequence[slice], step: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of 8 images and 8 smaller crops in micro-batches, and the gradients of what a method would learn."""
    encoder.zero_grad()
    rows, shown, small, found = torch.arange(8, 16), images(8), images(16, (16, 16), 1), []
    for part in parts:
        count = len(rows[part])
        crops = rearrange(rearrange(small, "(v b) c h w -> v b c h w", v=2)[:, part], "v b c h w -> (v b) c h w")
        with drawn(1, step, rows[part]), pytest.MonkeyPatch.context() as patch:
            balance: list[Tensor] = []
            patch.setattr(
                "pretrain.encoders.side_losses.add", lambda name, loss, weight, to=balance: to.append(weight * loss)
            )
            outputs = [encoder(shown[part]).pooled, encoder(crops).pooled]
        loss = sum(output.square().mean() for output in outputs) + 10 * sum(balance)
        (loss * count / 8).backward()
        found.append(torch.cat([outputs[0], outputs[1].view(2, count, -1)[0]], dim=1).detach())
    return torch.cat(found), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"drop_path": 0.5}, {"capacity_factor": None, "router": "cosine"}])
def test_routes_do_not_depend_on_who_shares_the_micro_batch(settings: dict[str, Any]) -> None:
    encoder = make(**settings).train()
    whole, gradients = learned(encoder, [slice(0, 8)])
    halves, same = learned(encoder, [slice(0, 2), slice(2, 8)])
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)
    assert not torch.allclose(learned(encoder, [slice(0, 8)], step=4)[0], whole)  # other noise


def test_what_is_computed_again_goes_the_same_ways() -> None:
    encoder = make(drop_path=0.5).train()
    plain, gradients = learned(encoder, [slice(0, 8)])
    for block in encoder.blocks():
        block.forward = recomputed(block.forward)
    again, same = learned(encoder, [slice(0, 8)])
    assert torch.equal(again, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()), msg=name)


def test_in_evaluation_an_image_is_seen_alone() -> None:
    encoder = make().eval()
    torch.testing.assert_close(encoder(images(5)).pooled[:2], encoder(images(5)[:2]).pooled, rtol=1e-5, atol=1e-6)
    wide = make((32, 64), windows=(4, 4)).eval()
    assert wide(images(2, (32, 64))).grid == (4, 8)
    square = make(windows=(4, 4)).eval()
    torch.testing.assert_close(square(images(2, (32, 64))).pooled, wide(images(2, (32, 64))).pooled)


def test_positions_come_from_log_spaced_offsets() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(4, 2, 3)
    x = torch.randn(2, 9, 4)
    query, key, value = rearrange(attention.qkv(x), "w n (three h d) -> three w h n d", three=3, h=2)
    scores = query @ rearrange(key, "w h n d -> w h d n") / math.sqrt(2)
    for i in range(9):
        for j in range(9):
            apart = [(i // 3 - j // 3) / 2 * 8, (i % 3 - j % 3) / 2 * 8]
            log = torch.tensor([math.copysign(math.log2(abs(a) + 1) / 3, a) for a in apart])
            scores[:, :, i, j] += attention.cpb_mlp(log)
    mixed = rearrange(scores.softmax(-1) @ value, "w h n d -> w n (h d)")
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_a_method_learns_to_balance_and_tells_the_loads() -> None:
    data = config_data("mim", "swin", Path("nowhere"), Path("nowhere"))
    data["encoder"] = {"family": "swin_moe", **SMALL, "patch": 2}
    config = parse_config(data)
    method = build(config).train()
    outputs = method(random_batch(config), 0)
    weight = config.encoder.balance_weight
    expected = outputs["method_loss"] + weight * outputs["moe_balance"]
    torch.testing.assert_close(outputs["loss"].detach(), expected)
    moe = [index for index, block in enumerate(method.encoder.blocks()) if isinstance(block, MoeBlock)]
    assert moe == [1, 3]  # of two stages, the second block of each
    for index in moe:
        loads = [outputs[f"moe_load/block_{index}_expert_{expert}"] for expert in range(3)]
        assert float(sum(loads)) == pytest.approx(3)
        assert outputs["moe_load_lowest"] <= min(loads) <= max(loads) <= outputs["moe_load_highest"]
    outputs["loss"].backward()
    assert all(p.grad is not None for p in method.encoder.parameters())
    assert "moe_balance" not in method.eval()(random_batch(config), 0)
    with pytest.raises(ConfigError, match=r"encoder\.group is 2: .* a micro-batch has 1; .*a divisor"):
        check_batch(config, 8)
    check_batch(config, 4)
    with drawn(0, 0, torch.arange(1, 5)), pytest.raises(ValueError, match="micro-batch has 4, from row 1"):
        method.encoder.train()(images())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 4}, "top_k is 4 and there are 3 experts"),
        ({"expert_blocks": ((), (2,))}, r"block 2 of stage 1, which has 0 \.\. 1"),
        ({"windows": (4,)}, "windows names 1 stages and depths 2"),
        ({"gate_noise": 0.0}, "set balance=gshard"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def official(encoder: SwinMoeEncoder, ranks: int) -> list[dict[str, Tensor]]:
    """The encoder as the authors' code would save it: what ranks share, then what each rank has of the experts."""
    shared: dict[str, Tensor] = {"head.weight": torch.zeros(5, encoder.dim)}
    own: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    experts = encoder.config.experts
    for key, value in encoder.inner().state_dict().items():
        if ".experts." not in key:
            shared[key.replace(".mlp.gate.", ".mlp._moe_layer.gates.0.")] = value
            continue
        before, layer, kind = key.partition(".experts.")[0], *key.split(".")[-2:]
        if kind == "weight":
            name, value = f"{layer}_w", value if layer == "fc1" else rearrange(value, "e o i -> e i o")
        else:
            name = f"{layer}_bias"
        shards = ranks // experts or 1
        if name == "fc2_bias":  # not of hidden units: equal parts of what it is added to, the last filled up
            value = F.pad(value, (0, -value.shape[1] % shards))
        if shards > 1:
            value = rearrange(value, "e (s h) ... -> (e s) h ...", s=shards)
        for rank, part in enumerate(value.chunk(ranks)):
            own[rank][f"{before}._moe_layer.experts.batched_{name}"] = part.clone()
    for stage in range(2):
        side = 2 * encoder.config.window_of(stage, (32, 32)) - 1
        along = torch.linspace(-8, 8, side)
        along = along.sign() * (along.abs() + 1).log2() / 3
        table = torch.stack(torch.meshgrid(along, along, indexing="ij"), dim=-1)[None]
        for block in range(2):
            shared[f"layers.{stage}.blocks.{block}.attn.relative_coords_table"] = table
    return [shared, *own]


@pytest.mark.parametrize(("router", "ranks", "bias"), [("linear", 3, False), ("cosine", 6, True), ("linear", 9, True)])
def test_the_authors_files_are_read(router: str, ranks: int, bias: bool, tmp_path: Path) -> None:
    """Of an expert a rank, of two ranks that share one, and of three, of which fc2's bias makes no equal parts."""
    settings = {"router": router, "cosine_dim": 5, "fc2_bias": bias, "mlp_ratio": 3.0}
    encoder = make(**settings).eval()
    shared, *own = official(encoder, ranks)
    torch.save({"model": shared, "epoch": 3}, tmp_path / "swin_moe.pth.master")
    for rank, piece in enumerate(own):
        torch.save({"model": piece}, tmp_path / f"swin_moe.pth.rank{rank}")
    imported = import_checkpoint(tmp_path / "swin_moe.pth.master", "swin_moe", tmp_path / "out", image_size=32)
    expected = config_of(**settings)
    kept = ("dim", "depths", "heads", "patch", "experts", "router", "mlp_ratio", "fc2_bias")
    assert {name: getattr(imported.encoder, name) for name in kept} == {name: getattr(expected, name) for name in kept}
    loaded = build_encoder(imported.encoder, (32, 32)).eval()
    loaded.inner().load_state_dict(imported.weights)
    torch.testing.assert_close(loaded(images()).pooled, encoder(images()).pooled)
    with pytest.raises(ValueError, match=r"timm .* has no model that takes these weights \(swin_moe"):
        export_encoder(tmp_path / "out", tmp_path / "timm.safetensors", "timm")
    (tmp_path / "swin_moe.pth.rank1").unlink()
    with pytest.raises(ValueError, match="none of rank 1"):
        import_checkpoint(tmp_path / "swin_moe.pth.master", "swin_moe", tmp_path / "again")


def test_the_teacher_needs_no_group() -> None:
    """An encoder in evaluation takes any number of images, of which none is dropped."""
    encoder = make().eval()
    with drawn(0, 0, torch.arange(1, 4)):
        assert encoder(images(3)).pooled.isfinite().all()
    assert dataclasses.replace(encoder.config, group=1).group == 1
