"""Robustness: heads that learned from clean images, tried on corrupted and on turned ones.

The heads are ridge classification, which stands for the whole, and k nearest neighbours; both on the headline feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.corruptions import CORRUPTIONS, STRENGTHS, corrupted, rotated
from eval.base import Change, Column, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, scored
from eval.probes.knn import knn_ranks
from eval.ridge import ridge_probe

HEADS = ("ridge", "knn")


@dataclass(frozen=True)
class RobustnessSettings:
    """How many val images are tried, drawn by the first seed, of each corruption at each strength: all, with `full`.

    rotations: in degrees; those that are no right angle go to the left or to the right, drawn for each image.
    """

    full: bool = False
    images: int = 500
    strengths: tuple[int, ...] = STRENGTHS
    rotations: tuple[int, ...] = (15, 30, 90, 180, 270)
    k: int = 20
    held_out: float = 0.1


def run(store: Store, settings: RobustnessSettings) -> Scores:
    """Accuracy on clean images, on each corruption (the mean over its strengths), on all of them, on each turn."""
    train, val, name, seed = store.train, store.val, store.headline, store.seeds[0]
    rows = torch.arange(len(val.labels))
    if not settings.full and settings.images < len(rows):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(rows), generator=generator)[: settings.images].sort().values
    labels, groups = val.labels[rows], None if val.groups is None else val.groups[rows]
    known = train.inputs[name].to(store.device)
    ridge = ridge_probe(
        {name: train.inputs[name]}, F.one_hot(train.labels, store.num_classes).float(), {name: val.inputs[name][rows]},
        by=train.labels, good=_accuracy, groups=train.groups, held_out=settings.held_out, seed=seed,
        device=store.device, progress=store.progress,
    )  # fmt: skip

    def right(features: Tensor) -> dict[str, Tensor]:
        """(m,) of each head whether it is right."""
        ranks = knn_ranks(
            known, train.labels, features, labels, num_classes=store.num_classes, ks=(min(settings.k, len(known)),)
        )  # fmt: skip
        (rank,) = ranks.values()
        return {"ridge": (ridge.predict(features).argmax(dim=1) == labels).float(), "knn": (rank < 1).float().cpu()}

    def told(values: Tensor) -> Scores:
        return scored(Outcome("mean", values, rows=rows), groups=groups)

    def means(found: list[dict[str, Tensor]]) -> Scores:
        return {head: told(torch.stack([each[head] for each in found]).mean(dim=0)) for head in HEADS}

    result: Scores = {
        "input": name,
        "images": len(rows),
        "of": len(val.labels),
        "clean": {head: told(values) for head, values in right(val.inputs[name][rows]).items()},
        "corruption": {},
        "rotation": {},
    }
    every: list[dict[str, Tensor]] = []
    for kind, strengths in _variants(settings, seed):
        found = []
        for strength, change in strengths:
            store.progress(f"robustness: {kind} {strength}")
            found.append(right(store.again(change, False, val.ids[rows]).inputs[name]))
        if kind == "rotation":
            result["rotation"] = {
                str(degrees): {head: told(values) for head, values in each.items()}
                for (degrees, _), each in zip(strengths, found, strict=True)
            }
            continue
        every += found
        result["corruption"][kind] = {
            **means(found),
            "of_strength": {
                str(strength): {head: float(values.mean()) for head, values in each.items()}
                for (strength, _), each in zip(strengths, found, strict=True)
            },
        }
    result["mean"] = means(every)
    return result


def _variants(settings: RobustnessSettings, seed: int) -> Iterator[tuple[str, list[tuple[int, Change]]]]:
    """Each corruption with what changes images at each strength; last `rotation` with its degrees."""
    for name in CORRUPTIONS:
        change = partial(corrupted, name=name, seed=seed)
        yield name, [(strength, partial(change, strength=strength)) for strength in settings.strengths]
    yield "rotation", [(degrees, partial(rotated, degrees=degrees, seed=seed)) for degrees in settings.rotations]


def _accuracy(predicted: Tensor, targets: Tensor) -> float:
    return float((predicted.argmax(dim=1) == targets.argmax(dim=1)).float().mean())


def columns(result: Scores, headline: str) -> list[Column]:
    """Clean beside the mean over all corruptions; each corruption and turn for those who look."""
    found = [
        Column("robustness_clean", "clean", (("clean", "ridge"),), headline=False, key="value"),
        Column("robustness", "corrupted", (("mean", "ridge"),), key="value"),
        Column("robustness_knn_clean", "clean, k-NN", (("clean", "knn"),), headline=False, key="value", more=True),
        Column("robustness_knn", "corrupted, k-NN", (("mean", "knn"),), headline=False, key="value", more=True),
    ]
    for kind in result["corruption"]:
        title = kind.replace("_", " ")
        path = (("corruption", kind, "ridge"),)
        found.append(Column(f"robustness_{kind}", title, path, headline=False, key="value", more=True))
    for degrees in result["rotation"]:
        path = (("rotation", degrees, "ridge"),)
        title = f"turned by {degrees}°"
        found.append(Column(f"robustness_rotation_{degrees}", title, path, headline=False, key="value", more=True))
    return found


def notes(result: Scores, settings: RobustnessSettings) -> list[str]:
    """On which images, and what hurts most."""
    which = "all" if result["images"] == result["of"] else f"{result['images']:,} of {result['of']:,}"
    clean = result["clean"]["ridge"]["value"]
    lost = sorted((clean - each["ridge"]["value"], kind) for kind, each in result["corruption"].items())
    worst = ", ".join(f"{kind.replace('_', ' ')} {100 * by:.1f}" for by, kind in reversed(lost[-3:]))
    return [
        f"robustness: ridge on {result['input']} of clean train images, tried on {which} held-out images; corrupted: "
        f"the mean of {len(lost)} corruptions at {len(settings.strengths)} strengths (lengths as shares of the side). "
        f"Most points are lost to {worst}"
    ]


SPEC = ProbeSpec(
    "robustness", run, columns, RobustnessSettings, needs="encoder", labels=("class", "grade"), notes=notes, costly=True
)
