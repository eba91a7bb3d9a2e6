"""The numbers by which probes are judged, of any weighting of the images: so each can be drawn again for an error.

All take `weights` (k, m): k weightings of the m images at once, as many times as a draw took each (float32). With all
ones, each is what scikit-learn gives; tests hold them to that. NaN stands for a draw of which a number is not defined,
such as R2 of one target only, or of no image that has a class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mean(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) mean of values (m,): accuracy, where they are 1 for right; mean absolute error, where they are errors."""
    return (weights @ values.to(weights)) / weights.sum(dim=1)


def mean_iou(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) intersection over union, the mean of the classes that there are; values (m, classes, 2): both, in pixels."""
    flat = values.to(weights.dtype).flatten(1)
    sums = (weights @ flat).unflatten(1, values.shape[1:])
    there = sums[..., 1] > 0
    return ((sums[..., 0] / sums[..., 1].clamp_min(1)) * there).sum(dim=1) / there.sum(dim=1)


def ratio(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) sum of the first over the sum of the second of values (m, 2): a share of pixels."""
    sums = weights @ values.to(weights)
    return sums[:, 0] / sums[:, 1]


def root_ratio(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) the root of `ratio`: of squared errors and their number, the root of their mean."""
    return ratio(values, targets, weights).sqrt()


def pooled_r2(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) R2 of many numbers an image; values (m, 4): of each image's, how many, the sums of the targets and of their
    squares, and of the squared errors."""
    num, total, squares, errors = (weights.double() @ values.double()).unbind(1)
    return _explained(errors, squares - total.square() / num, squares)


def _explained(errors: Tensor, spread: Tensor, squares: Tensor) -> Tensor:
    """(k,) 1 - errors / spread; NaN where the spread is no more than the rounding of `squares`, which it is left of."""
    return torch.where(spread > 1e-12 * squares, 1 - errors / spread, torch.nan).float()


def balanced_accuracy(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) recall, the mean of the classes that there are; values: predicted classes (m,), targets (m,)."""
    right, true, _ = _class_sums(values, targets, weights)
    return ((right / true.clamp_min(1e-9)) * (true > 0)).sum(dim=1) / (true > 0).sum(dim=1)


def macro_f1(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) F1, the mean of the classes that are there or predicted; values: predicted classes (m,), targets (m,)."""
    right, true, predicted = _class_sums(values, targets, weights)
    both = true + predicted
    return (2 * right / both.clamp_min(1e-9)).sum(dim=1) / (both > 0).sum(dim=1)


def quadratic_kappa(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) Cohen's kappa with quadratic weights; values: predicted grades (m,), targets (m,)."""
    num = int(torch.maximum(values.max(), targets.max())) + 1
    pairs = weights.new_zeros(len(weights), num * num).index_add_(1, values * num + targets, weights)
    together = pairs.unflatten(1, (num, num))
    grades = torch.arange(num, device=weights.device, dtype=weights.dtype)
    cost = (grades[:, None] - grades[None, :]).square()
    total = together.sum(dim=(1, 2))
    expected = together.sum(dim=2)[:, :, None] * together.sum(dim=1)[:, None, :] / total[:, None, None]
    blind = (cost * expected).sum(dim=(1, 2))
    # all of one grade, and predicted so: no disagreement that chance could have avoided
    kappa = torch.where(blind > 0, 1 - (cost * together).sum(dim=(1, 2)) / blind.clamp_min(1e-9), 1)
    return kappa.masked_fill(total == 0, torch.nan)


def r2(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) the share of variance that values (m,) explain of targets (m,); 0 for the mean of these, below for worse."""
    weights = weights.double()
    values, targets = values.to(weights), targets.to(weights)
    errors, targets = (values - targets).square(), targets - targets.mean()  # near 0, squares lose nothing
    squares, total = weights @ targets.square(), weights @ targets
    return _explained(weights @ errors, squares - total.square() / weights.sum(dim=1), squares)


def mean_average_precision(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) average precision, the mean of the classes that any image has; values: scores, targets: 0 or 1, (m, c)."""
    found, count = weights.new_zeros(len(weights)), weights.new_zeros(len(weights))
    for score, target in zip(values.unbind(1), targets.unbind(1), strict=True):
        precision, there = average_precision(score, target, weights)
        found += torch.where(there, precision, 0)
        count += there
    return found / count


def average_precision(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(k,) precision at each recall, weighted by the gain of recall (no interpolation), and (k,) whether there is any
    positive; scores and targets (m,). Of equal scores, none comes before the other."""
    order = scores.argsort(descending=True)
    ends = _ends(scores[order])
    weights = weights[:, order]
    positive = (weights * targets[order].to(weights)).cumsum(dim=1)[:, ends]
    every = weights.cumsum(dim=1)[:, ends]
    gained = torch.diff(positive, dim=1, prepend=positive.new_zeros(len(positive), 1))
    total = positive[:, -1]
    return (gained * positive / every.clamp_min(1e-9)).sum(dim=1) / total.clamp_min(1e-9), total > 0


def blind_average_precision(num: int, positive: Tensor) -> Tensor:
    """(..) float64: the mean average precision of all orders of `num` images of which `positive` (..) are of a class;
    0 where none are. It is above their share: with one of n, H(n) / n."""
    positive = positive.double()
    harmonic = float((1 / torch.arange(1, num + 1, dtype=torch.float64)).sum())
    expected = (harmonic + (positive - 1) / max(num - 1, 1) * (num - harmonic)) / num
    return torch.where(positive > 0, expected, 0.0)


def auroc(values: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """(k,) area under the curve of true against false positives, one class against the rest, the mean of the classes
    that some images have and some have not; values: scores (m, c), targets: classes (m,), or (m, c) 0 or 1."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, values.shape[1])
    found, count = weights.new_zeros(len(weights)), weights.new_zeros(len(weights))
    for score, target in zip(values.unbind(1), targets.unbind(1), strict=True):
        order = score.argsort()
        ends = _ends(score[order])
        ordered, is_one = weights[:, order], target[order].to(weights)
        ones = (ordered * is_one).cumsum(dim=1)[:, ends]
        others = (ordered * (1 - is_one)).cumsum(dim=1)[:, ends]
        of_tie = torch.diff(ones, dim=1, prepend=ones.new_zeros(len(ones), 1))
        below = F.pad(others, (1, 0))[:, :-1]
        wins = (of_tie * (below + others) / 2).sum(dim=1)
        there = (ones[:, -1] > 0) & (others[:, -1] > 0)
        found += torch.where(there, wins / (ones[:, -1] * others[:, -1]).clamp_min(1e-9), 0)
        count += there
    return found / count


def _ends(ordered: Tensor) -> Tensor:
    """Places of the last of each run of equal values."""
    last = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    last[:-1] = ordered[1:] != ordered[:-1]
    return last.nonzero()[:, 0]


def _class_sums(values: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, classes) each: weights of those predicted rightly, of those of the class, of those predicted as it."""
    num = int(torch.maximum(values.max(), targets.max())) + 1

    def summed(classes: Tensor, of: Tensor) -> Tensor:
        return weights.new_zeros(len(weights), num).index_add_(1, classes, of)

    right = weights * (values == targets).to(weights)
    return summed(targets, right), summed(targets, weights), summed(values, weights)


Statistic = Callable[[Tensor, Tensor, Tensor], Tensor]
STATISTICS: dict[str, Statistic] = {
    function.__name__: function
    for function in (
        mean, ratio, root_ratio, pooled_r2, mean_iou, balanced_accuracy, macro_f1, quadratic_kappa, r2,
        mean_average_precision, auroc,
    )
}  # fmt: skip
