"""Fine-tuning: what is mixed with what, what is trained, what is measured, and what is left of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.mixup
import torch
import webdataset as wds
from PIL import Image
from scipy import stats
from sklearn.metrics import average_precision_score, r2_score
from tiny import build, config_data, random_batch

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.datasets.narrowed import only
from data_pipelines.loader import Batch
from data_pipelines.rng import Stream
from pretrain.config import Config
from pretrain.config.load import ConfigError, check_batch, parse_config
from pretrain.continuing.low_rank import without_changes
from pretrain.engines.optim import parameter_groups
from pretrain.methods.finetune.config import FinetuneConfig
from pretrain.methods.finetune.draws import Mixes, beta, box_of, draw_boxes, draw_mixes
from pretrain.methods.finetune.labels import read_labels
from pretrain.methods.finetune.method import Finetune
from pretrain.methods.finetune.mixing import mix, partners
from pretrain.methods.finetune.network import classify
from pretrain.methods.finetune.saved import load_classifier
from pretrain.methods.finetune.scores import (
    average_precision,
    blind_overlap,
    bootstrap_error,
    mean_overlap,
    r_squared,
)
from pretrain.run import pretrain
from pretrain.stream.datasets import data_lines, training_datasets

COLOURS = ((220, 30, 30), (30, 200, 30), (40, 40, 220))


def write_split(folder: Path, split: str, number: int, label: Any = None, seed: int = 0) -> None:
    """Images of 32 px, each all but of one of three colours; `label` makes the members beside it, default its .cls."""
    with wds.TarWriter(str(folder / f"{split}-000000.tar")) as writer:
        for place in range(number):
            noise = np.random.default_rng((seed, place)).integers(-30, 30, (32, 32, 3))
            pixels = (np.array(COLOURS[place % 3]) + noise).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            about = {"cls": str(place % 3)} if label is None else label(place)
            writer.write({"__key__": f"{split}{place:05d}", "png": file.getvalue(), **about})


def field(value: Any) -> dict[str, bytes]:
    return {"json": json.dumps({"what": value}).encode()}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    write_split(folder, "train", 48)
    write_split(folder, "val", 30, seed=1)
    return folder


def config_of(shards: Path, runs: Path, method: dict[str, Any] | None = None, **sections: Any) -> Config:
    data = config_data("finetune", "vit", shards, runs, diagnostics={"knn_every_epochs": None})
    data["method"] = {"name": "finetune", **(method or {})}
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values} if isinstance(values, dict) else values
    return parse_config(data)


def part_of(batch: Batch, rows: slice) -> Batch:
    return {name: value[rows] for name, value in batch.items()}


ALL = {
    "mixup": 0.8, "cutmix": 1.0, "mix_mode": "row", "label_smoothing": 0.1, "rand_augment": {}, "erasing": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("repeats", [1, 2])
def test_micro_batches_see_the_rows_of_the_global_batch(repeats: int, shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, tmp_path, ALL, data={"repeated_augmentation": repeats})
    method, batch = build(config), random_batch(config, 8)
    assert isinstance(method, Finetune)
    whole = method.seen(batch, 5)
    parts = [method.seen(part_of(batch, slice(first, first + 4)), 5) for first in (0, 4)]
    for all_rows, halves in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(all_rows, torch.cat(halves))
    assert not torch.equal(whole[0], method.seen(batch, 6)[0])


def test_a_micro_batch_that_splits_pairs_is_refused(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards, tmp_path, {"mixup": 0.8}, data={"repeated_augmentation": 2})
    check_batch(config, 2)
    with pytest.raises(ConfigError, match="multiple of 4"):
        check_batch(config, 4)


def test_partners_are_others_samples() -> None:
    assert partners(torch.arange(8), 1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert partners(torch.arange(8), 2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


@pytest.mark.parametrize("cut", [False, True])
def test_two_images_are_mixed_as_timm_mixes_them(cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.randn(2, 3, 16, 24), torch.tensor([1, 4])
    share, box = box_of(0.6, (16, 24), Stream(3)) if cut else (0.3, (0, 0, 0, 0))
    theirs = timm.data.mixup.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (share, cut))
    monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *_, **__: (box, share))
    wanted, wanted_targets = theirs(images.clone(), labels)
    hot = torch.nn.functional.one_hot(labels, 5) * 0.9 + 0.1 / 5
    drawn = Mixes(np.full(2, share, dtype=np.float32), np.array([box] * 2), np.full(2, cut))
    found, targets = mix(images, hot, drawn)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(targets, wanted_targets)


def test_a_box_is_timms_for_the_same_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (0.1, 0.5, 0.93):
        middle = iter([stream.integer(side) for stream in [Stream(7)] for side in (17, 30)])
        monkeypatch.setattr(np.random, "randint", lambda *_, middle=middle, **__: next(middle))
        (top, bottom, left, right), corrected = timm.data.mixup.cutmix_bbox_and_lam((1, 3, 17, 30), share)
        assert box_of(share, (17, 30), Stream(7)) == (pytest.approx(corrected), (top, bottom, left, right))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    stream = Stream(11)
    found = [beta(stream, alpha) for _ in range(4000)]
    assert stats.kstest(found, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_how_often_what_is_drawn() -> None:
    rows = np.arange(2000)
    config = FinetuneConfig(mixup=0.8, cutmix=1.0, mix_prob=0.8, mix_switch_prob=0.25, mix_mode="row", erasing=0.25)
    drawn = draw_mixes(config, 0, 0, rows, (32, 32))
    assert drawn.is_cut.mean() == pytest.approx(0.8 * 0.25, abs=0.04)
    assert (drawn.share == 1).mean() >= 0.15
    boxes = draw_boxes(config, 0, 0, rows, (32, 48))
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (32 * 48)
    assert (area > 0).mean() == pytest.approx(0.25, abs=0.04)
    assert area[area > 0].min() > 0.01
    assert area.max() < 0.4
    batch = draw_mixes(FinetuneConfig(mixup=0.8, cutmix=1.0), 0, 3, rows[:6], (32, 32))
    assert len(set(batch.share.tolist())) == 1


@pytest.mark.parametrize(
    ("blocks", "trained"), [(None, {0, 1, 2, 3}), (1, {2, 3}), (0, set())], ids=["all", "the last", "none"]
)
def test_only_so_many_blocks_are_trained(blocks: int | None, trained: set[int], shards: Path, tmp_path: Path) -> None:
    method = build(config_of(shards, tmp_path, {"train_blocks": blocks}))
    encoder = method.encoder
    assert encoder is not None
    found = {encoder.layer_of(name) for name, p in encoder.named_parameters() if p.requires_grad}
    assert found == trained
    groups = parameter_groups(method, layer_decay=0.5)
    head = next(group for group in groups if "head.fc.weight" in group["names"])
    assert head["lr_scale"] == 1.0
    for group in groups:
        if any("blocks.1." in name for name in group["names"]):
            assert group["lr_scale"] == 0.5


def test_lora_starts_with_nothing_and_is_merged(shards: Path, tmp_path: Path) -> None:
    method = build(config_of(shards, tmp_path / "a", {"lora": {"rank": 2}, "ema": 0.5}))
    plain = build(config_of(shards, tmp_path / "b"))
    assert isinstance(method, Finetune)
    changes = method.encoder.low_rank
    learned = [name for name, p in method.named_parameters() if p.requires_grad and name.startswith("encoder.")]
    assert learned == [f"encoder.low_rank.{name}" for name, _ in changes.named_parameters()]
    images = torch.randn(2, 3, 32, 32)
    method.encoder.load_state_dict(plain.encoder.state_dict(), strict=False)
    torch.testing.assert_close(method.encoder(images).pooled, plain.encoder(images).pooled)
    for change in changes.changes:
        torch.nn.init.normal_(change.up)
    merged = without_changes(method.encoder, method.encoder.state_dict())
    plain.encoder.load_state_dict(merged)
    assert not torch.equal(merged["vit.blocks.0.attn.qkv.weight"], method.encoder.vit.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(method.encoder(images).pooled, plain.encoder(images).pooled, atol=1e-5, rtol=1e-4)
    decayed = [name for group in parameter_groups(method, 1.0) if group["decay"] for name in group["names"]]
    assert decayed == ["head.fc.weight"]


def test_lora_is_refused_where_weights_are_read_without_their_layer(shards: Path, tmp_path: Path) -> None:
    beit = {"family": "beit", "dim": 32, "depth": 2, "heads": 2, "patch": 4}
    data = config_data("finetune", "vit", shards, tmp_path)
    data |= {"encoder": beit, "method": {"name": "finetune", "lora": {}}}
    with pytest.raises(ValueError, match=r"without calling it.*train_blocks"):
        build(parse_config(data))


def test_a_norm_after_the_mean(shards: Path, tmp_path: Path) -> None:
    method = build(config_of(shards, tmp_path, {"pool": "mean", "fc_norm": True}))
    assert isinstance(method, Finetune)
    images, model = torch.randn(2, 3, 32, 32), method.encoder.vit
    states = method.encoder(images).states
    wanted = method.head.fc(model.norm(states[:, 1:].mean(dim=1)))
    torch.testing.assert_close(classify(method.encoder, method.head, images), wanted)
    model.norm.weight.data.fill_(3.0)
    method.encoder_loaded()
    assert model.norm.weight.unique().tolist() == [1.0]


def test_scores_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    scores, truth = generator.normal(size=200).round(1), generator.random(200) < 0.3
    assert average_precision(scores, truth) == pytest.approx(average_precision_score(truth, scores))
    predicted, known = generator.normal(size=(60, 2)), generator.normal(size=(60, 2))
    assert r_squared(predicted, known) == pytest.approx(r2_score(known, predicted))
    error = bootstrap_error(lambda found, _: float(found.mean()), generator.normal(size=(400, 1)), np.zeros((400, 1)))
    assert error == pytest.approx(1 / 20, rel=0.3)


TASKS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "one_label": ({"mixup": 0.2, "ema": 0.5, "label_smoothing": 0.05}, None, "top1"),
    "several_labels": (
        {"label": "what"},
        lambda place: field([["red", "warm"], ["green"], ["blue"]][place % 3]),
        "map",
    ),
    "numbers": ({"label": "what"}, lambda place: field([10.0 + place % 3, place % 2 * 0.0 + place % 3]), "r2"),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_measures_and_keeps_the_best(task: str, tmp_path: Path) -> None:
    settings, label, headline = TASKS[task]
    for split, number in (("train", 48), ("val", 30)):
        write_split(tmp_path, split, number, label, seed=len(split))
    config = config_of(
        tmp_path,
        tmp_path / "runs",
        {"task": task, "val_every_epochs": 2, **settings},
        train={"steps": 18, "batch_size": 12},
        optim={"lr": 4e-3, "lr_reference_batch": 12},
        checkpoint={"every_steps": 30},
        tracking={"log_every_steps": 8},
    )
    run = pretrain(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if f"val_{headline}" in row]
    assert [row["step"] for row in measured] == [8, 16, 18]
    assert measured[-1][f"val_{headline}"] > 0.9
    [path] = (run / "eval").glob("finetune-*.json")
    told = json.loads(path.read_text())
    assert told["networks"]["val"][headline] == measured[-1][f"val_{headline}"]
    assert told["networks"]["val"][f"{headline}_standard_error"] < 0.1
    name = "ema" if "ema" in settings else "val"
    assert told["best"]["score"] == max(row[f"{name}_{headline}"] for row in measured)
    classifier = load_classifier(run / "best")
    assert classifier.head_card.classes == tuple(told["classes"])
    assert load_classifier(run / "encoder").head_card == classifier.head_card
    if task == "numbers":
        card, red = classifier.card, torch.tensor(COLOURS[0]) / 255
        shown = ((red - torch.tensor(card.mean)) / torch.tensor(card.std)).view(1, 3, 1, 1).expand(1, 3, 32, 32)
        assert classifier(shown)[0].tolist() == pytest.approx([10.0, 0.0], abs=0.5)


def masked(place: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture of two colours side by side, and its mask of the levels 4 and 9; a strip is not judged."""
    noise = np.random.default_rng(place).integers(-30, 30, (32, 32, 3))
    edge = 8 + 4 * (place % 5)
    mask = np.where(np.arange(32) < edge, 4, 9)[None].repeat(32, axis=0).astype(np.uint8)
    colours = np.array([COLOURS[0], COLOURS[2]])[(mask == 9).astype(int)]
    mask[:3] = 255
    return (colours + noise).clip(0, 255).astype(np.uint8), mask


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_masked(folder: Path, split: str, number: int) -> None:
    with wds.TarWriter(str(folder / f"{split}-000000.tar")) as writer:
        for place in range(number):
            image, mask = masked(place)
            writer.write({"__key__": f"{split}{place:05d}", "png": png(image), "mask.png": png(mask)})


def test_a_run_learns_the_classes_of_pixels(tmp_path: Path) -> None:
    write_masked(tmp_path, "train", 40)
    write_masked(tmp_path, "val", 15)
    config = config_of(
        tmp_path,
        tmp_path / "runs",
        {"task": "segmentation"},
        train={"steps": 20, "batch_size": 8},
        optim={"lr": 4e-3, "lr_reference_batch": 8},
        tracking={"log_every_steps": 20},
    )
    run = pretrain(config)
    told = json.loads((run / "eval" / "finetune-00000020.json").read_text())
    assert told["classes"] == ["4", "9"]
    assert told["networks"]["val"]["miou"] > 0.7
    assert told["networks"]["val"]["miou_standard_error"] < 0.1
    assert 0 < told["chance"] < told["networks"]["val"]["miou"]
    classifier = load_classifier(run / "encoder")
    assert classifier(torch.zeros(2, 3, 32, 32)).shape == (2, 2, 32, 32)


def test_every_judged_pixel_of_the_global_batch_weighs_the_same(tmp_path: Path) -> None:
    write_masked(tmp_path, "train", 8)
    config = config_of(tmp_path, tmp_path / "runs", {"task": "segmentation"})
    method, batch = build(config), random_batch(config, 4)
    batch["masks"] = torch.from_numpy(np.stack([masked(place)[1].astype(np.int32) for place in range(4)]))
    batch["masks"][0, :30] = -1
    batch["masks"][batch["masks"] == 255] = -1
    method.before_step(0, [batch], lambda batch: None)
    whole = method(batch, 0)["loss"]
    halves = [part_of(batch, slice(0, 2)), part_of(batch, slice(2, 4))]
    method.before_step(0, halves, lambda batch: None)
    torch.testing.assert_close(sum(method(half, 0)["loss"] for half in halves) / 2, whole)


def test_masks_that_cannot_be_learned_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 12)
    with pytest.raises(ValueError, match=r"all of 12 samples .* have no mask"):
        pretrain(config_of(tmp_path, tmp_path / "runs", {"task": "segmentation"}))
    with pytest.raises(
        ConfigError, match=r"label_smoothing, mixup and erasing: set method.label_smoothing=0 method.mi"
    ):
        config_of(tmp_path, tmp_path, {"task": "segmentation", "mixup": 0.8, "label_smoothing": 0.1, "erasing": 0.2})


def test_images_without_a_mask_are_left_out_and_counted(tmp_path: Path) -> None:
    """By the index, so that no batch has one; masks keep the names that they were packed with."""
    for split in ("train", "val"):
        with wds.TarWriter(str(tmp_path / f"{split}-000000.tar")) as writer:
            for place in range(12):
                image, mask = masked(place)
                beside = {} if place % 4 == 1 else {"mask.png": png(mask)}
                writer.write({"__key__": f"{split}{place:05d}", "png": png(image), **beside})
    (tmp_path / "dataset.json").write_text(json.dumps({"mask_names": {"4": "sky", "9": "tree"}}))
    config = config_of(tmp_path, tmp_path / "runs", {"task": "segmentation"})
    (train,) = training_datasets(config)
    assert train.index.keys == tuple(f"train{place:05d}" for place in range(12) if place % 4 != 1)
    whole = open_dataset(tmp_path)
    for place, sample in enumerate([0, 2, 3, 4]):
        assert train.read(place).image == whole.read(sample).image
        assert train.read_beside(place, "mask") == whole.read_beside(sample, "mask")
    assert train.checksum != whole.checksum
    assert only(whole, np.ones(12, dtype=bool)).checksum == whole.checksum
    labels = read_labels(config)
    assert labels.space.classes == ("sky", "tree")
    assert labels.val is not None
    assert labels.val.dataset.num_samples == 9
    told = data_lines(config, [train])
    assert [line.partition(" samples")[0] for line in told] == ["3 of 12", "3 of 12"]
    assert "no mask, such as train00001, and are left out" in told[0]


@pytest.mark.parametrize("method", [{}, {"label": "what"}, {"label": "what", "task": "numbers"}])
def test_images_without_a_label_are_left_out(method: dict[str, Any], tmp_path: Path) -> None:
    def label(place: int) -> dict[str, Any]:
        beside = {} if place == 2 or not method else field(None if place == 5 else f"{place % 3}")
        return beside | ({"cls": str(place % 3)} if place not in (2, 5) else {})

    write_split(tmp_path, "train", 12, label)
    config = config_of(tmp_path, tmp_path / "runs", method)
    labels, (train,) = read_labels(config), training_datasets(config)
    assert train.num_samples == len(labels.train[0].values) == 10
    assert "2 of 12 samples" in data_lines(config, [train])[0]
    values = labels.train[0].values.reshape(-1)
    if "task" in method:
        values = values * labels.space.std[0] + labels.space.mean[0]
    assert np.allclose(values, [place % 3 for place in range(12) if place not in (2, 5)])


WRONG: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no labels": (lambda place: {}, None, {}, "all of 12 samples .* no .cls"),
    "one class": (lambda place: {"cls": "7"}, None, {}, "one class, 7"),
    "only in val": (None, lambda place: {"cls": str(place % 4)}, {}, "1 class of .* in no training image: 3 .3 images"),
    "no field": (None, None, {"label": "what"}, "no 'what'"),
    "each its own": (field, None, {"label": "what"}, "a class of its own"),
    "a list": (lambda place: field([place % 2]), None, {"label": "what"}, "task=several_labels"),
    "no list": (lambda place: field("a"), None, {"label": "what", "task": "several_labels"}, "task=one_label"),
    "fractions": (lambda place: field(place / 2), None, {"label": "what"}, "task=numbers"),
    "no numbers": (
        lambda place: field("a"),
        None,
        {"label": "what", "task": "numbers"},
        "not a number .*what of sample",
    ),
    "ragged": (lambda place: field([1] * (1 + place % 2)), None, {"label": "what", "task": "numbers"}, "equally many"),
    "nan": (lambda place: field(float("nan")), None, {"label": "what", "task": "numbers"}, "what of .* nan, no finite"),
    "constant": (lambda place: field(3), None, {"label": "what", "task": "numbers"}, "the same number"),
    "other count": (
        lambda place: field([place, 1 - place]),
        lambda place: field(place),
        {"label": "what", "task": "numbers"},
        "1 numbers each, and those of training 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_that_cannot_be_learned_are_refused_at_once(case: str, tmp_path: Path) -> None:
    train, val, method, message = WRONG[case]
    write_split(tmp_path, "train", 12, train)
    write_split(tmp_path, "val", 12, val or train)
    with pytest.raises(ValueError, match=message):
        pretrain(config_of(tmp_path, tmp_path / "runs", method))
    assert not (tmp_path / "runs").exists()


def test_sparse_labels_become_dense(tmp_path: Path) -> None:
    write_split(tmp_path, "train", 12, lambda place: {"cls": str(300000 * (place % 4))})
    labels = read_labels(config_of(tmp_path, tmp_path))
    assert labels.space.classes == ("0", "300000", "600000", "900000")
    assert labels.train[0].rows(np.arange(5), 4).tolist() == [0, 1, 2, 3, 0]
    assert labels.val is None


def test_a_field_of_several_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split(tmp_path, "train", 4, lambda place: field([[], ["b", "a", "b"], ["c"], ["a"]][place]))
    config = config_of(tmp_path, tmp_path, {"label": "what", "task": "several_labels"})
    read_labels(config)
    monkeypatch.setattr("data_pipelines.datasets.dataset.Dataset.read_metadata", None)
    labels = read_labels(config)  # each file is read once
    assert labels.space.classes == ("a", "b", "c")
    wanted = [[0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert labels.train[0].rows(np.arange(4), 3).tolist() == wanted


def test_settings_that_contradict_each_other(shards: Path, tmp_path: Path) -> None:
    for method, message in (
        ({"task": "numbers"}, "label=FIELD"),
        ({"lora": {}, "train_blocks": 1}, "one of them"),
        ({"task": "numbers", "label": "x", "cutmix": 1.0}, "cutmix"),
        ({"fc_norm": True, "pool": "class"}, "fc_norm=false"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(shards, tmp_path, method)
    with pytest.raises(ConfigError, match="zero_stage"):
        config_of(shards, tmp_path, engine={"zero_stage": 3})


def test_who_says_the_most_frequent_class_of_pixels_everywhere_has_some_overlap() -> None:
    counts = np.array([[90.0, 0, 0, 100, 0, 0, 90, 10, 0]])  # right, taken for, of: of three classes, the last nowhere
    assert blind_overlap(np.array([90.0, 10, 0])) == pytest.approx(mean_overlap(counts, counts)) == 0.45
    assert blind_overlap(np.zeros(2)) == 0
