"""NaViT against its own formula, written plainly for one image at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.drop_path import drawn
from pretrain.encoders.native import PackedImages, PackedMask, sequences
from pretrain.encoders.navit.config import NavitConfig
from pretrain.encoders.navit.encoder import NavitEncoder, coordinates
from pretrain.encoders.patches import patchify
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
from pretrain.encoders.transfer import fit
from pretrain.interop.official import import_checkpoint

SIZES = ((16, 32), (32, 32), (24, 8), (8, 8), (48, 24))  # of these the last is beyond the table of 4 rows and columns
GRIDS = tuple((height // 8, width // 8) for height, width in SIZES)


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> NavitEncoder:
    torch.manual_seed(0)
    config = NavitConfig(dim=32, depth=2, heads=2, patch=8, **{"pool": "attention", **settings})
    encoder = build_encoder(config, size, mask_token=True).eval()
    assert isinstance(encoder, NavitEncoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return encoder


def images(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator) for size in SIZES]


def packed(several: list[Tensor]) -> PackedImages:
    patches = torch.cat([patchify(image[None], 8)[0] for image in several])
    return PackedImages(patches, tuple((image.shape[1] // 8, image.shape[2] // 8) for image in several))


def slow_position(table: Tensor, number: int, count: int, stretched: bool) -> Tensor:
    """The position of row `number` of `count`: by number, or where its middle lies in the table."""
    if not stretched and count <= len(table):
        return table[number]
    place = min(max((number + 0.5) / count * len(table) - 0.5, 0.0), len(table) - 1.0)
    low = int(place)
    return table[low] * (1 - (place - low)) + table[min(low + 1, len(table) - 1)] * (place - low)


def slow_attention(query: Tensor, key: Tensor, value: Tensor, gains: tuple[Tensor, Tensor]) -> Tensor:
    """Of one image (n, d) -> (m, d), head by head, token by token."""
    found, heads = [], len(gains[0])
    for head, parts in enumerate(zip(*(part.chunk(heads, dim=1) for part in (query, key, value)), strict=True)):
        q, k = (
            part / (part.square().mean(dim=1, keepdim=True)).sqrt() * gain[head]
            for part, gain in zip(parts[:2], gains, strict=True)
        )
        found.append(torch.stack([(k @ one).softmax(dim=0) @ parts[2] for one in q]))
    return torch.cat(found, dim=1)


def slow(encoder: NavitEncoder, image: Tensor, stretched: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens (n, d) and the pooled feature (d,) of one image (c, h, w)."""
    model, tokens = encoder.navit, []

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    rows, columns = image.shape[1] // 8, image.shape[2] // 8
    for row in range(rows):
        for column in range(columns):
            pixels = rearrange(image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8], "c p q -> (p q c)")
            embed = model.patch_embed
            weight = rearrange(embed.proj.weight, "d c p q -> d (p q c)")
            token = norm(weight @ norm(pixels, embed.norm1.weight) + embed.proj.bias, embed.norm2.weight)
            token = token + slow_position(model.pos_embed_rows, row, rows, stretched)
            tokens.append(token + slow_position(model.pos_embed_columns, column, columns, stretched))
    x = torch.stack(tokens)
    for block in model.blocks:
        qkv = norm(x, block.norm1.weight) @ block.attn.qkv.weight.T
        found = slow_attention(*qkv.chunk(3, dim=1), (block.attn.q_norm.gain, block.attn.k_norm.gain))
        x = x + found @ block.attn.proj.weight.T
        hidden = F.gelu(block.mlp.fc1(norm(x, block.norm2.weight)))
        x = x + block.mlp.fc2(hidden)
    x, pool = norm(x, model.norm.weight), model.pool
    query = (norm(pool.query, pool.norm.weight) @ pool.q.weight.T)[None]
    key, value = (x @ pool.kv.weight.T).chunk(2, dim=1)
    found = slow_attention(query, key, value, (pool.q_norm.gain, pool.k_norm.gain))
    return x, pool.query + (found @ pool.proj.weight.T)[0]


def learned(encoder: NavitEncoder, parts: list[Tensor], pooled: Tensor) -> list[Tensor]:
    encoder.zero_grad()
    loss = sum(part.square().sum() for part in parts) + pooled.square().sum()
    loss.backward()
    return [parameter.grad.clone() for name, parameter in encoder.named_parameters() if name != "mask_token"]


@pytest.mark.parametrize("positions", ["absolute", "fractional"])
def test_packed_images_are_each_by_itself(positions: str) -> None:
    encoder = make(positions=positions)
    features = encoder(packed(images()))
    expected = [slow(encoder, image, positions == "fractional") for image in images()]
    for tokens, (wanted, _) in zip(features.of_images(), expected, strict=True):
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=2e-5)
    pooled = torch.stack([pooled for _, pooled in expected])
    torch.testing.assert_close(features.pooled, pooled, rtol=0, atol=2e-5)
    ours = learned(encoder, features.of_images(), features.pooled)
    for own, other in zip(ours, learned(encoder, [tokens for tokens, _ in expected], pooled), strict=True):
        assert float((own - other).norm()) <= 1e-4 * float(other.norm())


def test_a_batch_is_the_same_images_packed() -> None:
    encoder, image = make(), torch.randn(3, 3, 16, 24)
    batch = encoder(image, layers=(0, -1))
    features = encoder(packed(list(image)), layers=(0, -1))
    assert batch.grid == (2, 3)
    torch.testing.assert_close(rearrange(batch.tokens, "b n d -> (b n) d"), features.tokens)
    torch.testing.assert_close(batch.pooled, features.pooled)
    for own, other in zip(batch.layers, features.layers, strict=True):
        torch.testing.assert_close(rearrange(own.tokens, "b n d -> (b n) d"), other.tokens)
    torch.testing.assert_close(batch.layers[1].tokens, batch.tokens)


def test_hidden_patches_change_nothing_and_positions_stay() -> None:
    encoder, first = make(), packed(images())
    kept = torch.tensor([0, 5, 7, 9, 11, 20, 24, 27, 28, 30, 40, 41])  # patches of all five images
    lengths = tuple(int(((kept >= begin) & (kept < begin + count)).sum()) for begin, count in _spans())
    assert all(lengths)
    shown = torch.zeros(len(first.patches), dtype=torch.bool)
    shown[kept] = True
    other = first._replace(patches=torch.where(shown[:, None], first.patches, packed(images(2)).patches))
    for mask in (PackedMask(kept, lengths), PackedMask(token=~shown)):
        one, two = encoder(first, mask), encoder(other, mask)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.pooled, two.pooled)
    for block in encoder.navit.blocks:  # without attention a kept token is what it is among all others
        block.attn.proj.weight.data.zero_()
    torch.testing.assert_close(encoder(first, PackedMask(kept, lengths)).tokens, encoder(first).tokens[kept])
    dropped = torch.zeros(2, 4, 4, dtype=torch.bool)
    dropped[:, 1] = True
    square = torch.randn(2, 3, 32, 32)
    few, whole = encoder(square, Mask(drop=dropped)), encoder(square)
    torch.testing.assert_close(few.tokens, whole.tokens.gather(1, few.ids_keep.expand(-1, -1, 32)))


def _spans() -> list[tuple[int, int]]:
    counts = [rows * columns for rows, columns in GRIDS]
    return [(sum(counts[:number]), count) for number, count in enumerate(counts)]


@pytest.mark.parametrize("settings", [{"token_drop": 0.5}, {"token_drop_sizes": ((2, 0.0), (18, 0.8))}])
def test_tokens_are_dropped_in_training_alone(settings: dict[str, Any]) -> None:
    encoder, shown = make(**settings), packed(images())
    assert encoder(shown).kept is None
    encoder.train()
    with drawn(0, 3, torch.arange(5)):
        features = encoder(shown)
    with drawn(0, 3, torch.arange(2, 5)):
        part = encoder(packed(images()[2:]))
    counts = [rows * columns for rows, columns in GRIDS]
    rates = [encoder.config.drop_rate(count) for count in counts]
    assert features.lengths == tuple(max(1, int(n * (1 - rate))) for n, rate in zip(counts, rates, strict=True))
    assert features.kept.tolist() == sorted(set(features.kept.tolist()))
    torch.testing.assert_close(part.tokens, features.tokens[-len(part.tokens) :])  # rows draw, not micro-batches
    torch.testing.assert_close(part.pooled, features.pooled[2:])
    with drawn(0, 3, torch.arange(3)):
        batch = encoder(torch.randn(3, 3, 32, 32))
    assert batch.grid is None
    assert batch.tokens.shape[1] == batch.ids_keep.shape[1] == max(1, int(16 * (1 - encoder.config.drop_rate(16))))


def test_the_share_that_is_dropped_is_linear_between_sizes() -> None:
    config = NavitConfig(dim=32, heads=2, token_drop_sizes=((64, 0.0), (256, 0.5)))
    assert [config.drop_rate(tokens) for tokens in (10, 64, 160, 256, 400)] == [0, 0, 0.25, 0.5, 0.5]
    for wrong in ({"token_drop_sizes": ((64, 0.1), (32, 0.2))}, {"token_drop": 0.1, "token_drop_sizes": ((64, 0.0),)}):
        with pytest.raises(ValueError, match="token_drop"):
            NavitConfig(**wrong)


def test_paths_are_dropped_by_row() -> None:
    encoder = make(drop_path=0.6).train()
    with drawn(0, 1, torch.arange(5)):
        whole = encoder(packed(images()))
    parts = []
    for rows in (range(0, 2), range(2, 5)):
        with drawn(0, 1, torch.tensor(rows)):
            parts.append(encoder(packed([images()[row] for row in rows])))
    torch.testing.assert_close(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert not torch.allclose(whole.tokens, encoder.eval()(packed(images())).tokens)


def test_images_are_grouped_in_order() -> None:
    assert sequences([5, 4, 3, 9, 1, 1], most=9) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert sequences([20], most=9) == [range(0, 1)]


def test_coordinates_reach_from_the_first_to_the_last_row() -> None:
    places = coordinates(((8, 1),), (4, 4), "absolute")[:, 0]
    assert places.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert coordinates(((2, 3),), (4, 4), "absolute").tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_it_is_saved_loaded_and_brought_to_another_size(tmp_path: Path) -> None:
    encoder = make()
    card = EncoderCard(encoder.config, (32, 32), 3, (0.5,) * 3, (0.2,) * 3, "dino", None, step=1, epoch=1.0, run="a")
    save_encoder(tmp_path / "encoder", encoder.state_dict(), card)
    again, _ = load_encoder(tmp_path / "encoder")
    assert torch.equal(again(packed(images())).pooled, encoder(packed(images())).pooled)
    wide = build_encoder(encoder.config, (32, 64))
    fitted = fit(dict(encoder.inner().state_dict()), wide)
    assert set(fitted.resized) == {"pos_embed_columns"}
    assert not fitted.left
    wide.inner().load_state_dict(fitted.weights)
    image = torch.randn(1, 3, 32, 64)  # beyond the smaller table, which its forward pass stretches in the same way
    torch.testing.assert_close(wide.eval()(image).tokens, encoder(image).tokens, rtol=1e-4, atol=1e-5)


def test_names_of_vit_pytorch_are_read(tmp_path: Path) -> None:
    encoder, beta = make(), {}
    state: dict[str, Tensor] = {}
    own = encoder.inner().state_dict()
    taken = lambda key: own.pop(key)  # noqa: E731
    state["to_patch_embedding.1.weight"] = rearrange(taken("patch_embed.proj.weight"), "d c p q -> d (c p q)")
    state["to_patch_embedding.1.bias"] = taken("patch_embed.proj.bias")
    gamma = taken("patch_embed.norm1.weight")
    state["to_patch_embedding.0.gamma"] = rearrange(gamma, "(p q c) -> (c p q)", p=8, q=8)
    state["to_patch_embedding.2.gamma"] = taken("patch_embed.norm2.weight")
    state["pos_embed_height"], state["pos_embed_width"] = taken("pos_embed_rows"), taken("pos_embed_columns")
    state["attn_pool_queries"] = taken("pool.query")
    for theirs, ours in [
        ("attn_pool.", "pool."),
        *((f"transformer.layers.{n}.0.", f"blocks.{n}.attn.") for n in (0, 1)),
    ]:
        for side in "qk":
            state[f"{theirs}{side}_norm.gamma"] = rearrange(taken(f"{ours}{side}_norm.gain"), "h d -> h 1 d")
        state[f"{theirs}to_out.0.weight"] = taken(f"{ours}proj.weight")
    state["attn_pool.to_q.weight"], state["attn_pool.to_kv.weight"] = taken("pool.q.weight"), taken("pool.kv.weight")
    state["attn_pool.norm.gamma"] = taken("pool.norm.weight")
    for number in (0, 1):
        block, theirs = f"blocks.{number}.", f"transformer.layers.{number}."
        query, *rest = taken(f"{block}attn.qkv.weight").chunk(3)
        state[f"{theirs}0.to_q.weight"], state[f"{theirs}0.to_kv.weight"] = query, torch.cat(rest)
        state[f"{theirs}0.norm.gamma"], state[f"{theirs}1.0.gamma"] = (taken(f"{block}norm{n}.weight") for n in (1, 2))
        for place, layer in (("1", "fc1"), ("4", "fc2")):
            for part in ("weight", "bias"):
                state[f"{theirs}1.{place}.{part}"] = taken(f"{block}mlp.{layer}.{part}")
    state["transformer.norm.gamma"] = taken("norm.weight")
    assert not own
    beta = {key.replace("gamma", "beta"): torch.zeros(8) for key in state if "q_norm" not in key and "gamma" in key}
    torch.save(state | beta | {"mlp_head.1.weight": torch.zeros(10, 32)}, tmp_path / "checkpoint.pth")
    imported = import_checkpoint(tmp_path / "checkpoint.pth", "navit", tmp_path / "imported")
    assert set(imported.left) == set(beta) | {"mlp_head.1.weight"}
    read, card = load_encoder(tmp_path / "imported")
    assert card.encoder == encoder.config
    torch.testing.assert_close(read(packed(images())).pooled, encoder(packed(images())).pooled)
