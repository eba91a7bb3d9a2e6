"""The fused and cached forms of attention against the slow ones, and the tables that are built once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from timm.layers import gen_relative_position_index
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from pretrain.encoders import build_encoder
from pretrain.encoders.attention import attend
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.beit.encoder import relative_index
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.swin.windows import FusedWindows, FusedWindowsV2, attend_in_windows, window_mask
from pretrain.encoders.tables import built_once
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig
from pretrain.encoders.um_mae_swin.encoder import CoordinateAttention

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(module: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """What comes out with and without gradients (two forms on a CPU), and the gradients of all parameters."""
    module.zero_grad()
    learned = run()
    learned.square().sum().backward()
    with torch.no_grad():
        seen = run()
    return [learned.detach(), seen, *[parameter.grad for parameter in module.parameters()]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_swins_windows_are_timms_unfused(version: int, masked: bool) -> None:
    torch.manual_seed(0)
    timm_class, ours = (WindowAttention, FusedWindows) if version == 1 else (WindowAttentionV2, FusedWindowsV2)
    attention = timm_class(32, window_size=(4, 4), num_heads=2)
    attention.fused_attn = False
    windows = normal(3 * 4, 16, 32)
    mask = window_mask((7, 8), (8, 8), (4, 4), (2, 2), CPU) if masked else None
    slow = values(attention, lambda: attention(windows, mask))
    attention.__class__ = ours
    for fast, expected in zip(values(attention, lambda: attention(windows, mask)), slow, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-5, atol=3e-6 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("each_image", [False, True])
def test_um_mae_swins_windows_are_attended_with_a_bias_each(each_image: bool) -> None:
    torch.manual_seed(0)
    attention = CoordinateAttention(32, 2, 8)
    tokens, mask = normal(3 * 4, 16, 32), window_mask((7, 8), (8, 8), (4, 4), (2, 2), CPU)
    positions = normal(12 if each_image else 4, 16, 2, seed=1) * 5

    def slow() -> Tensor:
        offsets = positions[:, None, :, :] - positions[:, :, None, :]
        bias = attention.posmlp(rearrange(offsets.sign() * offsets.abs().log1p(), "w i j two -> w two i j"))
        bias = bias.repeat(12 // len(bias), 1, 1, 1) + mask.repeat(3, 1, 1)[:, None]
        query, key, value = rearrange(attention.qkv(tokens), "w n (three h d) -> three w h n d", three=3, h=2)
        weights = (query @ key.transpose(-2, -1) / 4 + bias).softmax(dim=-1)
        return attention.proj(rearrange(weights @ value, "w h n d -> w n (h d)"))

    expected = values(attention, slow)
    for fast, slow_value in zip(values(attention, lambda: attention(tokens, positions, mask)), expected, strict=True):
        torch.testing.assert_close(fast, slow_value, rtol=1e-5, atol=1e-5)


def test_whole_windows_share_one_bias() -> None:
    """UM-MAE's Swin asks its small network once where all windows hold the same offsets."""
    encoder = build_encoder(UmMaeSwinConfig(dim=8, depths=(1,), heads=(2,), patch=4, window=2), (32, 32)).eval()
    seen = []
    encoder.blocks()[0].attn.posmlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    whole = encoder(normal(2, 3, 32, 32)).tokens
    encoder.blocks()[0].attn.__class__.forward, plain = _every_window, encoder.blocks()[0].attn.__class__.forward
    try:
        every = encoder(normal(2, 3, 32, 32)).tokens
    finally:
        encoder.blocks()[0].attn.__class__.forward = plain
    assert seen == [1, 4]
    torch.testing.assert_close(whole, every)


def _every_window(self: CoordinateAttention, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
    places = positions.expand(4, -1, -1)
    offsets = places[:, None, :, :] - places[:, :, None, :]
    bias = self.posmlp(rearrange(offsets.sign() * offsets.abs().log1p(), "w i j two -> w two i j"))
    return self.proj(attend_in_windows(self.qkv(tokens), self.heads, bias, mask))


def test_attention_with_a_learned_bias_has_one_value_in_all_its_forms() -> None:
    query, key, value = (normal(2, 3, 5, 8, seed=seed) for seed in range(3))
    bias = normal(1, 3, 5, 5, seed=3).requires_grad_()
    learned = attend(query, key, value, bias)
    torch.testing.assert_close(learned, attend(query, key, value, bias.detach()), rtol=0, atol=3e-6)
    expected = torch.autograd.grad(learned.square().sum(), bias)[0]
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(torch.autograd.grad(fused.square().sum(), bias)[0], expected, rtol=1e-4, atol=1e-5)


def test_tables_are_built_once_bounded_and_never_kept_while_tensors_are_fake() -> None:
    built = []

    def build(side: int, device: torch.device) -> Tensor:
        built.append(side)
        return torch.arange(side, device=device)

    table = built_once(build, most=2)
    with FakeTensorMode():
        assert table(3, CPU).fake_mode is not None
    with torch.inference_mode():
        table(3, CPU)
    assert torch.equal(table(3, CPU), torch.arange(3))
    assert not table(3, CPU).is_inference()
    assert built == [3, 3]
    table(4, CPU), table(5, CPU), table(3, CPU)
    assert built == [3, 3, 4, 5, 3]
    with FakeTensorMode():
        assert table(3, CPU).fake_mode is not None  # the kept one is real and may not meet fake ones


def test_beits_index_is_timms_and_is_built_once_for_a_grid() -> None:
    index = relative_index((3, 5), CPU)
    assert torch.equal(index, gen_relative_position_index((3, 5), class_token=True))
    assert relative_index((3, 5), CPU) is index


@pytest.mark.parametrize(
    "config",
    [
        SwinConfig(dim=8, depths=(2,), heads=(1,), patch=4, window=4, version=2),
        BeitConfig(dim=16, depth=2, heads=2, patch=8),
    ],
)
def test_tables_are_in_no_state_and_survive_copies_and_compilation(config: SwinConfig | BeitConfig) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(config, (32, 32)).eval()
    before, images = encoder.state_dict(), normal(2, 3, 32, 32)
    with torch.no_grad():
        expected = encoder(images).tokens
        assert encoder.state_dict().keys() == before.keys()
        torch.testing.assert_close(copy.deepcopy(encoder)(images).tokens, expected)
        torch.testing.assert_close(encoder.double()(images.double()).tokens.float(), expected)
    encoder.float()
    for block in encoder.blocks():
        block.compile(backend="eager")
    compiled = encoder(images).tokens  # with gradients: tables as constants of the graph
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled.detach(), expected)
