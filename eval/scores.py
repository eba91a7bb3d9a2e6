"""What reports of probes need to know of their numbers (imports no torch)."""

from __future__ import annotations

import math

#: Of the k nearest neighbours that are always among those measured, the one that is shown first.
HEADLINE_K = 20


def mean_of(values: tuple[float, ...] | list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def deviation_of(values: tuple[float, ...] | list[float]) -> float | None:
    """The sample standard deviation; None for a single value."""
    if len(values) < 2:
        return None
    mean = mean_of(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
