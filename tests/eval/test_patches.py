"""Patches against pixels, compared with loops over both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from data_pipelines import eval_maps
from eval.base import IGNORED
from eval.patches import Levels, draw_places, means, overlaps, padded, pixel_classes, shares

GRID = (2, 3)


def random_masks(classes: int, num: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(classes, (num, 8, 12), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.2] = IGNORED
    masks[0, :4, :4] = IGNORED  # a whole patch
    return masks


def test_what_is_ignored_is_the_same_wherever_masks_come_from() -> None:
    assert eval_maps.IGNORED == IGNORED


def test_shares_are_counts_of_pixels() -> None:
    masks = random_masks(5)
    found = shares(masks, GRID, 5)
    for image in range(4):
        for place in range(6):
            row, column = divmod(place, 3)
            patch = masks[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().tolist()
            judged = [level for level in patch if level != IGNORED]
            expected = [judged.count(level) / len(judged) if judged else 0.0 for level in range(5)]
            assert found[image, place].tolist() == pytest.approx(expected)
    assert found[0, 0].sum() == 0


def test_means_are_of_what_is_known() -> None:
    numbers = torch.arange(96.0).view(1, 8, 12)
    numbers[0, 0, 0] = float("nan")
    numbers[0, 4:, 8:] = float("nan")
    found = means(numbers, GRID)
    assert found[0, 0] == pytest.approx(numbers[0, :4, :4].flatten()[1:].mean().item())
    assert found[0, 5].isnan()
    with pytest.raises(ValueError, match="masks of 12x8 px do not divide into 5x2 patches"):
        means(numbers, (2, 5))


def test_overlaps_are_intersections_and_unions() -> None:
    masks, predicted = random_masks(4), random_masks(4, seed=1).clamp_min(0)
    found = overlaps(predicted, masks, 6)
    for image in range(4):
        judged = masks[image] != IGNORED
        for level in range(6):
            is_it, said = (values[image] == level for values in (masks, predicted))
            expected = [(is_it & said & judged).sum().item(), ((is_it | said) & judged).sum().item()]
            assert found[image, level].tolist() == expected


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_pixels_get_the_class_of_the_interpolated_logits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.patches._AT_ONCE", at_once)
    logits = torch.randn(3, 6, 5)
    maps = torch.stack([logits[:, place] for place in range(6)], dim=2).unflatten(2, GRID)
    expected = torch.stack([F.interpolate(one[None], (8, 12), mode="bilinear")[0].argmax(0) for one in maps])
    assert torch.equal(pixel_classes(logits, GRID, (8, 12)), expected)
    at_middle = pixel_classes(logits, GRID, (2, 3))
    assert torch.equal(at_middle.flatten(1), logits.argmax(dim=2))


def test_classes_are_numbered_as_they_come() -> None:
    levels = Levels()
    first = levels.numbered(torch.tensor([[[900, 7], [IGNORED, 7]]]))
    assert [levels.levels[number] if number >= 0 else IGNORED for number in first.flatten().tolist()] == [900, 7, -1, 7]
    second = levels.numbered(torch.tensor([[[3, 900]]]))
    assert [levels.levels[number] for number in second.flatten().tolist()] == [3, 900]
    assert len(levels) == 3
    joined = padded([torch.ones(2, 2), torch.ones(1, 3)], 3, 1)
    assert joined.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_patches_are_drawn_without_repetition() -> None:
    places = draw_places(torch.full((50,), 16), 200, torch.Generator().manual_seed(0))
    assert len(places) == 50
    assert all(len(set(row.tolist())) == 4 == len(row) for row in places)
    counts = torch.tensor([3, 16, 1])
    assert [sorted(row.tolist()) for row in draw_places(counts, 10_000, torch.Generator())] == [
        list(range(count)) for count in counts.tolist()
    ]
    assert [len(row) for row in draw_places(counts, 7, torch.Generator())] == [2, 2, 1]
