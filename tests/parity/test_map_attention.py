"""Attention to whole maps and to neighbourhoods against recorded layers: the bottleneck transformers of lucidrains and
timm, stand-alone self-attention of leaderj1001. What is compared of each, the tests say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from parity_files import recorded, relative_error
from torch import Tensor, nn

from pretrain.encoders.local_attention.neighbourhood import attend_to_neighbours, shares_of_place
from pretrain.encoders.local_attention.whole_map import MapAttention
from pretrain.encoders.places import Spot
from pretrain.encoders.relative import relative_to_absolute

Record = dict[str, Any]
#: Our names of recorded tables.
TABLES = {
    "pos_emb.height": "places.rows",
    "pos_emb.width": "places.columns",
    "pos_emb.rel_height": "places.relative_rows",
    "pos_emb.rel_width": "places.relative_columns",
    "pos_embed.height_rel": "places.relative_rows",
    "pos_embed.width_rel": "places.relative_columns",
    "to_qkv.weight": "qkv.weight",
    "qkv.weight": "qkv.weight",
}


def check(record: Record, found: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Outputs, their loss, and the gradient of every recorded parameter, which `weights` has by its recorded name."""
    for name, value in found.items():
        torch.testing.assert_close(value, record["outputs"][name], atol=1e-4, rtol=0)
    assert set(record["outputs_in_loss"]) <= set(found)
    loss = sum(
        (found[name] * record["cotangents"][name] + found[name] ** 2 / 2).mean() for name in record["outputs_in_loss"]
    )
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    loss.backward()
    assert record["grads"].keys() <= weights.keys()
    for name, gradient in record["grads"].items():
        assert relative_error(weights[name].grad, gradient) < 1e-3, name


def loaded(layer: MapAttention, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer's parameters by their recorded names, once it has the recorded values."""
    layer.load_state_dict({TABLES[name]: value for name, value in state.items()})
    own = dict(layer.named_parameters())
    return {name: own[TABLES[name]] for name in state}


@pytest.mark.parametrize("places", ["relative", "absolute"])
def test_attention_of_a_bottleneck_transformer(places: str) -> None:
    record = recorded(f"botnet_{places}.pt")
    config, inputs = record["config"], record["inputs"]
    grid = tuple(config["fmap"])
    layer = MapAttention(config["dim"], config["heads"], config["dim_head"], grid, places)
    weights = loaded(layer, record["state_dict"])
    query = inputs["q"] / layer.places.scale  # theirs is scaled already
    found = {"out": layer(inputs["x"]), "position_logits": layer.places.bias(query, Spot(grid, None), 0)}
    check(record, found, weights)
    shifted = relative_to_absolute(inputs["relative_to_absolute_in"])
    assert torch.equal(shifted, record["outputs"]["relative_to_absolute_out"])


def test_timms_attention_whose_queries_are_not_scaled_for_positions() -> None:
    record = recorded("botnet_timm.pt")
    config = record["config"]
    layer = MapAttention(
        config["dim"], config["heads"], config["dim_head"], tuple(config["fmap"]), out=config["dim_out"], scaled=False
    )
    weights = loaded(layer, record["state_dict"])
    check(record, {"out": F.avg_pool2d(layer(record["inputs"]["x"]), config["stride"])}, weights)


def test_a_stack_of_a_bottleneck_transformer() -> None:
    """Our attention within the recorded blocks, whose convolutions, shortcuts and batch normalisation are computed
    here: those of our encoder differ (norms over each image, a shortcut without a 3x3 convolution)."""
    record = recorded("botnet_stack.pt")
    state = {
        name: value if "running" in name or not value.is_floating_point() else nn.Parameter(value)
        for name, value in record["state_dict"].items()
    }
    heads, width = record["config"]["heads"], record["config"]["dim_head"]

    def norm(cells: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            state[f"{name}.{end}"] for end in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(cells, mean, variance, scale, shift)

    cells, weights = record["inputs"]["x"], dict(state)
    for number in range(record["config"]["num_layers"]):
        block, shortcut = f"net.{number}.net", cells
        if number == 0:
            shortcut = F.conv2d(cells, state["net.0.shortcut.0.weight"], stride=2, padding=1)
            shortcut = norm(shortcut, "net.0.shortcut.1").relu()
        inner = norm(F.conv2d(cells, state[f"{block}.0.weight"]), f"{block}.1").relu()
        layer = MapAttention(inner.shape[1], heads, width, (inner.shape[2], inner.shape[3]))
        own = {name: value for name, value in record["state_dict"].items() if name.startswith(f"{block}.3.")}
        named = loaded(layer, {name.removeprefix(f"{block}.3."): value for name, value in own.items()})
        weights |= {f"{block}.3.{name}": value for name, value in named.items()}
        mixed = layer(inner)
        mixed = F.avg_pool2d(mixed, 2) if number == 0 else mixed
        mixed = norm(mixed, f"{block}.5").relu()
        cells = (norm(F.conv2d(mixed, state[f"{block}.7.weight"]), f"{block}.8") + shortcut).relu()
    check(record, {"out": cells}, weights)


def test_stand_alone_attention_with_one_channel_a_head() -> None:
    """The recorded code has a softmax for each channel, rows on half of the channels and columns on the others. That is
    our function with one channel a head and tables of each head's own; the paper's layer, which ours is
    (`NeighbourAttention`), gives every head both. Of the stem the code attends from each px to a window that moves by
    one px, ours within blocks of 4x4 (section 3.2 of the paper): what both share is how values are mixed by place."""
    record = recorded("stand_alone_attention.pt")
    weights = {name: nn.Parameter(value) for name, value in record["state_dict"].items()}
    inputs = record["inputs"]

    def parts(kind: str, cells: Tensor, *names: str) -> list[Tensor]:
        return [F.conv2d(cells, weights[f"{kind}.{name}.weight"]) for name in names]

    query, key, value = parts("conv", inputs["x"], "query_conv", "key_conv", "value_conv")
    one_each = "b c h w -> b c 1 h w"
    rows, columns = (rearrange(weights[f"conv.{name}"], "c 1 1 a b -> c 1 (a b)") for name in ("rel_h", "rel_w"))
    tables = torch.cat([rows, torch.zeros_like(columns)]), torch.cat([torch.zeros_like(rows), columns])
    mixed = attend_to_neighbours(*(rearrange(part, one_each) for part in (query, key, value)), *tables)
    found = {"conv": rearrange(mixed, "b c 1 h w -> b c h w")}

    stem, image = record["config"]["stem"], inputs["image"]
    around = F.pad(image, (stem["padding"],) * 4)
    (query,), (key,) = parts("stem", image, "query_conv"), parts("stem", around, "key_conv")
    values = torch.stack(parts("stem", around, *(f"value_conv.{m}" for m in range(stem["mixtures"]))))
    height, width = image.shape[2:]

    def windows(cells: Tensor) -> Tensor:
        return cells.unfold(-2, stem["kernel"], 1).unfold(-2, stem["kernel"], 1)[..., :height, :width, :, :]

    tables = (weights[f"stem.{name}"].T for name in ("emb_a", "emb_b"))
    shares = shares_of_place(*tables, weights["stem.emb_mix"])
    value = torch.einsum("m b c h w p q, p q m -> b c h w p q", windows(values), shares)
    logits = rearrange(query, "b c h w -> b c h w 1 1") * windows(key)
    attention = rearrange(logits, "b c h w p q -> b c h w (p q)").softmax(dim=-1)
    found["stem"] = (attention * rearrange(value, "b c h w p q -> b c h w (p q)")).sum(dim=-1)
    check(record, found, weights)
