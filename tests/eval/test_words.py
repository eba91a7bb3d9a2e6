"""Probes of words: classes by their names, captions and images by each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import FeatureSet, Store
from eval.probes import image_text, zero_shot
from eval.words import read_prompts

NAMES = ("cat", "dog", "owl")


class Words:
    """Texts that name a direction lie on it; images are where they are."""

    def of_images(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled, dim=1)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [[float(name in text) for name in NAMES] + [0.1 * len(text) % 0.3] for text in texts]
        return F.normalize(torch.tensor(rows), dim=1)


def store(labels: list[int], directions: list[int], names: tuple[str, ...] = NAMES) -> Store:
    values = F.one_hot(torch.tensor(directions), 4).float() * 3
    count = torch.arange(len(labels))
    val = FeatureSet({"mean": values}, "mean", torch.tensor(labels), count, count)
    return Store(val, val, 3, "mean", class_names=names, text=Words())


def test_a_class_is_told_by_its_name() -> None:
    found = zero_shot.run(store([0, 1, 2, 2], [0, 1, 2, 0]), zero_shot.ZeroShotSettings())
    assert found["top1"] == 0.75
    assert found["recall"] == {"cat": 1.0, "dog": 1.0, "owl": 0.5}
    assert [column.name for column in zero_shot.columns(found, "mean")] == ["zero_shot"]
    numbered = store([0, 1, 2, 2], [0, 1, 2, 0], ("0", "1", "2"))
    settings = zero_shot.ZeroShotSettings(("see {}",), tuple(zip("012", NAMES, strict=True)))
    assert zero_shot.run(numbered, settings)["top1"] == 0.75
    assert "see {}" in zero_shot.notes(found | {"templates": 1}, settings)[0]


def test_a_row_without_words_has_no_number() -> None:
    without = replace(store([0, 1], [0, 1]), text=None)
    for probe in (zero_shot, image_text):
        assert probe.run(without, probe.SPEC.settings()) == {}
        assert probe.columns({}, "mean") == []
        assert probe.notes({}, probe.SPEC.settings()) == []


def test_captions_and_images_find_each_other() -> None:
    texts = {0: ("a cat",), 1: ("a dog", "the dog"), 2: ("an owl",), 3: ("a cat",)}
    given = replace(store([0, 1, 2, 0], [0, 1, 2, 1]), captions=lambda sample: texts[sample])
    found = image_text.run(given, image_text.ImageTextSettings())
    assert found["captions"] == 4
    assert found["to_text"]["1"]["value"] == 0.75  # image 3 looks like a dog, and is called a cat
    assert found["to_text"]["5"]["value"] == 1.0
    assert found["to_image"]["10"]["value"] == 1.0
    assert found["to_image"]["1"]["value"] <= 0.75  # of the two that look like dogs one at most is first
    assert found["blind"] == pytest.approx(5 / 4 / 4)
    assert len(image_text.columns(found, "mean")) == 6
    some = image_text.run(given, image_text.ImageTextSettings(most=2))
    assert (some["images"], some["of"]) == (2, 4)


def test_what_is_as_near_but_not_ones_own_comes_first() -> None:
    same = F.normalize(torch.ones(3, 2), dim=1)
    assert image_text.places(same, same, [[0], [1, 2], [0, 1, 2]]).tolist() == [2, 1, 0]


def test_prompts_are_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"templates": ["see {}"], "names": {"7": "seven"}}))
    assert read_prompts(file) == {"templates": ("see {}",), "names": (("7", "seven"),)}
    for wrong in ("[", "[]", "{}", '{"templates": ["none"]}', '{"names": {"a": 3}}', '{"words": {}}'):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"prompts\.json"):
            read_prompts(file)
