"""TimeSformer against a slow form written from the paper's formulas, and what stacks promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pretrain.encoders import build_encoder, drop_path
from pretrain.encoders.base import Mask
from pretrain.encoders.layouts import CheckpointState
from pretrain.encoders.read_layout import read_layout
from pretrain.encoders.timesformer.config import TimesformerConfig
from pretrain.encoders.timesformer.encoder import TimesformerEncoder
from pretrain.encoders.transfer import fit
from pretrain.interop.official import import_checkpoint

KINDS = ("divided", "joint", "space_only")
FRAMES, CHANNELS = 3, 2


def make(
    kind: str, size: tuple[int, int] = (32, 48), channels: int = CHANNELS, **settings: object
) -> TimesformerEncoder:
    torch.manual_seed(0)
    shape = {"dim": 16, "depth": 2, "heads": 2, "patch": 16, "frames": FRAMES, "mlp_ratio": 2}
    config = TimesformerConfig(attention=kind, **{**shape, **settings})  # type: ignore[arg-type]
    encoder = build_encoder(config, size, channels, mask_token=True).eval()
    assert isinstance(encoder, TimesformerEncoder)
    with torch.no_grad():
        for parameter in encoder.parameters():  # away from zeros, which would prove nothing
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def stacks(size: tuple[int, int] = (32, 48), frames: int = FRAMES, count: int = 2, channels: int = CHANNELS) -> Tensor:
    return torch.randn(count, frames * channels, *size, generator=torch.Generator().manual_seed(1))


def slow(encoder: TimesformerEncoder, images: Tensor, tubes: list[int]) -> tuple[Tensor, Tensor]:
    """Class token (b, d) and tokens (b, tubes, d) of the stacks' `tubes`, one token and one block at a time."""
    weights, heads = dict(encoder.net.named_parameters()), encoder.config.shape[2]
    patch, kind = encoder.patch, encoder.kind
    frames = images.shape[1] // encoder.channels
    columns = images.shape[3] // patch

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        deviation = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / deviation * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(name: str, x: Tensor) -> Tensor:
        query, key, value = linear(f"{name}.qkv", x).chunk(3, dim=-1)
        parts = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
            parts.append((q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
        return linear(f"{name}.proj", torch.cat(parts, dim=-1))

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.fc2", F.gelu(linear(f"{name}.fc1", x)))

    results = []
    for stack in images:
        prefix = (weights["cls_token"] + weights["pos_embed"][:, :1])[0, 0]
        tokens: dict[tuple[int, int], Tensor] = {}
        for place in tubes:
            row, column = divmod(place, columns)
            for frame in range(frames):
                planes = stack[frame * encoder.channels : (frame + 1) * encoder.channels]
                pixels = planes[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                token = weights["patch_embed.proj.weight"].flatten(1) @ pixels.flatten()
                token = token + weights["patch_embed.proj.bias"] + weights["pos_embed"][0, 1 + place]
                tokens[place, frame] = token + (0 if kind == "space_only" else weights["time_embed"][0, frame])
        classes = [prefix] * frames
        for number in range(encoder.depth):
            block = f"blocks.{number}"
            if kind == "divided":
                for place in tubes:
                    line = torch.stack([tokens[place, frame] for frame in range(frames)])
                    added = attention(f"{block}.temporal_attn", norm(f"{block}.temporal_norm1", line))
                    for frame, more in enumerate(linear(f"{block}.temporal_fc", added)):
                        tokens[place, frame] = tokens[place, frame] + more
            groups = [list(range(frames))] if kind == "joint" else [[frame] for frame in range(frames)]
            for_class = []
            for group in groups:
                names = [(place, frame) for place in tubes for frame in group]
                sequence = torch.stack([classes[group[0]], *(tokens[name] for name in names)])
                added = attention(f"{block}.attn", norm(f"{block}.norm1", sequence))
                for_class.append(added[0])
                for name, more in zip(names, added[1:], strict=True):
                    tokens[name] = tokens[name] + more
            if kind == "divided":
                for_class = [sum(for_class) / frames] * frames  # type: ignore[list-item]
            if kind == "joint":
                for_class = for_class * frames
            classes = [one + more for one, more in zip(classes, for_class, strict=True)]
            classes = [one + mlp(f"{block}.mlp", norm(f"{block}.norm2", one)) for one in classes]
            tokens = {name: one + mlp(f"{block}.mlp", norm(f"{block}.norm2", one)) for name, one in tokens.items()}
        if kind == "space_only":
            means = [torch.stack([tokens[place, frame] for frame in range(frames)]).mean(dim=0) for place in tubes]
            results.append(norm("norm", torch.stack([torch.stack(classes).mean(dim=0), *means])))
        else:
            means = [
                norm("norm", torch.stack([tokens[place, frame] for frame in range(frames)])).mean(dim=0)
                for place in tubes
            ]
            results.append(torch.stack([norm("norm", classes[0]), *means]))
    both = torch.stack(results)
    return both[:, 0], both[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_slow_form(kind: str) -> None:
    encoder, images = make(kind), stacks()
    features = encoder(images)
    prefix, tokens = slow(encoder, images, list(range(6)))
    torch.testing.assert_close(features.prefix_tokens[:, 0], prefix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.tokens, tokens, rtol=1e-5, atol=1e-5)
    assert features.grid == (2, 3)
    assert torch.equal(features.pooled, features.prefix_tokens[:, 0])
    names = [name for name, _ in encoder.net.named_parameters()]
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    own = torch.autograd.grad(
        (torch.cat([features.prefix_tokens, features.tokens], dim=1) * weight).sum(), list(encoder.net.parameters())
    )
    slowly = torch.autograd.grad(
        (torch.cat([prefix[:, None], tokens], dim=1) * weight).sum(), list(encoder.net.parameters())
    )
    for name, one, other in zip(names, own, slowly, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_tubes_are_as_if_they_were_never_there(kind: str) -> None:
    encoder, images = make(kind), stacks(count=1)
    drop = torch.tensor([[[True, False, False], [True, True, False]]])
    features = encoder(images, Mask(drop=drop))
    assert features.ids_keep is not None
    assert features.ids_keep[0, :, 0].tolist() == [1, 2, 5]
    prefix, tokens = slow(encoder, images, [1, 2, 5])
    torch.testing.assert_close(features.tokens, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.pooled, prefix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_is_hidden_in_every_frame(kind: str) -> None:
    encoder, images = make(kind), stacks()
    hidden = torch.tensor([[[True, False, True], [False, True, False]]]).expand(2, 2, 3)
    pixels = hidden.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)[:, None]
    other = torch.where(pixels, torch.full_like(images, 7.0), images)
    for mask in (Mask(drop=hidden), Mask(token=hidden)):
        assert torch.equal(encoder(images, mask).tokens, encoder(other, mask).tokens)


def test_a_fresh_divided_encoder_sees_each_frame_by_itself() -> None:
    torch.manual_seed(0)
    config = TimesformerConfig(dim=16, depth=2, heads=2, patch=16, frames=FRAMES)
    encoder = build_encoder(config, (32, 32), 3).eval()
    one = stacks((32, 32), 1, channels=3)
    torch.testing.assert_close(encoder(one.repeat(1, FRAMES, 1, 1)).pooled, encoder(one).pooled, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(encoder(stacks((32, 32), channels=3)).pooled.sum(), list(encoder.net.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("kind", ["divided", "joint"])
def test_the_order_of_frames_matters_and_other_numbers_take_the_nearest_times(kind: str) -> None:
    encoder, images = make(kind), stacks()
    turned = rearrange(rearrange(images, "b (t c) h w -> t b c h w", c=CHANNELS).flip(0), "t b c h w -> b (t c) h w")
    assert not torch.allclose(encoder(images).pooled, encoder(turned).pooled, atol=1e-4)
    twice = rearrange(images, "b (t c) h w -> b t 1 c h w", c=CHANNELS).repeat(1, 1, 2, 1, 1, 1)
    longer = make(kind, frames=2 * FRAMES)
    longer.net.load_state_dict(fit(encoder.net.state_dict(), longer).weights)
    assert torch.equal(longer.net.time_embed[0, ::2], encoder.net.time_embed[0])
    six = rearrange(twice, "b t r c h w -> b (t r c) h w")
    torch.testing.assert_close(longer(six).tokens, encoder(six).tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_other_sizes_take_the_nearest_positions(kind: str) -> None:
    encoder = make(kind, (32, 32))
    larger = make(kind, (64, 64))
    state = {**encoder.net.state_dict()}
    places = rearrange(state["pos_embed"][:, 1:], "1 (h w) d -> 1 h w d", h=2)
    places = places.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], rearrange(places, "1 h w d -> 1 (h w) d")], dim=1)
    larger.net.load_state_dict(state)
    images = stacks((64, 64))
    torch.testing.assert_close(encoder(images).tokens, larger(images).tokens)


def test_drop_path_drops_whole_stacks() -> None:
    encoder, images = make("divided", drop_path=0.6).train(), stacks(count=8)
    with drop_path.drawn(0, 0, torch.arange(8)):
        dropped = encoder(images).tokens
    alike = (dropped - encoder.eval()(images).tokens).abs().amax(dim=(1, 2)) < 1e-6
    with drop_path.drawn(0, 0, torch.arange(4, 8)):
        assert torch.allclose(encoder.train()(images[4:]).tokens, dropped[4:], atol=1e-6)
    assert not alike.all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_names_are_read(kind: str, tmp_path: Path) -> None:
    encoder = make(kind, (32, 32), channels=3)
    weights = {f"model.{key}": value for key, value in encoder.net.state_dict().items()}
    head = {"model.head.weight": torch.zeros(5, 16), "model.head.bias": torch.zeros(5)}
    torch.save({"model_state": weights | head, "epoch": 1}, tmp_path / "official.pth")
    told = ["heads=2", *(["frames=3"] if kind == "space_only" else [])]
    imported = import_checkpoint(tmp_path / "official.pth", "timesformer", tmp_path / "out", overrides=told)
    assert imported.encoder.attention == kind
    assert imported.encoder.frames == FRAMES
    assert set(imported.left) == {"[epoch]", "head.weight", "head.bias"}
    assert all(torch.equal(value, encoder.net.state_dict()[key]) for key, value in imported.weights.items())


def test_a_vit_becomes_a_timesformer() -> None:
    vit = make("space_only", (32, 32), channels=3)
    told = ["heads=2", "attention=divided", "frames=4"]
    imported = read_layout("timesformer", CheckpointState(vit.net.state_dict(), "teacher", told))
    grown = build_encoder(imported.encoder, imported.image_size, 3).eval()
    grown.net.load_state_dict(imported.weights)
    one = stacks((32, 32), 1, channels=3)
    torch.testing.assert_close(grown(one.repeat(1, 4, 1, 1)).pooled, vit(one).pooled, rtol=0, atol=1e-6)
    copied = grown.net.blocks[1].temporal_attn.qkv.weight
    assert torch.equal(copied, vit.net.blocks[1].attn.qkv.weight)
    state = CheckpointState(grown.net.state_dict(), "teacher", ["heads=2", "attention=joint"])
    with pytest.raises(ValueError, match="these are weights of a TimeSformer of attention=divided"):
        read_layout("timesformer", state)
