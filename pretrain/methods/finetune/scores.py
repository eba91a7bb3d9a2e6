"""How right predictions are, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DRAWS = 100  # of a bootstrap
_MOST = 5_000_000  # scores of which a bootstrap is taken
SEED = 0


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Of scores (n,) and whether each is of the class (n,) bool: the area under its steps of precision over recall,
    equal scores as one step. NaN where none is of the class."""
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each run of equal scores
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> tuple[float, list[float]]:
    """Over the classes of which there are any, and of each class: scores and truth (n, c)."""
    each = [average_precision(scores[:, place], truth[:, place] > 0) for place in range(scores.shape[1])]
    known = [value for value in each if value == value]
    return float(np.mean(known)) if known else 0.0, each


def r_squared(predicted: np.ndarray, truth: np.ndarray) -> float:
    """1 less the share of truth's (n, k) variance that is left, averaged over the numbers; 0 is the mean of truth."""
    left = ((predicted - truth) ** 2).sum(axis=0)
    total = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    return float((1 - left / np.maximum(total, 1e-12)).mean())


def overlaps(counts: np.ndarray) -> np.ndarray:
    """(c,) intersection over union of each class, from images' counts (n, 3 c): right, taken for it, of it. NaN for a
    class that no image has."""
    right, taken, of_class = np.split(counts.sum(axis=0), 3)
    return np.where(of_class > 0, right / np.maximum(taken + of_class - right, 1), np.nan)


def mean_overlap(counts: np.ndarray, _: np.ndarray) -> float:
    """Over the classes that there are."""
    each = overlaps(counts)
    return float(np.nanmean(each)) if np.isfinite(each).any() else 0.0


def blind_overlap(pixels: np.ndarray) -> float:
    """The mean overlap of who says the most frequent class everywhere, of the pixels (c,) of each class."""
    return float(pixels.max() / pixels.sum() / (pixels > 0).sum()) if pixels.any() else 0.0


def bootstrap_error(score: Callable[[np.ndarray, np.ndarray], float], found: np.ndarray, truth: np.ndarray) -> float:
    """The deviation of a score over `DRAWS` draws of the images with replacement; NaN where it would take long."""
    if found.size > _MOST:
        return float("nan")
    generator = np.random.default_rng(SEED)
    draws = [generator.integers(len(found), size=len(found)) for _ in range(DRAWS)]
    return float(np.std([score(found[chosen], truth[chosen]) for chosen in draws]))


def binomial_error(share: float, count: int) -> float:
    """The standard error of a share of so many."""
    return float((share * (1 - share) / max(count, 1)) ** 0.5)
