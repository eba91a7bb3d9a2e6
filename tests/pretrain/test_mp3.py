"""MP3: attention to the seen tokens alone, positions that are not told, and the loss of the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from test_train import column, run_all
from tiny import build, config_data, random_batch

from pretrain.config import Config
from pretrain.config.load import ConfigError, parse_config
from pretrain.encoders.supported import check_encoder
from pretrain.methods.mp3.config import counts


def configuration(encoder: dict[str, Any] | None = None, **method: Any) -> Config:
    data = config_data("mp3", "vit", Path("nowhere"), Path("nowhere"))
    data["encoder"] |= encoder or {}
    data["method"] |= method
    return parse_config(data)


def slow_logits(method: Any, images: torch.Tensor, unseen: torch.Tensor, placeless: torch.Tensor) -> torch.Tensor:
    """One image after the other, with every score computed and those of unseen tokens struck out."""
    vit, found = method.encoder.vit, []
    for image, hidden, lost in zip(images, unseen.flatten(1), placeless.flatten(1), strict=True):
        tokens = rearrange(vit.patch_embed(image[None])[0], "h w d -> (h w) d")
        positions = vit.pos_embed[0, 1:] * (~lost)[:, None]
        tokens = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], tokens + positions])
        seen = torch.cat([torch.tensor([True]), ~hidden])
        start = tokens
        for block in vit.blocks:
            source = start if method.config.keys == "embedded" else tokens
            heads = block.attn.num_heads
            query = rearrange(block.attn.qkv(block.norm1(tokens)), "n (t h d) -> t h n d", t=3, h=heads)[0]
            _, key, value = rearrange(block.attn.qkv(block.norm1(source)), "n (t h d) -> t h n d", t=3, h=heads)
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            attended = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ value
            tokens = tokens + block.attn.proj(rearrange(attended, "h n d -> n (h d)"))
            tokens = tokens + block.mlp(block.norm2(tokens))
        found.append(method.head(vit.norm(tokens)[1:]))
    return torch.stack(found)


@pytest.mark.parametrize(("keys", "share"), [("updated", 1.0), ("updated", 0.5), ("embedded", 1.0)])
def test_logits_and_loss_are_the_papers(keys: str, share: float) -> None:
    config = configuration(keys=keys, placeless_ratio=share)
    method, batch = build(config).eval(), random_batch(config)
    images = method.normalise(batch["global_crops"][:, 0])
    unseen, placeless = batch["unseen_mask"], batch["placeless_mask"]
    expected = slow_logits(method, images, unseen, placeless)
    torch.testing.assert_close(method.logits(images, unseen, placeless), expected, atol=1e-5, rtol=1e-4)
    asked = placeless.flatten(1)
    where = torch.arange(asked.shape[1]).expand_as(asked)[asked]
    torch.testing.assert_close(method(batch, 0)["loss"], F.cross_entropy(expected[asked], where))


def test_tokens_that_are_told_no_position_know_none() -> None:
    """Patches and masks in another order give the same logits in that order."""
    config = configuration()
    method, batch = build(config).eval(), random_batch(config)
    images, side = method.normalise(batch["global_crops"][:, 0]), config.encoder.patch
    grid = 32 // side
    order = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(0))

    def moved(patches: torch.Tensor) -> torch.Tensor:
        return patches[:, order]

    flat = rearrange(images, "b c (h y) (w x) -> b (h w) (c y x)", y=side, x=side)
    shuffled = rearrange(moved(flat), "b (h w) (c y x) -> b c (h y) (w x)", h=grid, y=side, x=side)
    unseen, placeless = batch["unseen_mask"], batch["placeless_mask"]
    there = rearrange(moved(unseen.flatten(1)), "b (h w) -> b h w", h=grid)
    torch.testing.assert_close(
        method.logits(shuffled, there, placeless), moved(method.logits(images, unseen, placeless)), atol=1e-5, rtol=1e-4
    )


def test_what_is_drawn() -> None:
    config = configuration(unseen_ratio=0.7, placeless_ratio=0.3)
    batch = random_batch(config, size=8)
    tokens = batch["unseen_mask"][0].numel()
    assert counts(config.method, tokens) == (int(tokens * 0.7), -(-tokens * 3 // 10))
    for name, count in zip(("unseen_mask", "placeless_mask"), counts(config.method, tokens), strict=True):
        assert batch[name].flatten(1).sum(dim=1).tolist() == [count] * 8
        assert not torch.equal(batch[name][0], batch[name][1])


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        ({"positions": "relative_shift"}, "positions=relative_shift places tokens within its blocks"),
        ({"stem": "conv"}, "stem=conv reads beyond the patch"),
    ],
)
def test_encoders_that_give_the_answer_away_are_refused(encoder: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_encoder(configuration(encoder))


def test_pyramids_are_refused() -> None:
    config = parse_config(config_data("mp3", "swin", Path("nowhere"), Path("nowhere")))
    with pytest.raises(ConfigError, match="does not go with method mp3: its tokens know their places"):
        check_encoder(config)


@pytest.mark.slow
def test_two_ranks_and_micro_batches_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for ranks, accumulation, stage in ((1, 1, 0), (1, 2, 2), (2, 1, 1), (2, 2, 3)):
        train = {"steps": 4, "batch_size": 16, "grad_accum_steps": accumulation}
        data = config_data("mp3", "vit", shards, tmp_path, train=train, engine={"zero_stage": stage})
        data["encoder"]["drop_path"], data["name"] = 0.3, f"{ranks}-{accumulation}"
        cells[ranks, accumulation] = data
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[0] == ranks], ranks, tmp_path)
    for data in cells.values():
        for name in ("loss", "position_accuracy", "grad_norm"):
            assert column(data, name) == pytest.approx(column(cells[1, 1], name), rel=1e-4), (data["name"], name)
