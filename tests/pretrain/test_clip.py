"""Image-text contrast in runs: its loss however the batch is divided, captions drawn, weights kept and taken."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import column, run_all
from tiny import build, config_data, random_batch

from pretrain.config.load import ConfigError, check_sources, parse_config
from pretrain.encoders.saved import load_encoder
from pretrain.engines.optim import build_optimizer
from pretrain.methods.clip.captions import DrawnCaptions, captions_of
from pretrain.run import pretrain
from pretrain.stream.datasets import open_datasets
from pretrain.text.saved import load_text
from pretrain.text.settings import TextConfig
from pretrain.text.tower import TextTower
from pretrain.text.vocabulary import END, START, Vocabulary, trained

MASK = {"ratio": 0.75, "unit": 4}
WORDS = [f"{colour} {number} of {kind}" for colour in ("red", "green") for number in range(9) for kind in ("b", "ccc")]


def clip_data(shards: Path, runs: Path, **sections: Any) -> dict[str, Any]:
    return config_data("clip", "vit", shards, runs, **sections)


def test_two_ranks_and_micro_batches_learn_what_one_does(shards: Path, tmp_path: Path) -> None:
    """With masks, drop path and several captions an image, under every way to divide states and parameters."""
    cells: dict[tuple[str, int, int, int], dict[str, Any]] = {}
    for loss, ranks, accumulation, stage in (
        ("infonce", 1, 1, 0),
        ("infonce", 1, 2, 0),
        ("infonce", 2, 1, 1),
        ("infonce", 2, 2, 2),
        ("infonce", 2, 2, 3),
        ("siglip", 1, 1, 0),
        ("siglip", 2, 2, 0),
    ):
        train = {"steps": 5, "batch_size": 16, "grad_accum_steps": accumulation}
        data = clip_data(shards, tmp_path, train=train, engine={"zero_stage": stage})
        data["encoder"]["drop_path"] = 0.3
        data["method"] |= {"loss": loss, "mask": MASK}
        data["name"] = f"{loss}-{ranks}-{accumulation}-{stage}"
        cells[loss, ranks, accumulation, stage] = data
    for ranks in (1, 2):
        run_all([data for key, data in cells.items() if key[1] == ranks], ranks, tmp_path)
    for (loss, *_), data in cells.items():
        alone = cells[loss, 1, 1, 0]
        assert column(data, "ids_digest") == column(alone, "ids_digest")
        for name in ("loss", "logit_scale", "grad_norm"):
            assert column(data, name) == pytest.approx(column(alone, name), rel=2e-4), (data["name"], name)
        assert (Path(data["runs"]) / data["name"] / "encoder" / "tokenizer.json").read_bytes() == (
            Path(alone["runs"]) / alone["name"] / "encoder" / "tokenizer.json"
        ).read_bytes()


def test_a_killed_run_comes_back_to_the_same_and_its_text_side_is_kept(shards: Path, tmp_path: Path) -> None:
    data = clip_data(shards, tmp_path / "a")
    data["method"]["mask"] = MASK
    run = pretrain(parse_config(data))
    copy = tmp_path / "b" / data["name"]
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "encoder")
    shutil.rmtree(copy / "checkpoints" / "step-00000008")
    stored = (copy / "config.yaml").read_text(encoding="utf-8")
    (copy / "config.yaml").write_text(stored.replace(data["runs"], str(tmp_path / "b")), encoding="utf-8")
    pretrain(parse_config({**data, "runs": str(tmp_path / "b")}))
    for name in ("model.safetensors", "heads.safetensors", "tokenizer.json", "text.json"):
        assert (run / "encoder" / name).read_bytes() == (copy / "encoder" / name).read_bytes()

    encoder, card = load_encoder(run / "encoder")
    assert card.headline is None
    side = load_text(run / "encoder")
    texts = side.of_texts(["picture 3 of class 3", "something else"])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert side.of_images(encoder(torch.randn(3, 3, 32, 32)).pooled).shape == (3, 16)

    tuned = clip_data(shards, tmp_path / "c", train={"steps": 1})
    tuned["init_from"] = str(run)
    out = pretrain(parse_config(tuned))
    assert (out / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    later = load_text(out / "encoder")
    step = 2e-3  # AdamW at 1e-3 moves none further
    for name, value in side.state_dict().items():
        torch.testing.assert_close(later.state_dict()[name], value, atol=step, rtol=0)


def test_a_run_of_mae_is_gone_on_with(shards: Path, tmp_path: Path) -> None:
    mae = pretrain(parse_config(config_data("mae", "vit", shards, tmp_path, train={"steps": 1})))
    data = clip_data(shards, tmp_path, train={"steps": 1}, optim={"lr": 1e-9})
    data["init_from"] = str(mae)
    run = pretrain(parse_config(data))
    theirs, ours = (load_encoder(place / "encoder")[0].state_dict() for place in (mae, run))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_steps_lower_the_loss_and_reach_every_parameter(loss: str, shards: Path, tmp_path: Path) -> None:
    data = clip_data(shards, tmp_path)
    data["method"] |= {"loss": loss, "mask": MASK}
    config = parse_config(data)
    method, batch = build(config).train(), random_batch(config, size=8)
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    losses = []
    for step in range(12):
        loss = method(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        if not step:
            untouched = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.abs().sum()]
            assert untouched == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_scale_stays_within_its_bounds(shards: Path, tmp_path: Path) -> None:
    config = parse_config(clip_data(shards, tmp_path, optim={"lr": 5.0, "weight_decay": 0.2}))
    for direction, bound in ((-1.0, math.log(100)), (1.0, 0.0)):
        method = build(config)
        optimizer = build_optimizer(method, config.optim)
        for _ in range(3):
            for parameter in method.parameters():
                parameter.grad = torch.zeros_like(parameter)
            method.logit_scale.grad = torch.tensor([direction])
            for group in optimizer.rules:
                group["lr"] = 5.0
            optimizer.step()
        assert method.logit_scale.item() == pytest.approx(bound)
    scale = next(group for group in optimizer.rules if "logit_scale" in group["names"])
    assert scale["names"] == ["logit_scale"]
    assert not scale["decay"]


def test_one_of_several_captions_is_drawn_for_a_row_of_a_step(shards: Path, tmp_path: Path) -> None:
    config = parse_config(clip_data(shards, tmp_path))
    drawn = DrawnCaptions(captions_of(config), trained(WORDS, 300), 12, seed=3)
    ids = np.stack([np.zeros(100, np.int64), np.arange(100)], axis=1)
    rows = np.arange(100)
    first = drawn.texts(ids, rows, 5)
    assert first == drawn.texts(ids, rows, 5)
    half = np.concatenate([drawn.texts(ids[50:], rows[50:], 5), drawn.texts(ids[:50], rows[:50], 5)]).tolist()
    assert half == first[50:] + first[:50]
    counts = Counter(text.startswith("of ") for step in range(4) for text in drawn.texts(ids, rows, step))
    assert 150 <= counts[True] <= 250  # 200 expected, deviation 10
    assert drawn.texts(ids, rows, 6) != first


def test_a_vocabulary_writes_any_text_and_is_a_function_of_its_texts() -> None:
    made = trained(WORDS, 320)
    assert made.as_json() == trained(iter(WORDS), 320).as_json()
    assert 258 <= made.size <= 320
    assert Vocabulary(made.as_json()).checksum == made.checksum
    for text in ("red 7 of ccc", "Grüße 你好 ½", f"a {START} b {END} c"):
        (ids,) = made.encode([text], 60)
        assert ids[0] == made.start
        assert (ids == made.end).sum() == 1
        assert ids.max() == made.end == made.size - 1
        assert made.decode(ids.tolist()) == text.lower()
    (cut,) = made.encode(["red 7 of ccc " * 20], 8)
    assert cut[-1] == made.end
    with pytest.raises(ValueError, match="must end with"):
        Vocabulary(json.dumps({**json.loads(made.as_json()), "added_tokens": []}))


def test_what_follows_the_end_of_a_caption_changes_nothing() -> None:
    settings = TextConfig(dim=16, depth=2, heads=2, context=10)
    tower = TextTower(settings, 50, 8, end=49)
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0, 0, 0]])
    other = torch.tensor([[48, 3, 4, 49, 7, 49, 12, 1, 2, 3]])
    torch.testing.assert_close(tower(tokens), tower(other))
    assert not torch.allclose(tower(tokens), tower(torch.tensor([[48, 4, 3, 49, 0, 0, 0, 0, 0, 0]])))
    bidirectional = TextTower(TextConfig(dim=16, depth=2, heads=2, context=10, causal=False, pool="first"), 50, 8)
    assert not torch.allclose(bidirectional(tokens), bidirectional(other))


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("method", {"text": "caption"}, "must be txt or json:FIELD"),
        ("method", {"mask": {"kind": "blockwise", "unit": 4}}, "use kind random"),
        ("method", {"tower": {"dim": 30, "heads": 4}}, "must be a multiple of heads"),
        ("method", {"tower": {"pool": "first"}}, "first token sees no other"),
        ("train", {"batch_size": 1, "steps": 2}, "take many"),
        ("data", {"adopt": "next_epoch"}, "set data.adopt=null"),
    ],
)
def test_what_cannot_be_is_refused(
    section: str, change: dict[str, Any], told: str, shards: Path, tmp_path: Path
) -> None:
    data = clip_data(shards, tmp_path)
    data[section] = {**data[section], **change}
    with pytest.raises(ConfigError, match=told):
        parse_config(data)


def test_images_without_captions_are_refused_before_a_run_starts(shards: Path, tmp_path: Path) -> None:
    data = clip_data(shards, tmp_path)
    check_sources(parse_config(data))
    data["method"]["text"] = "json:caption"
    with pytest.raises(ConfigError, match=r"all of 120 samples of .* have no caption \('caption' of its \.json\)"):
        check_sources(parse_config(data))
    assert open_datasets(parse_config(data).data)[0].num_samples == 120


def test_a_run_is_probed_by_words(shards: Path, tmp_path: Path) -> None:
    from eval.probe import run_probe
    from eval.target import open_target

    run = pretrain(parse_config(clip_data(shards, tmp_path, train={"steps": 2})))
    options: dict[str, Any] = {"seeds": (0,), "epochs": 1, "progress": False, "device": "cpu"}
    learnt, held_out = (str(shards / f"train-00000{number}.tar") for number in range(2))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"templates": ["picture of class {}"]}))
    found = run_probe(str(run), learnt, val_data=held_out, only=("zero_shot", "image_text"), prompts=prompts, **options)
    assert 0 <= found["rows"]["pretrained"]["zero_shot"]["top1"] <= 1
    assert found["rows"]["pretrained"]["image_text"]["captions"] == 120
    assert found["rows"]["pixels"]["zero_shot"] == found["rows"]["untrained"][0]["zero_shot"] == {}
    assert {column["probe"] for column in found["columns"]} == {"zero_shot", "image_text"}
    mae = pretrain(parse_config(config_data("mae", "vit", shards, tmp_path, train={"steps": 1})))
    assert open_target(str(mae)).text is None
    with pytest.raises(ValueError, match="did not learn from captions"):
        run_probe(str(mae), learnt, val_data=held_out, only=("zero_shot",), **options)
