"""The Shunted Transformer: its attention and feed-forward layer in loops, its masks, its authors' checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_import import imported
from torch import Tensor, nn

from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import Mask
from pretrain.encoders.saved import load_encoder
from pretrain.encoders.shunted.blocks import DetailMlp, ShuntedAttention
from pretrain.encoders.shunted.config import ShuntedConfig

CONFIG = ShuntedConfig(
    dims=(8, 16, 16), depths=(1, 2, 1), heads=(2, 2, 4), mlp_ratios=(2, 2, 2), sr=(4, 2, 1), stem_convolutions=1
)


def make(config: ShuntedConfig = CONFIG, size: tuple[int, int] = (64, 64)) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(config, size, mask_token=True).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    for name, statistic in encoder.named_buffers():
        if "running" in name:
            statistic += torch.rand(statistic.shape)
    return encoder


def images(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def with_neighbours(convolution: nn.Conv2d, cells: Tensor) -> Tensor:
    """A 3x3 depth-wise convolution of a map (h, w, d), place by place."""
    height, width, _ = cells.shape
    out = []
    for row in range(height):
        for column in range(width):
            value = convolution.bias
            for y in (-1, 0, 1):
                for x in (-1, 0, 1):
                    if 0 <= row + y < height and 0 <= column + x < width:
                        value = value + convolution.weight[:, 0, y + 1, x + 1] * cells[row + y, column + x]
            out.append(value)
    return torch.stack(out).view(cells.shape)


def same_gradients(fast: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(fast, slow)
    weights = torch.randn_like(slow)
    for own, other in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize(("sr", "size"), [(4, (4, 8)), (2, (4, 6)), (2, (3, 4)), (1, (3, 4))])
def test_attention_is_the_papers(sr: int, size: tuple[int, int]) -> None:
    """Equations 1 to 3, head by head: half of the heads see cells of sr x sr tokens, half of sr / 2; 3 rows of tokens
    are filled up to whole cells with zeros."""
    torch.manual_seed(0)
    attention = ShuntedAttention(8, 4, sr).double()
    tokens = torch.randn(1, *size, 8, dtype=torch.float64, requires_grad=True)
    query = attention.q(tokens[0]).flatten(0, 1)
    out, after = [], torch.zeros(*size, 8, dtype=torch.float64)
    for head in range(4):
        half = 1 if head < 2 else 2
        if sr == 1:
            key, value = attention.kv(tokens[0]).split(8, dim=-1)
            after, first = with_neighbours(attention.local_conv, value), 0
        else:
            side = sr // half
            rows, columns = (math.ceil(length / side) for length in size)
            filled = F.pad(tokens[0], (0, 0, 0, columns * side - size[1], 0, rows * side - size[0]))
            reduce, norm = getattr(attention, f"sr{half}"), getattr(attention, f"norm{half}")
            cells = []
            for row in range(rows):
                for column in range(columns):
                    places = [(y, x) for y in range(side) for x in range(side)]
                    cell = sum(reduce.weight[:, :, y, x] @ filled[row * side + y, column * side + x] for y, x in places)
                    cells.append(F.gelu(norm(cell + reduce.bias)))
            key, value = getattr(attention, f"kv{half}")(torch.stack(cells).view(rows, columns, 8)).split(4, dim=-1)
            value, first = value + with_neighbours(getattr(attention, f"local_conv{half}"), value), 2 * (half - 1)
        part = slice(2 * (head - first), 2 * (head - first) + 2)
        scores = query[:, 2 * head : 2 * head + 2] @ key[..., part].flatten(0, 1).T / math.sqrt(2)
        out.append(scores.softmax(dim=-1) @ value[..., part].flatten(0, 1))
    slow = attention.proj(torch.cat(out, dim=-1).view(*size, 8) + after)
    same_gradients(attention(tokens)[0], slow, [tokens, *attention.parameters()])


def test_feed_forward_layer_is_the_papers() -> None:
    """Equation 5: what a token's neighbours add comes before the activation."""
    torch.manual_seed(0)
    mlp = DetailMlp(4, 8).double()
    tokens = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    hidden = mlp.fc1(tokens[0])
    slow = mlp.fc2(F.gelu(hidden + with_neighbours(mlp.dwconv["dwconv"], hidden)))
    same_gradients(mlp(tokens)[0], slow, [tokens, *mlp.parameters()])


def test_published_sizes() -> None:
    published = {"tiny": 11.5, "small": 22.4, "base": 39.6}  # M parameters (table 1), head included
    for size, millions in published.items():
        with torch.device("meta"):
            encoder = build_encoder(ShuntedConfig(size=size), (224, 224))  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in encoder.parameters()) + 512 * 1000 + 1000
        assert count / 1e6 == pytest.approx(millions, abs=0.1), size


def test_each_token_names_its_units() -> None:
    """With all cut that mixes tokens, what moves a token are the pixels of its own units."""
    encoder = make()
    for block in encoder.blocks():
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d) and part.groups == 1 and part.kernel_size[0] in (3, 7):
            middle = part.kernel_size[0] // 2
            kept = part.weight.data[:, :, middle, middle].clone()
            nn.init.zeros_(part.weight)
            part.weight.data[:, :, middle, middle] = kept
    hidden = torch.ones(2, 4, 4, dtype=torch.bool)
    hidden[:, 1::2, ::2] = False
    features = encoder(images(), Mask(drop=hidden))
    assert features.ids_keep is not None
    assert not hidden[0].flatten()[features.ids_keep[0].flatten()].any()
    for token, (unit,) in enumerate(features.ids_keep[0].tolist()):
        top, left = (16 * side for side in divmod(unit, 4))
        changed = images()
        changed[0, :, top : top + 16, left : left + 16] += torch.randn(3, 16, 16)
        moved = (encoder(changed, Mask(drop=hidden)).tokens[0] - features.tokens[0]).abs().sum(dim=-1)
        assert moved[token] > 0
        assert moved.sum() == moved[token]


def test_replaced_units_beside_seen_ones_change_nothing() -> None:
    """The stem's kernel of 7 px reads across the borders of units, and reads zeros there."""
    encoder = make()
    replaced = torch.zeros(2, 8, 8, dtype=torch.bool)
    replaced[0, 2:5, 3] = replaced[1, 7] = True
    pixels = replaced.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(pixels, images(seed=9), images())
    first, second = (encoder(seen, Mask(token=replaced)).tokens for seen in (images(), other))
    assert torch.equal(first, second)
    assert not torch.allclose(encoder(images()).tokens, encoder(other).tokens)


def test_local_crops_and_earlier_layers() -> None:
    encoder = make()
    for size in ((64, 64), (32, 48), (16, 16)):  # 16 px: a map of one cell, of one token
        features = encoder(images(size), layers=(-1, 0))
        assert features.grid == (size[0] // 16, size[1] // 16)
        torch.testing.assert_close(features.layers[0].tokens, features.tokens)
        assert features.layers[1].tokens.shape == (2, 16 * len(features.tokens[0]), 8)


def test_layers_rise_from_the_embedding_to_the_norm() -> None:
    encoder = make()
    layers = {name: encoder.layer_of(f"encoder.{name}") for name, _ in encoder.named_parameters()}
    assert (min(layers.values()), max(layers.values())) == (0, encoder.depth + 1)
    found = [layers[name] for name in ("mask_token", "shunted.patch_embed2.proj.weight", "shunted.norm2.bias")]
    assert found == [0, 2, 3]
    for number, block in enumerate(encoder.blocks()):
        inside = {id(parameter) for parameter in block.parameters()}
        assert {layers[name] for name, p in encoder.named_parameters() if id(p) in inside} == {number + 1}


def test_official_checkpoints_are_imported(tmp_path: Path) -> None:
    config = ShuntedConfig(
        dims=(32, 64, 128), depths=(1, 1, 1), heads=(2, 2, 4), mlp_ratios=(2, 1, 1), sr=(4, 2, 1), stem_convolutions=2
    )
    encoder = make(config)
    head = {"head.weight": torch.randn(3, 128), "head.bias": torch.randn(3)}
    found = imported({"model": dict(encoder.inner().state_dict()) | head}, "shunted", tmp_path, image_size=64)
    assert found.left == dict.fromkeys(head, "a classifier's")
    names = ("dims", "depths", "heads", "mlp_ratios", "sr", "stem_convolutions")
    assert [getattr(found.encoder, name) for name in names] == [getattr(config, name) for name in names]
    assert "heads=[2,2,4] is guessed" in " ".join(found.notes)
    loaded, card = load_encoder(tmp_path / "out")
    assert card.headline == "mean"
    torch.testing.assert_close(loaded(images()).pooled, encoder(images()).pooled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": (1, 4, 8, 16)}, "stage 0 has sr 8 and 1 heads; half of the heads take half of the sr"),
        ({"sr": (8, 3, 2, 1)}, "stage 1 has sr 3 and 4 heads"),
        ({"depths": (1, 1)}, "differ in length"),
        ({"heads": (2, 4, 6, 16)}, "stage 2 is 256 wide, which does not divide into 6 heads"),
    ],
)
def test_shapes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShuntedConfig(**settings)
