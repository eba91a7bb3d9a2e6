"""What each val image came to, from which a number, its error and a comparison with another encoder's are made.

Errors are of a bootstrap over images (Efron 1979), or over groups of them where there are groups: images of one patient
are drawn together, because they are no independent witnesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.files import atomic_write
from eval.base import Scores
from eval.scores import Z95, with_error
from eval.statistics import STATISTICS

DRAWS = 1000
#: From so many draws on their quantiles are an interval; of fewer it is of their deviation.
_ENOUGH_FOR_QUANTILES = 400
#: Statistics that lie in 0 .. 1 and may have fewer draws.
_SHARES = ("mean_average_precision", "auroc")
#: Draws that are weighed at once, times images: 64 MiB of float32.
_AT_ONCE = 2**24
_EMPTY = torch.empty(0)


@dataclass(frozen=True)
class Outcome:
    """A number as a function of the images it is of.

    statistic: by name, see `eval.statistics`. values, targets: (m, ..) what it takes of each image.
    rows: (m,) int64 which of val's images these are, by their place; empty for all of them, in order.
    """

    statistic: str
    values: Tensor
    targets: Tensor = _EMPTY
    rows: Tensor = _EMPTY

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic is {self.statistic!r}; there are {', '.join(STATISTICS)}")

    def __len__(self) -> int:
        return len(self.values)

    def of(self, weights: Tensor) -> Tensor:
        """(k,) the number for each weighting (k, m) of the images."""
        return STATISTICS[self.statistic](self.values, self.targets, weights)

    def number(self) -> float:
        """Of all images once; NaN where it is not defined of these."""
        return float(self.of(torch.ones(1, len(self.values)))[0])


def weightings(num: int, seed: int, groups: Tensor | None = None, draws: int = DRAWS) -> Iterator[Tensor]:
    """Draws of `num` images with replacement, as (k, num) counts of each, `draws` in all; of whole `groups` (num,)."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.arange(num) if groups is None else torch.unique(groups, return_inverse=True)[1]
    num_units = int(unit.max()) + 1
    at_once = max(1, _AT_ONCE // max(num, 1))
    for first in range(0, draws, at_once):
        size = min(at_once, draws - first)
        drawn = torch.randint(num_units, (size, num_units), generator=generator)
        counts = torch.zeros(size, num_units).scatter_add_(1, drawn, torch.ones(1).expand(size, num_units))
        yield counts if groups is None else counts[:, unit]


def bootstrap(outcome: Outcome, seed: int = 0, groups: Tensor | None = None, draws: int = DRAWS) -> Tensor:
    """(draws,) the number of an outcome, of so many draws of its images."""
    return torch.cat([outcome.of(weights) for weights in weightings(len(outcome), seed, groups, draws)])


def scored(outcome: Outcome, *, seed: int = 0, groups: Tensor | None = None, draws: int = DRAWS) -> Scores:
    """`value`, its `standard_error` and 95 % `interval` by a bootstrap over images or `groups`, and the outcome.

    Draws of which the number is not defined are left out of both, and counted as `undefined_draws`. Raises ValueError
    where it is not defined of all images.
    """
    if not len(outcome):
        raise ValueError(f"no image to compute {outcome.statistic} of; give val images that have what it needs")
    value = outcome.number()
    if not math.isfinite(value):
        raise ValueError(
            f"{outcome.statistic} of these {len(outcome):,} val images is {value}: they do not have what it is of, "
            "such as a known pixel, or two targets; give val images that do"
        )
    drawn = bootstrap(outcome, seed, groups, draws)
    defined = drawn[drawn.isfinite()]
    error = float(defined.std()) if len(defined) > 1 else 0.0
    low, high = _reach(defined, value, error, outcome.statistic in _SHARES)
    lost = len(drawn) - len(defined)
    return {
        "value": value,
        "standard_error": error,
        "interval": [min(low, value), max(high, value)],
        **({"undefined_draws": lost} if lost else {}),
        "outcome": outcome,
    }


def _reach(drawn: Tensor, value: float, error: float, share: bool) -> tuple[float, float]:
    """The 95 % interval of a value: quantiles of the draws, or 1.96 errors on either side where these are few."""
    if len(drawn) >= _ENOUGH_FOR_QUANTILES:
        low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
        return low, high
    low, high = value - Z95 * error, value + Z95 * error
    return (max(low, 0.0), min(high, 1.0)) if share else (low, high)


def undefined_draws(scores: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    """(path, count) of each score in a result of which draws were left out."""
    if isinstance(scores, dict):
        if lost := scores.get("undefined_draws"):
            yield "/".join(path), int(lost)
        for name, each in scores.items():
            yield from undefined_draws(each, (*path, str(name)))


def without_outcomes(scores: Any, found: dict[str, Outcome], path: tuple[str, ...] = ()) -> Any:
    """The same JSON values without the outcomes in them; these are added to `found` by path, as `knn/mean/20`."""
    if isinstance(scores, dict):
        kept = {}
        for name, value in scores.items():
            if isinstance(value, Outcome):
                found["/".join(path)] = value
            else:
                kept[name] = without_outcomes(value, found, (*path, str(name)))
        return kept
    if isinstance(scores, list | tuple):
        return [without_outcomes(value, found, (*path, str(place))) for place, value in enumerate(scores)]
    return scores


def write_outcomes(path: Path, outcomes: dict[str, Outcome], ids: Tensor, groups: Tensor | None) -> None:
    """All of them into one .npz beside a result, with the sample numbers of val and their groups."""
    arrays: dict[str, np.ndarray] = {"ids": ids.numpy()}
    if groups is not None:
        arrays["groups"] = groups.numpy()
    for name, outcome in outcomes.items():
        arrays[f"{name}:{outcome.statistic}:values"] = outcome.values.cpu().numpy()
        arrays[f"{name}:{outcome.statistic}:targets"] = outcome.targets.cpu().numpy()
        if len(outcome.rows):
            arrays[f"{name}:{outcome.statistic}:rows"] = outcome.rows.cpu().numpy()
    with atomic_write(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]


def read_outcomes(path: Path) -> tuple[dict[str, Outcome], Tensor, Tensor | None]:
    """What `write_outcomes` wrote: outcomes by name, ids and groups. Nothing is unpickled."""
    with np.load(path, allow_pickle=False) as arrays:
        found: dict[str, dict[str, Any]] = {}
        for key in arrays.files:
            if key.count(":") == 2:
                name, statistic, part = key.split(":")
                found.setdefault(name, {"statistic": statistic})[part] = torch.from_numpy(arrays[key])
        groups = torch.from_numpy(arrays["groups"]) if "groups" in arrays.files else None
        return {name: Outcome(**parts) for name, parts in found.items()}, torch.from_numpy(arrays["ids"]), groups


def with_right(shares: Scores, right: Tensor, groups: Tensor | None = None) -> Scores:
    """The same with the error of the share `top1`, of which `right` (m,) says each image's part, and the outcome.

    The error is binomial and the interval Wilson's; with `groups`, both are of a bootstrap over these.
    """
    outcome = Outcome("mean", right.float().cpu())
    if groups is None:
        return {**with_error(shares, len(right)), "outcome": outcome}
    found = scored(outcome, groups=groups)
    del found["value"]
    return {**shares, **found}
