"""BEiT's ViT: timm's own numbers, other grids, and visible tokens alone."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit
from torch import Tensor, nn

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.beit.encoder import BeitEncoder, relative_bias
from pretrain.encoders.positions import resize_relative_table
from pretrain.encoders.transfer import fit
from pretrain.encoders.vit.config import VitConfig


def make(relative_positions: str = "shared", size: tuple[int, int] = (32, 32), **settings: object) -> BeitEncoder:
    torch.manual_seed(0)
    config = BeitConfig(dim=32, depth=2, heads=2, patch=8, relative_positions=relative_positions, **settings)  # type: ignore[arg-type]
    encoder = build_encoder(config, size, mask_token=True).eval()
    assert isinstance(encoder, BeitEncoder)
    for name, parameter in encoder.named_parameters():
        if "relative_position_bias_table" in name or name.endswith(("q_bias", "v_bias")):
            nn.init.normal_(parameter, std=0.5)  # zero at the start, which would prove nothing
    return encoder


def images(size: tuple[int, int] = (32, 32), count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("relative_positions", ["shared", "per_block"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_whole_images_are_timms(relative_positions: str, size: tuple[int, int]) -> None:
    encoder = make(relative_positions, size)
    expected = Beit.forward_features(_as_timm(encoder, relative_positions, size), images(size))
    features = encoder(images(size))
    torch.testing.assert_close(torch.cat([features.prefix_tokens, features.tokens], dim=1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.pooled, features.tokens.mean(dim=1))


def _as_timm(encoder: BeitEncoder, relative_positions: str, size: tuple[int, int]) -> Beit:
    model = Beit(
        img_size=size, patch_size=8, num_classes=0, embed_dim=32, depth=2, num_heads=2, init_values=0.1,
        use_abs_pos_emb=False, use_rel_pos_bias=relative_positions == "per_block", use_fc_norm=False,
        use_shared_rel_pos_bias=relative_positions == "shared",
    )  # fmt: skip
    model.load_state_dict(encoder.inner().state_dict())
    return model.eval()


def test_dropped_units_leave_the_others_their_own_offsets() -> None:
    """With zero attention to the dropped tokens, the visible ones see the same whether those are there or not."""
    encoder = make()
    grid, units = (4, 4), torch.tensor([[0, 3, 5, 10], [1, 2, 12, 15]])
    table = encoder.beit.rel_pos_bias.relative_position_bias_table
    whole = relative_bias(table, (4, 4), grid, None)
    chosen = relative_bias(table, (4, 4), grid, units)
    assert chosen.shape == (2, 2, 5, 5)
    for image in range(2):
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), units[image] + 1])
        torch.testing.assert_close(chosen[image], whole[0][:, kept][:, :, kept])


@pytest.mark.parametrize("relative_positions", ["shared", "per_block"])
def test_hidden_pixels_change_nothing(relative_positions: str) -> None:
    encoder = make(relative_positions)
    hidden = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)).argsort(dim=-1) < 2
    pixels = hidden.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    other = torch.where(pixels, torch.randn_like(images()), images())
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        assert torch.equal(encoder(images(), mask).tokens, encoder(other, mask).tokens)


def test_a_table_brought_to_a_window_and_back_keeps_what_is_smooth() -> None:
    rows = torch.linspace(-1, 1, 13)
    smooth = rearrange(rows[:, None] * 0.3 + rows[None, :] ** 2, "h w -> (h w) 1")
    table = torch.cat([smooth, torch.tensor([[7.0], [8.0], [9.0]])])
    there = resize_relative_table(table, (7, 7), (14, 14), num_extra=3)
    assert there.shape == (27 * 27 + 3, 1)
    assert there[-3:].flatten().tolist() == [7.0, 8.0, 9.0]
    back = resize_relative_table(there, (14, 14), (7, 7), num_extra=3)
    assert (back - table).abs().max() < 0.06


def test_other_image_sizes_run_and_gradients_reach_the_table() -> None:
    for relative_positions in ("shared", "per_block"):
        encoder = make(relative_positions).train()
        encoder(images((16, 40))).tokens.square().sum().backward()
        reached = {name: parameter.grad for name, parameter in encoder.named_parameters() if name != "mask_token"}
        assert all(gradient is not None for gradient in reached.values())


def test_further_blocks_go_on_with_the_shared_positions() -> None:
    encoder = make()
    further = encoder.further_blocks(2, after=1)
    assert not any("rel_pos_bias" in name for name, _ in further.named_parameters())  # the encoder's own
    features = encoder(images())
    assert features.states is not None
    states = further(features.states, (4, 4))
    assert states.shape == features.states.shape
    expected = features.states
    bias = encoder.beit.rel_pos_bias((4, 4), None)
    for block in further.blocks:
        expected = block(expected, (4, 4), None, bias)
    torch.testing.assert_close(states, expected)


STD = 0.02 * 0.5396  # of a normal of deviation .02 that is cut at one deviation


@pytest.mark.parametrize("family", ["beit", "vit"])
def test_further_blocks_are_like_those_at_their_depth(family: str) -> None:
    """BEiT v2's head after layer 9 of 12 drops paths as layers 10 and 11 do; PyTorch's weights, divided alike."""
    config = (BeitConfig if family == "beit" else VitConfig)(dim=64, depth=12, heads=4, patch=8, drop_path=0.11)
    further = build_encoder(config, (32, 32)).further_blocks(2, after=9)
    for number, block in zip((9, 10), further.blocks, strict=True):
        assert block.drop_path1.drop_prob == pytest.approx(0.11 * number / 11)
        assert block.drop_path2.drop_prob == pytest.approx(0.11 * number / 11)
        if family == "beit":
            shrink = (2.0 * (number + 1)) ** 0.5
            for layer in (block.attn.proj, block.mlp.fc2):
                std = (3 * layer.in_features) ** -0.5  # uniform within 1 / sqrt(inputs)
                assert float(layer.weight.detach().std()) == pytest.approx(std / shrink, rel=0.05)
            assert float(block.mlp.fc1.weight.detach().std()) == pytest.approx((3 * 64) ** -0.5, rel=0.05)


@pytest.mark.parametrize("absolute", [False, True])
def test_the_start_is_cut_at_one_deviation(absolute: bool) -> None:
    """Every weight, token and position that BEiT's (and SimMIM's ViT's) code draws, and none that it leaves at 0."""
    config = BeitConfig(dim=128, depth=2, heads=4, patch=8, absolute_positions=absolute)
    encoder = build_encoder(config, (32, 32), mask_token=True)
    drawn = 0
    for name, parameter in encoder.named_parameters():
        values = parameter.detach()
        if name.endswith(("attn.proj.weight", "fc2.weight")):
            values = values * (2.0 * (int(name.split(".")[2]) + 1)) ** 0.5
        if name.endswith(("token", "pos_embed", "proj.weight", "qkv.weight", "fc1.weight", "fc2.weight")):
            drawn += 1
            assert float(values.abs().max()) <= 0.02 * (1 + 1e-6), name
            assert float(values.std()) == pytest.approx(STD, rel=0.2 if values.numel() < 1000 else 0.03), name
        elif name.endswith(("bias", "table")):
            assert not values.any(), name
        else:
            assert values.unique().numel() == 1, name  # norms and layer scales
    assert drawn == 2 + absolute + 1 + 2 * 4


def test_a_table_for_each_block_starts_at_zero_and_weights_at_one_deviation() -> None:
    encoder = build_encoder(BeitConfig(dim=128, depth=1, heads=4, patch=8, relative_positions="per_block"), (32, 32))
    assert encoder.mask_token is None
    assert float(encoder.beit.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(STD, rel=0.03)
    assert not encoder.beit.blocks[0].attn.relative_position_bias_table.any()


@pytest.mark.parametrize("shared", [True, False])
def test_a_table_of_all_blocks_is_of_the_top_layer(shared: bool) -> None:
    """With layer decay: in the authors' code the shared table has the head's rate, a block's own its block's."""
    encoder = make("shared" if shared else "per_block")
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters() if name.endswith("table")}
    assert sorted(layers.values()) == ([encoder.depth + 1] if shared else [1, 2])
    assert encoder.layer_of("mask_token") == encoder.layer_of("beit.cls_token") == 0
    assert encoder.layer_of("beit.patch_embed.proj.weight") == 0
    assert encoder.layer_of("encoder.beit.rel_pos_bias.relative_position_bias_table") == encoder.depth + 1


def test_the_start_is_beits() -> None:
    encoder = build_encoder(BeitConfig(dim=64, depth=4, heads=4, patch=8), (32, 32))
    for number, block in enumerate(encoder.blocks()):
        shrink = (2.0 * (number + 1)) ** 0.5
        assert float(block.attn.proj.weight.detach().std()) == pytest.approx(STD / shrink, rel=0.1)
        assert float(block.mlp.fc2.weight.detach().std()) == pytest.approx(STD / shrink, rel=0.1)
        assert block.gamma_1.unique().tolist() == pytest.approx([0.1])
        assert not block.attn.qkv.bias
        assert {"q_bias", "v_bias"} <= {name for name, _ in block.attn.named_parameters()}


def test_a_start_from_another_size_resizes_the_table_as_beits_code_does() -> None:
    source, target = make(), build_encoder(BeitConfig(dim=32, depth=2, heads=2, patch=8), (64, 64))
    key = "rel_pos_bias.relative_position_bias_table"
    table = source.inner().state_dict()[key]
    fitted = fit(dict(source.inner().state_dict()), target)
    expected = resize_rel_pos_bias_table(table, (8, 8), tuple(target.inner().state_dict()[key].shape))
    torch.testing.assert_close(fitted.weights[key], expected)
    near = rearrange(fitted.weights[key][:-3], "(h w) heads -> h w heads", h=15)[7, 7:9]
    before = rearrange(table[:-3], "(h w) heads -> h w heads", h=7)[3, 3:5]
    torch.testing.assert_close(near, before, atol=0.15, rtol=0)  # a neighbour's offset means what it meant
