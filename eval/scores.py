"""Numbers of probes and how sure they are (imports no torch)."""

from __future__ import annotations

import math
from typing import Any

#: Of the k nearest neighbours that are always among those measured, the one that is shown first.
HEADLINE_K = 20
#: Standard errors on either side of a 95 % interval.
Z95 = 1.959964


def mean_of(values: tuple[float, ...] | list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def deviation_of(values: tuple[float, ...] | list[float]) -> float | None:
    """The sample standard deviation; None for a single value."""
    if len(values) < 2:
        return None
    mean = mean_of(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def wilson(share: float, num: int) -> tuple[float, float]:
    """The 95 % interval of a share of `num` independent samples (Wilson 1927); never empty, not even of 0 or 1."""
    weight = Z95**2 / num
    middle = (share + weight / 2) / (1 + weight)
    reach = Z95 / (1 + weight) * math.sqrt(share * (1 - share) / num + weight / (4 * num))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def with_error(shares: dict[str, Any], num_val: int) -> dict[str, Any]:
    """The same with `standard_error` and `interval` (Wilson's, 95 %) of the binomial share top1 over `num_val`.

    Where images are known one by one, take `eval.outcomes.with_right`: it minds groups and keeps what to compare by.
    """
    top1 = shares["top1"]
    return {
        **shares,
        "standard_error": math.sqrt(top1 * (1 - top1) / num_val),
        "interval": list(wilson(top1, num_val)),
    }
