"""Which checkpoint of a run its label-free numbers prefer, and how far they agree with k-NN (imports no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from eval.report import score_of, step_of

Number = float | None
#: By probe and key of its result: how it is called, and which of its values is best.
NUMBERS: dict[tuple[str, str], tuple[str, Literal["most", "least", "one"]]] = {
    ("label_free", "rankme"): ("RankMe", "most"),
    ("lidar", "lidar"): ("LiDAR", "most"),
    ("label_free", "alpha_req"): ("alpha-ReQ", "one"),  # the authors find the best models near 1
    ("label_free", "uniformity"): ("uniformity", "least"),
    ("lidar", "alignment"): ("alignment", "least"),
    ("label_free", "effective_rank"): ("effective rank", "most"),
    ("label_free", "patch_rank"): ("effective rank of patches", "most"),
    ("label_free", "patch_rank_within"): ("effective rank within an image", "most"),
}
#: What a rank correlation of so many pairs reaches in one of twenty cases when there is none, either way.
_BY_CHANCE = {5: 1.0, 6: 0.886, 7: 0.786, 8: 0.738, 9: 0.700, 10: 0.648}


def spearman(first: Sequence[float], second: Sequence[float]) -> Number:
    """Rank correlation of as many numbers each; equal ones share a rank. None of fewer than three, or where one of the
    two never changes."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} numbers; a correlation takes pairs")
    if len(first) < 3:
        return None
    ranks = [_centred_ranks(values) for values in (first, second)]
    products = sum(a * b for a, b in zip(*ranks, strict=True))
    squares = [sum(rank * rank for rank in each) for each in ranks]
    return products / math.sqrt(squares[0] * squares[1]) if all(squares) else None


def goodness(value: float, best: Literal["most", "least", "one"]) -> float:
    """The larger the better."""
    return -abs(value - 1) if best == "one" else -value if best == "least" else value


def preferences(
    steps: Sequence[int], numbers: Mapping[str, Sequence[Number]], knn: Sequence[Number]
) -> tuple[dict[str, int], dict[str, Number]]:
    """By title of each number: the step it prefers, and its Spearman correlation with `knn` over the checkpoints that
    have both.

    numbers: by title of `NUMBERS`, of each checkpoint. Of equals the earlier step; what fewer than two checkpoints have
    prefers none.
    """
    best_of = dict(NUMBERS.values())
    preferred: dict[str, int] = {}
    correlation: dict[str, Number] = {}
    for title, values in numbers.items():
        known = [(goodness(value, best_of[title]), place) for place, value in enumerate(values) if value is not None]
        if len(known) < 2:
            continue
        preferred[title] = steps[max(known, key=lambda each: (each[0], -each[1]))[1]]
        pairs = [(good, each) for good, place in known if (each := knn[place]) is not None]
        correlation[title] = spearman([good for good, _ in pairs], [each for _, each in pairs])
    return preferred, correlation


def without_labels(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for a report of a run's checkpoints, whose probe results these are: `without labels they prefer step 300
    (RankMe, LiDAR), step 200 (uniformity)`, and the correlations. None where no such number is of two of them."""
    steps = [step_of(each) for each in results]
    rows = [each["rows"]["pretrained"] for each in results]
    numbers = {
        title: [_value((row.get(probe) or {}).get(key)) for row in rows] for (probe, key), (title, _) in NUMBERS.items()
    }
    knn = [_knn(each) for each in results]
    preferred, correlation = preferences(steps, numbers, knn)
    if not preferred:
        return []
    by_step: dict[int, list[str]] = {}
    for title, step in preferred.items():
        by_step.setdefault(step, []).append(title)
    most_first = sorted(by_step.items(), key=lambda item: (-len(item[1]), item[0]))
    told = ", ".join(f"step {step:,} ({', '.join(titles)})" for step, titles in most_first)
    lines = [f"without labels they prefer {told}"]
    if known := [f"{title} {value:+.2f}" for title, value in correlation.items() if value is not None]:
        num = sum(each is not None for each in knn)
        lines.append(f"rank correlation with k-NN over {num} checkpoints: {', '.join(known)}; {_by_chance(num)}")
    return lines


def _by_chance(num: int) -> str:
    if num < min(_BY_CHANCE):
        return "of so few it says little"
    reached = _BY_CHANCE.get(num, 1.96 / math.sqrt(num - 1))
    return f"chance alone reaches {reached:.2f} either way in one of twenty cases"


def _value(score: Any) -> Number:
    return float(score["value"]) if isinstance(score, dict) and score.get("value") is not None else None


def _knn(results: dict[str, Any]) -> Number:
    """The headline k-NN accuracy of a result, where it has one."""
    for column in results["columns"]:
        if column["probe"] == "knn" and column["headline"]:
            found = score_of(results["rows"]["pretrained"], column)
            return None if found is None else float(found[column.get("key", "top1")])
    return None


def _centred_ranks(values: Sequence[float]) -> list[float]:
    """Ranks less their mean; equal values share the mean of theirs."""
    ordered = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(ordered):
        last = first
        while last + 1 < len(ordered) and values[ordered[last + 1]] == values[ordered[first]]:
            last += 1
        for place in ordered[first : last + 1]:
            ranks[place] = (first + last) / 2
        first = last + 1
    middle = (len(values) - 1) / 2
    return [rank - middle for rank in ranks]
