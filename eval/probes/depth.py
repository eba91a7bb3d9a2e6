"""What a frozen encoder's patches know of a number at each pixel, such as depth or height: ridge regression.

The mean of what is known of each patch is predicted from its feature by a linear layer in closed form, whose strength
is chosen on held-out images of train. A larger size (`--image-size`) gives finer patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.base import Column, FeatureSet, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, scored
from eval.patches import Drawn, batches, beside, draw_images, draw_places, means, patch_counts, taken
from eval.ridge import STRENGTHS, explained, ridge_probe

TITLES = {"r2": "depth R2", "mae": "depth MAE", "rmse": "depth RMSE"}


@dataclass(frozen=True)
class DepthSettings:
    """How many images and patches are looked at; `full`: all images of train and val."""

    patches: int = 40_000  # of train, and as many of val
    train_images: int = 2000  # from which they are drawn
    val_images: int = 500
    held_out: float = 0.2  # share of train's images that choose the strength
    full: bool = False

    def __post_init__(self) -> None:
        if min(self.patches, self.train_images, self.val_images) < 1:
            raise ValueError(f"a depth probe needs patches and images; got {self}")


def run(store: Store, settings: DepthSettings) -> Scores:
    """R2, mean absolute error and root mean square error over val's patches, in the units of the data set."""
    generator = torch.Generator().manual_seed(store.seeds[0])
    store.progress("depth: patches of train and val")
    train = _draw(store.train, "train", settings.train_images, settings, generator)
    val = _draw(store.val, "val", settings.val_images, settings, generator)
    middle = train.targets.mean()
    if not float((train.targets - middle).abs().max()) > 0:
        raise ValueError(f"every patch of train has the depth {float(middle):g}; there is nothing to predict")
    groups = train.images if store.train.groups is None else store.train.groups[train.images]
    fit = ridge_probe(
        {"tokens": train.features}, (train.targets - middle)[:, None], {"tokens": val.features},
        by=torch.zeros(len(groups), dtype=torch.int64), good=explained, groups=groups, strengths=STRENGTHS,
        held_out=settings.held_out, seed=store.seeds[0], device=store.device, progress=store.progress,
    )  # fmt: skip
    images, of_image = val.images.unique(return_inverse=True)
    val_groups = None if store.val.groups is None else store.val.groups[images]

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(images), dtype=torch.float64).index_add_(0, of_image, values.double())

    targets = val.targets - middle
    errors = fit.predicted[:, 0].cpu() - targets
    count = summed(torch.ones_like(targets))
    values = {
        "r2": ("pooled_r2", [count, summed(targets), summed(targets.square()), summed(errors.square())]),
        "mae": ("ratio", [summed(errors.abs()), count]),
        "rmse": ("root_ratio", [summed(errors.square()), count]),
    }
    if not targets.max() > targets.min():
        del values["r2"]  # of one depth everywhere it is not defined
    result: Scores = {
        name: scored(Outcome(statistic, torch.stack(columns, dim=1), rows=images), groups=val_groups)
        for name, (statistic, columns) in values.items()
    }
    away = targets.abs()  # from what train says blindly
    return {
        **result, "strength": fit.strength, "held_out": fit.held_out, "at_grid_edge": fit.at_grid_edge,
        "num_train": len(train.images.unique()), "num_val": len(images), "patches": len(train.targets),
        "chance": {"r2": 0.0, "mae": float(away.mean()), "rmse": float(away.square().mean().sqrt())},
    }  # fmt: skip


def _draw(
    features: FeatureSet, split: str, most_images: int, settings: DepthSettings, generator: torch.Generator
) -> Drawn:
    """Patches of which something is known, and the mean of that."""
    tokens, depths = beside(features, features.depths, "depths", split)
    images = draw_images(depths.rows, None if settings.full else most_images, generator)
    places = draw_places(patch_counts(tokens, images), settings.patches, generator)
    values, targets, first = [], [], 0
    for part in batches(tokens, depths, images):
        chosen = places[first : first + len(part.rows)]
        values.append(part.at(chosen))
        targets.append(taken(means(part.masks, part.grid), chosen))
        first += len(part.rows)
    joined = torch.cat(targets)
    known = joined.isfinite()
    if not known.any():
        raise ValueError(f"nothing is known of any pixel of the depths of {len(images):,} {split} images")
    owners = images.repeat_interleave(torch.tensor([len(chosen) for chosen in places]))
    return Drawn(torch.cat(values)[known].float(), joined[known], owners[known])


def columns(result: Scores, headline: str) -> list[Column]:
    """R2, and the errors with the notes."""
    return [
        Column(f"depth_{name}", title, ((name,),), key="value", unit="number", chance=result["chance"][name],
               lower_is_better=name != "r2", headline=name == "r2", more=name != "r2")
        for name, title in TITLES.items() if name in result
    ]  # fmt: skip


def notes(result: Scores, settings: DepthSettings) -> list[str]:
    """What was judged, and how the strength was chosen."""
    lines = [
        f"depth: means of patches in {result['num_val']:,} val images, from {result['patches']:,} patches of "
        f"{result['num_train']:,} train images; ridge of strength {result['strength']:.2g}"
    ]
    if result["at_grid_edge"]:
        lines.append(f"warning: the depth's strength {result['strength']:.2g} lies at the edge of its grid")
    return lines


SPEC = ProbeSpec("depth", run, columns, DepthSettings, needs="tokens", labels="depth", notes=notes, native=True)
