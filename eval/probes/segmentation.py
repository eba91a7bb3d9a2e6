"""What a frozen encoder's patches know of the class of each pixel: a linear layer, and the nearest patches of train.

After DINOv2 (Oquab et al. 2023, section 7.4) and CAPI (Darcet et al. 2025): the features of patches are frozen, a
linear layer learns the classes that lie in each, and its logits, between patches bilinear, are judged pixel by pixel at
the size of the crops. A larger size (`--image-size`) gives finer patches. The nearest patches are those of a bank drawn
from train, as in Hummingbird (Balazevic et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from eval.base import Column, NativeTokens, ProbeSpec, Scores, Store
from eval.mask_pictures import examples, told_classes
from eval.outcomes import Outcome, scored
from eval.patch_heads import Head, Standard, fit_linear, knn_heads, linear_head
from eval.patches import (
    AnyMasks,
    AnyTokens,
    Drawn,
    Levels,
    batches,
    beside,
    draw_images,
    draw_places,
    overlaps,
    padded,
    patch_counts,
    pixel_classes,
    shares,
    taken,
)
from eval.stratified import stratified_split

_Name = TypeVar("_Name", str, float)
MOST_CLASSES = 1000  # more levels are no classes
_MOST_NAMED, _MOST_CLASSES_NAMED = 5, 12


@dataclass(frozen=True)
class SegmentationSettings:
    """How many images and patches are looked at, and what is tried; `full`: of train and val all images."""

    patches: int = 40_000  # of train, from which the linear layer learns
    bank: int = 6_000  # of these, which the nearest are looked for among
    train_images: int = 2000  # from which they are drawn
    val_images: int = 500  # that are judged
    chosen_on: int = 100  # at most, of those of train: they choose strength and k
    held_out: float = 0.2  # share of train's images from which these are
    strengths: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5)  # of the linear layer's regularisation
    ks: tuple[int, ...] = (10, 30, 100)
    temperature: float = 0.07
    full: bool = False

    def __post_init__(self) -> None:
        if min(self.patches, self.bank, self.train_images, self.val_images, self.chosen_on, *self.ks) < 1:
            raise ValueError(f"a segmentation probe needs patches and images; got {self}")


def run(store: Store, settings: SegmentationSettings) -> Scores:
    """Of `linear` and `knn`: mean intersection over union, the share of pixels that are right, and each class's."""
    tokens, masks = beside(store.train, store.train.masks, "masks", "train")
    val_tokens, val_masks = beside(store.val, store.val.masks, "masks", "val")
    generator = torch.Generator().manual_seed(store.seeds[0])
    images = draw_images(masks.rows, None if settings.full else settings.train_images, generator)
    val_images = draw_images(val_masks.rows, None if settings.full else settings.val_images, generator)
    levels = Levels()
    store.progress("segmentation: patches of train")
    drawn = draw(tokens, masks, images, levels, settings.patches, generator)
    if len(levels) < 2:
        raise ValueError(
            f"the masks of {len(images):,} train images hold one class only ({', '.join(map(str, levels.levels))}); "
            "there is nothing to tell apart. `selfsight data show` shows them"
        )
    groups = None if store.train.groups is None else store.train.groups[images]
    kept, rest = (images[part] for part in _parts(len(images), groups, settings.held_out, store.seeds[0]))
    rest = draw_images(rest, settings.chosen_on, generator)
    standard = Standard.of(drawn.features)

    def best(heads: dict[float, Head]) -> tuple[float, float]:
        found = judge(heads, tokens, masks, rest, levels)
        scores = {setting: Outcome("mean_iou", counts).number() for setting, counts in found.items()}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError(
                f"nothing is known of any pixel of the {len(rest):,} train images that a head is chosen on; give more "
                "masks with classes"
            )
        chosen = max(scores, key=scores.__getitem__)  # of equals the first
        return chosen, scores[chosen]

    heads: dict[str, Head] = {}
    told: Scores = {}
    for name, make in (("linear", _linear), ("knn", _knn)):
        store.progress(f"segmentation: {name}")
        heads[name], told[name] = make(drawn, kept, standard, settings, store.device, best)
    store.progress(f"segmentation: {len(val_images):,} val images")
    num_known = len(levels)
    found = judge({**heads, "most_frequent": _always(drawn)}, val_tokens, val_masks, val_images, levels)
    if not found["most_frequent"].any():
        raise ValueError(f"nothing is known of any pixel of the masks of {len(val_images):,} val images")
    groups = None if store.val.groups is None else store.val.groups[val_images]
    rows = torch.empty(0) if len(val_images) == len(val_tokens) else val_images
    result: Scores = {
        "num_train": len(images), "num_val": len(val_images), "patches": len(drawn.features),
        "without_mask": len(tokens) - len(masks.rows) + len(val_tokens) - len(val_masks.rows),
        **_shape(val_tokens, val_masks, val_images),
        "classes": sorted(levels.levels), "unknown": sorted(levels.levels[num_known:]),
        "chance": _scores(found.pop("most_frequent"), None, None),
    }  # fmt: skip
    if store.mask_names:
        result["names"] = {str(each): store.mask_names[each] for each in result["classes"] if each in store.mask_names}
    if store.show is not None:
        painted = examples(heads, found["linear"], val_tokens, val_masks, val_images, levels, store.mask_names)
        store.show("segmentation", painted)
    for name, counts in found.items():
        result[name] = {**told[name], **_scores(counts, rows, groups), "of_class": _of_class(counts, levels)}
    return result


def _shape(tokens: AnyTokens, masks: AnyMasks, images: Tensor) -> Scores:
    """How large masks and maps of patches are, or the most patches of images at their own shape."""
    if isinstance(tokens, NativeTokens):
        return {"native": int(patch_counts(tokens, images).max())}
    first = next(batches(tokens, masks, images[:1]))
    return {"size": list(first.size), "grid": list(first.grid)}


def draw(
    tokens: AnyTokens, masks: AnyMasks, images: Tensor, levels: Levels, most: int, generator: torch.Generator
) -> Drawn:
    """About `most` patches of these images in random order, and the shares of the classes in each; `levels` grows."""
    places = draw_places(patch_counts(tokens, images), most, generator)
    features, targets, first = [], [], 0
    for part in batches(tokens, masks, images):
        chosen = places[first : first + len(part.rows)]
        numbered = levels.numbered(part.masks)
        if len(levels) > MOST_CLASSES:
            raise ValueError(
                f"the masks hold more than {MOST_CLASSES} classes, such as {levels.levels[-1]}; numbers, such as "
                "depths, are packed by --depths and probed by `depth`"
            )
        features.append(part.at(chosen))
        targets.append(taken(shares(numbered, part.grid, max(len(levels), 1)), chosen))
        first += len(part.rows)
    of_image = torch.tensor([len(chosen) for chosen in places])
    order = torch.randperm(int(of_image.sum()), generator=generator)
    joined = padded(targets, max(len(levels), 1), 1)[order]
    judged = joined.sum(dim=1) > 0
    owners = images.repeat_interleave(of_image)[order]
    return Drawn(torch.cat(features)[order][judged].float(), joined[judged], owners[judged])


def judge(
    heads: dict[_Name, Head], tokens: AnyTokens, masks: AnyMasks, images: Tensor, levels: Levels
) -> dict[_Name, Tensor]:
    """By head, `overlaps` of these images: (m, classes, 2) int64. What `levels` did not know is a class, too."""
    found: dict[_Name, list[Tensor]] = {name: [] for name in heads}
    for part in batches(tokens, masks, images):
        numbered = levels.numbered(part.masks)
        for name, head in heads.items():
            predicted = pixel_classes(head(part.tokens), part.grid, part.size)
            found[name].append(overlaps(predicted, numbered, len(levels)))
    return {name: padded(parts, len(levels), 1) for name, parts in found.items()}


_Best = Callable[[dict[float, Head]], tuple[float, float]]  # heads by setting -> the best setting, and how good it is


def _linear(
    drawn: Drawn, kept: Tensor, standard: Standard, settings: SegmentationSettings, device: str, best: _Best
) -> tuple[Head, Scores]:
    whole = Drawn(standard(drawn.features), drawn.targets, drawn.images)
    part, weights = whole.of(kept), None
    ends: dict[float, Tensor] = {}
    for strength in sorted(settings.strengths, reverse=True):  # each solution starts the next, weaker one
        weights = ends[strength] = fit_linear(part, strength, device, start=weights)
    chosen, held_out = best({strength: linear_head(end, standard, device) for strength, end in ends.items()})
    weights = fit_linear(whole, chosen, device, start=ends[chosen])
    told = {"strength": chosen, "held_out": held_out, "at_grid_edge": _at_edge(chosen, settings.strengths)}
    return linear_head(weights, standard, device), told


def _knn(
    drawn: Drawn, kept: Tensor, standard: Standard, settings: SegmentationSettings, device: str, best: _Best
) -> tuple[Head, Scores]:
    part, whole = drawn.of(kept).first(settings.bank), drawn.first(settings.bank)
    heads = knn_heads(part, settings.ks, settings.temperature, device)
    chosen, held_out = best({float(k): head for k, head in heads.items()})
    k = int(chosen)
    told = {"k": k, "held_out": held_out, "bank": len(whole.features)}
    return knn_heads(whole, (k,), settings.temperature, device)[k], told


def _at_edge(chosen: float, grid: tuple[float, ...]) -> bool:
    return len(grid) > 1 and chosen in (min(grid), max(grid))


def _always(drawn: Drawn) -> Head:
    """The most frequent class of train's pixels, everywhere."""
    counts = drawn.targets.sum(dim=0)

    def head(features: Tensor) -> Tensor:
        return counts.expand(*features.shape[:2], -1)

    return head


def _parts(num: int, groups: Tensor | None, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of images that heads learn from and of those that choose: no group in both."""
    if num < 2:
        raise ValueError("train has one image with a mask; a head is chosen on others than it learns from: give more")
    return stratified_split(torch.zeros(num, dtype=torch.int64), share, seed, groups)


def _scores(counts: Tensor, rows: Tensor | None, groups: Tensor | None) -> Scores:
    """`iou` and `pixels`, the share that is right; with errors and outcomes where `rows` says of which images."""
    both, judged = counts[..., 0].sum(dim=1), _judged(counts)
    outcomes = {"iou": ("mean_iou", counts), "pixels": ("ratio", torch.stack([both, judged], dim=1))}
    if rows is None:
        return {name: Outcome(statistic, values).number() for name, (statistic, values) in outcomes.items()}
    return {
        name: scored(Outcome(statistic, values, rows=rows), groups=groups)
        for name, (statistic, values) in outcomes.items()
    }


def _judged(counts: Tensor) -> Tensor:
    """(m,) int64 pixels of each image: of each class those that are it and those said to be it, so each pixel twice."""
    return (counts[..., 0] + counts[..., 1]).sum(dim=1) // 2


def _of_class(counts: Tensor, levels: Levels) -> Scores:
    """Intersection over union of each class by its level, None where val has none of it and none was said."""
    both, either = counts.sum(dim=0).unbind(1)
    return {
        str(levels.levels[place]): float(both[place] / either[place]) if either[place] else None
        for place in sorted(range(len(levels)), key=levels.levels.__getitem__)
    }


def columns(result: Scores, headline: str) -> list[Column]:
    """The mean of the classes, and the share of pixels with the notes."""
    chance = result["chance"]
    return [
        Column(f"segmentation_{name}_{number}", f"{title} {what}", ((name, number),), key="value",
               chance=chance[number], headline=number == "iou", more=number == "pixels")
        for name, title in (("linear", "linear seg."), ("knn", "k-NN seg."))
        for number, what in (("iou", "mIoU"), ("pixels", "pixels"))
    ]  # fmt: skip


def notes(result: Scores, settings: SegmentationSettings) -> list[str]:
    """What was judged, and how the heads were chosen."""
    linear, knn = result["linear"], result["knn"]
    where = f"at their own shape from up to {result['native']} patches" if "native" in result else ""
    if not where:
        (height, width), grid = result["size"], result["grid"]
        where = f"at {width}x{height} px from {grid[1]}x{grid[0]} patches"
    lines = [
        f"segmentation: {len(result['classes'])} classes {where}, {result['num_val']:,} val images; linear on "
        f"{result['patches']:,} patches of {result['num_train']:,} train images, strength {linear['strength']:g}; "
        f"k-NN: k = {knn['k']} of {knn['bank']:,} patches"
    ]
    told = told_classes(linear["of_class"], result.get("names", {}))
    more = f" (the worst {_MOST_CLASSES_NAMED} of {len(told)})" if len(told) > _MOST_CLASSES_NAMED else ""
    lines.append(f"segmentation: IoU of the classes, linear: {', '.join(told[:_MOST_CLASSES_NAMED])}{more}")
    if result["without_mask"]:
        lines.append(f"warning: {result['without_mask']:,} images have no mask and are left out of segmentation")
    if linear["at_grid_edge"]:
        lines.append(f"warning: the segmentation's strength {linear['strength']:g} lies at the edge of its grid")
    if result["unknown"]:
        told = ", ".join(map(str, result["unknown"][:_MOST_NAMED]))
        lines.append(f"warning: val's masks have classes that train's have not: {told}; they count as wrong")
    return lines


SPEC = ProbeSpec(
    "segmentation", run, columns, SegmentationSettings, needs="tokens", labels="mask", notes=notes, native=True
)
