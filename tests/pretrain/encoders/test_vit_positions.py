"""The ViT's positions and stems: slow forms, tokens that keep their own, packed passes, other sizes, timm."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pretrain.config.load import override_section
from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask, Windows, several_passes
from pretrain.encoders.drop_path import drawn
from pretrain.encoders.places import ConditionalPositions, Place, Spot
from pretrain.encoders.relative import RelativeBias, RelativeShift, relative_to_absolute
from pretrain.encoders.transfer import fit
from pretrain.encoders.vit.config import VitConfig, timm_recipe
from pretrain.encoders.vit.encoder import VitEncoder
from pretrain.interop.initialise import settings_of

ATTENDING = ("relative_bias", "relative_shift", "rotary", "conditional")
STEMS = ("norm", "mlp", "overlap")


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> VitEncoder:
    torch.manual_seed(0)
    config = VitConfig(**{"dim": 16, "depth": 2, "heads": 2, "patch": 8, "registers": 1, **settings})
    encoder = build_encoder(config, size, mask_token=True).eval()
    assert isinstance(encoder, VitEncoder)
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder


def images(count: int = 2, size: tuple[int, int] = (32, 32), seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def hidden(count: int = 2, grid: tuple[int, int] = (4, 4)) -> Tensor:
    order = torch.rand(count, grid[0] * grid[1], generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return (order < 6).view(count, *grid)


def test_the_shift_takes_each_key_the_product_with_its_distance() -> None:
    products = torch.randn(2, 4, 7)
    expected = torch.stack([torch.stack([row[3 - q : 7 - q] for q, row in enumerate(part)]) for part in products])
    assert torch.equal(relative_to_absolute(products), expected)


@torch.no_grad()
def test_relative_positions_are_those_of_rows_and_columns_pair_by_pair() -> None:
    shift, bias = RelativeShift(4, (2, 3)), RelativeBias(3, (2, 3), prefix=True)
    nn.init.normal_(bias.relative_position_bias_table)
    query = torch.randn(2, 3, 1 + 6, 4)
    found = shift.bias(query, Spot((2, 3), None), 1), bias.bias(query, Spot((2, 3), None), 1)
    table = bias.relative_position_bias_table
    assert not found[0][:, :, 0].any()
    assert not found[0][:, :, :, 0].any()
    for head in range(3):
        assert found[1][0, head, 0, 1:].unique().tolist() == [float(table[-3, head])]
        assert found[1][0, head, 1:, 0].unique().tolist() == [float(table[-2, head])]
        assert found[1][0, head, 0, 0] == table[-1, head]
        for q in range(6):
            for k in range(6):
                down, right = k // 3 - q // 3, k % 3 - q % 3
                distance = shift.relative_rows[down + 1] + shift.relative_columns[right + 2]
                torch.testing.assert_close(found[0][1, head, q + 1, k + 1], query[1, head, q + 1] @ distance / 2)
                assert found[1][0, head, q + 1, k + 1] == table[(1 - down) * 5 + 2 - right, head]


@pytest.mark.parametrize("kind", ["relative_bias", "relative_shift"])
def test_units_that_are_left_keep_their_distances(kind: str) -> None:
    relative = make(positions=kind).vit.blocks[0].relative
    units = torch.tensor([[0, 3, 5], [2, 9, 15]])
    query = torch.randn(2, 2, 2 + 16, 8)
    whole = relative.bias(query, Spot((4, 4), None), 2).expand(2, -1, -1, -1)
    for image in range(2):
        kept = torch.cat([torch.arange(2), units[image] + 2])
        few = relative.bias(query[:, :, kept], Spot((4, 4), units), 2)
        torch.testing.assert_close(few[image], whole[image][:, kept][:, :, kept])


def test_a_conditional_position_reads_the_visible_neighbours_alone() -> None:
    positions = ConditionalPositions(2)
    tokens, units = torch.randn(1, 1 + 4, 2), torch.tensor([[0, 1, 4, 8]])
    found = positions(tokens, Place(1, (Spot((3, 3), units),)))
    assert torch.equal(found[:, :1], tokens[:, :1])
    where = {int(unit): tokens[0, 1 + number] for number, unit in enumerate(units[0])}
    for number, unit in enumerate(units[0].tolist()):
        added = positions.proj.bias.clone()
        for row in range(3):
            for column in range(3):
                place = (unit // 3 + row - 1, unit % 3 + column - 1)
                if min(place) >= 0 and max(place) < 3 and place[0] * 3 + place[1] in where:
                    added = added + positions.proj.weight[:, 0, row, column] * where[place[0] * 3 + place[1]]
        torch.testing.assert_close(found[0, 1 + number], tokens[0, 1 + number] + added)


def test_dropped_units_leave_the_others_their_angles() -> None:
    """Rows of whole attention with no weight on what was dropped are those of the visible tokens alone."""
    encoder, drop = make(positions="rotary"), hidden()
    kept = {}
    for name, mask in (("whole", None), ("few", Mask(drop=drop))):
        tokens, grid, units = encoder.embed(images(), mask)
        place = encoder._places([(grid, units)], None, tokens.device)[0]
        assert place is not None
        assert place.turn is not None
        kept[name] = (place.turn, units)
    turn, units = kept["few"]
    for image in range(2):
        assert torch.equal(turn[:, image, 2:], kept["whole"][0][:, 0, 2:][:, units[image]])


@pytest.mark.parametrize("kind", ATTENDING)
def test_one_pass_over_several_sizes_is_a_pass_for_each(kind: str) -> None:
    encoder = make(positions=kind, drop_path=0.5, layer_scale=0.5).train()
    passes = (
        (images(6), Mask(drop=hidden(6))),
        (images(12, (16, 24)), None),
        (images(6, seed=3), Mask(token=hidden(6))),
    )
    outcomes = []
    for packs in (True, False):
        encoder.packs = packs
        encoder.zero_grad()
        with drawn(0, 1, torch.arange(6)):
            seen = several_passes(encoder, passes)
        sum(part.square().sum() for each in seen for part in (each.pooled, each.tokens)).backward()
        outcomes.append([each.tokens for each in seen] + [parameter.grad for parameter in encoder.parameters()])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(
    "settings",
    [*({"positions": kind} for kind in (*ATTENDING, "sincos_1d", "none")), *({"stem": stem} for stem in STEMS)],
    ids=str,
)
def test_hidden_pixels_change_nothing_and_others_do(settings: dict[str, Any]) -> None:
    encoder, unseen = make((32, 48), **settings), hidden(2, (4, 6))
    pixels = unseen.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    first, other = images(size=(32, 48)), images(size=(32, 48), seed=5)
    for mask in (Mask(drop=unseen), Mask(token=unseen)):
        before = encoder(first, mask)
        assert torch.equal(before.tokens, encoder(torch.where(pixels, other, first), mask).tokens)
        assert not torch.allclose(before.tokens, encoder(torch.where(pixels, first, other), mask).tokens)


@pytest.mark.parametrize(
    "settings",
    [*({"positions": kind} for kind in (*ATTENDING, "sincos_1d", "none")), *({"stem": stem} for stem in STEMS)],
    ids=str,
)
def test_other_sizes_run_gradients_reach_all_and_weights_come_back(settings: dict[str, Any]) -> None:
    encoder = make(**settings).train()
    mask = Mask(token=hidden(2, (2, 5)))
    encoder(images(size=(16, 40)), mask).tokens.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name
    again = build_encoder(encoder.config, (32, 32)).eval()
    again.inner().load_state_dict(encoder.inner().state_dict())
    torch.testing.assert_close(again(images()).tokens, encoder.eval()(images()).tokens)
    further = encoder.further_blocks(1, after=1).eval()
    assert further(encoder(images()).states, (4, 4)).isfinite().all()


@pytest.mark.parametrize("kind", ["relative_bias", "relative_shift"])
def test_a_start_from_another_size_brings_the_distances_along(kind: str) -> None:
    source, target = make(positions=kind), make((64, 64), positions=kind)
    fitted = fit(dict(source.inner().state_dict()), target)
    assert not fitted.left
    assert not fitted.fresh
    assert any("relative" in key for key in fitted.resized)
    if kind == "relative_shift":  # on a larger image it computes what the table it was given does
        target.inner().load_state_dict(fitted.weights)
        seen = images(size=(64, 64))
        torch.testing.assert_close(target(seen).tokens, source(seen).tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "sincos_1d"])
def test_timm_computes_the_same(kind: str) -> None:
    encoder = make(positions=kind)
    recipe = timm_recipe(encoder.config, (32, 32), 3)
    assert recipe is not None
    model = timm.create_model(**recipe).eval()
    model.load_state_dict(encoder.inner().state_dict())
    torch.testing.assert_close(model(images()), encoder(images()).pooled, rtol=0, atol=1e-5)
    for settings in ({"positions": "rotary"}, {"stem": "mlp"}):
        assert timm_recipe(VitConfig(**settings), (32, 32), 3) is None


def test_no_positions_is_blind_to_the_order_of_patches() -> None:
    encoder = make(positions="none")
    swapped = torch.cat([images()[..., 8:], images()[..., :8]], dim=3)
    torch.testing.assert_close(encoder(images()).pooled, encoder(swapped).pooled)
    assert not torch.allclose(*(make(positions="rotary")(shown).pooled for shown in (images(), swapped)))


@pytest.mark.parametrize("stem", ["norm", "mlp"])
def test_a_stem_is_the_same_at_each_place(stem: str) -> None:
    encoder = make(stem=stem)
    moved = torch.cat([images()[..., 8:], images()[..., :8]], dim=3)
    first = encoder.vit.patch_embed(images())
    torch.testing.assert_close(encoder.vit.patch_embed(moved).roll(1, dims=2), first)
    if stem == "norm":  # a patch's contrast says nothing after its norm
        torch.testing.assert_close(encoder.vit.patch_embed(images() * 3 + 1), first, rtol=1e-3, atol=1e-3)


def test_an_overlapping_stem_reads_beyond_its_patch() -> None:
    embed = make(stem="overlap").vit.patch_embed
    changed = images()
    changed[:, :, :8, :8] += 1.0
    different = (embed(images()) != embed(changed)).any(dim=-1)[0]
    assert different.tolist() == [[row < 2 and column < 2 for column in range(4)] for row in range(4)]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="multiple of 4"):
        VitConfig(dim=12, heads=2, positions="rotary")
    with pytest.raises(ValidationError, match="belongs to positions=rotary"):
        VitConfig(rotary={"rescale": 2.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no form of windows"):
        make(positions="rotary").windowed(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dim", "hidden", "mlp"),
    [(384, None, "gelu"), (1280, None, "gelu"), (1408, 6144, "gelu"), (1664, 8192, "gelu"), (1536, 4096, "swiglu")],
)
def test_the_ratio_names_the_published_widths_of_mlps(dim: int, hidden: int | None, mlp: Any) -> None:
    config = VitConfig(dim=dim, heads=dim // 32, hidden=hidden, mlp=mlp)
    assert int(dim * config.mlp_ratio) == (hidden or 4 * dim) * (2 if mlp == "swiglu" else 1)


def test_another_epsilon_is_another_encoder() -> None:
    told = override_section(VitConfig(), ["norm_eps=1e-12"])
    assert told.norm_eps == 1e-12
    assert settings_of(told) != settings_of(VitConfig())
    assert timm_recipe(told, (32, 32), 3) is None


@pytest.mark.parametrize("settings", [{"mlp": "swiglu", "hidden": 24}, {"mlp": "quick_gelu", "pre_norm": True}])
def test_other_mlps_and_a_norm_before_the_blocks_are_timms(settings: dict[str, Any]) -> None:
    eps = 1e-5 if "pre_norm" in settings else 1e-6
    encoder = make(norm_eps=eps, layer_scale=0.1, **settings)
    recipe = timm_recipe(encoder.config, (32, 32), 3)
    assert recipe is not None
    model = timm.create_model(**recipe).eval()
    model.load_state_dict(encoder.inner().state_dict())
    with torch.no_grad():
        theirs = model.forward_features(images())
        ours = encoder(images())
    assert ours.prefix_tokens is not None
    torch.testing.assert_close(torch.cat([ours.prefix_tokens, ours.tokens], dim=1), theirs)
    whole, part = encoder((images(), images(size=(16, 16)))), encoder(images(size=(16, 16)))
    torch.testing.assert_close(whole[1].tokens, part.tokens)
    windows = encoder.windowed(Windows(side=0, everywhere=(), relative_positions=False))
    torch.testing.assert_close(windows(images()).tokens, ours.tokens)
