"""What a classifier's scores of val images say beside its accuracy: what it confuses, and how sure it may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eval.base import Column, Scores
from eval.outcomes import DRAWS, Outcome, scored

#: Up to so many classes the confusion matrix is kept: as many rows of as many numbers.
MOST_CONFUSED = 100
#: Classes of fewer train images are rare: named with their recall.
RARE = 20
_BINS = 10
_WORK = 2**31  # images x classes x draws that a bootstrap of a ranking may take
_MOST_NAMED = 5


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """(m,) the place of the right class among logits (m, classes), 0 the first; of equal ones the lower class wins.

    Of logits that are not finite, as of a head that diverged, the right class is the last.
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = ((logits > own) | ((logits == own) & (classes < labels[:, None]))).sum(dim=1)
    return torch.where(logits.isfinite().all(dim=1), before, logits.shape[1])


def class_measures(
    logits: Tensor,
    labels: Tensor,
    train_labels: Tensor,
    names: Sequence[str] = (),
    groups: Tensor | None = None,
) -> Scores:
    """Balanced accuracy, macro F1 and AUROC (one class against the rest, the mean) with errors; `confusion` (rows the
    true class, columns the predicted, in images), `reliability` (how often it is right where it is so sure), and
    `rare`: the classes of few train images with their recall.

    logits (m, classes) and labels (m,) of val, train_labels (n,): which classes are rare. Of AUROC fewer draws are
    taken where images and classes are many; it is left out where val is of one class. `blind`: what is reached by
    train's most frequent class. Images whose scores are not finite are `not_finite`, and wrong.
    """
    num_classes = logits.shape[1]
    finite = logits.isfinite().all(dim=1)
    wrong = torch.zeros_like(logits).scatter_(1, labels[:, None], -1.0)  # sure of nothing, least of what is right
    logits = torch.where(finite[:, None], logits, wrong)
    predicted = logits.argmax(dim=1)
    recalls = _recalls(predicted, labels, num_classes)
    of_train = torch.bincount(train_labels, minlength=num_classes)
    rare = ((of_train > 0) & (of_train < RARE)).nonzero()[:, 0].tolist()
    found: Scores = {
        name: scored(Outcome(name, predicted, labels), groups=groups) for name in ("balanced_accuracy", "macro_f1")
    }
    if len(labels.unique()) > 1:
        outcome = Outcome("auroc", against_the_rest(logits), labels)
        found["auroc"] = scored(outcome, groups=groups, draws=ranking_draws(*logits.shape))
        del found["auroc"]["outcome"]  # as large as the features of val: not kept
    always = of_train.argmax().expand(len(labels))
    found["blind"] = {
        "balanced_accuracy": 1 / len(labels.unique()), "macro_f1": Outcome("macro_f1", always, labels).number()
    }  # fmt: skip
    if not finite.all():
        found["not_finite"] = int((~finite).sum())
    if num_classes <= MOST_CONFUSED:
        pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        found["confusion"] = pairs.unflatten(0, (num_classes, num_classes)).tolist()
    found["reliability"] = _reliability(logits, labels)
    found["rare"] = [
        {"class": names[place] if names else str(place), "train": int(of_train[place]), "recall": recalls[place]}
        for place in rare
    ]
    return found


def against_the_rest(logits: Tensor) -> Tensor:
    """(m, classes) float64 by which softmax would order the images for each class, and as exactly where it is 0 or 1:
    the logit of a class less the logarithm of the others' summed exponentials."""
    logits = logits.double()
    none = logits.new_full((len(logits), 1), -torch.inf)
    before = torch.cat([none, logits.logcumsumexp(dim=1)[:, :-1]], dim=1)
    behind = torch.cat([none, logits.flip(1).logcumsumexp(dim=1)[:, :-1]], dim=1).flip(1)
    return logits - torch.logaddexp(before, behind)


def ranking_draws(num: int, num_classes: int) -> int:
    """Draws of the bootstrap of a number that ranks all images anew for every class."""
    return max(50, min(DRAWS, _WORK // max(1, num * num_classes)))


def measure_columns(probe: str, measures: Scores) -> list[Column]:
    """Of a result that holds these `class_measures` as `measures`."""
    titles = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC"}
    return [
        Column(
            f"{probe}_{name}", title, (("measures", name),), headline=False, key="value",
            chance=0.5 if name == "auroc" else measures["blind"][name], more=True,
        )
        for name, title in titles.items()
    ]  # fmt: skip


def measure_notes(probe: str, measures: Scores) -> list[str]:
    """The rare classes by name, and how far confidence is from accuracy."""
    lines = []
    if lost := measures.get("not_finite"):
        lines.append(f"warning: {probe}: the scores of {lost:,} val images are not finite; these count as wrong")
    if rare := measures["rare"]:
        named = [
            f"{each['class']} ({each['train']} to learn from, recall "
            + ("-" if each["recall"] is None else f"{100 * each['recall']:.0f}")
            + ")"
            for each in sorted(rare, key=lambda each: each["train"])[:_MOST_NAMED]
        ]
        more = f", and {len(rare) - _MOST_NAMED} more" if len(rare) > _MOST_NAMED else ""
        lines.append(f"{probe}: rare classes: {', '.join(named)}{more}")
    return lines


def _recalls(predicted: Tensor, labels: Tensor, num_classes: int) -> list[float | None]:
    """Of each class the share of its images that are predicted as it; None where val has none."""
    there = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[predicted == labels], minlength=num_classes)
    return [r / t if t else None for r, t in zip(right.tolist(), there.tolist(), strict=True)]


def _reliability(logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Mean confidence and accuracy of images in ten bins of confidence; empty bins are left out."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    right = (predicted == labels).double()
    place = (confidence * _BINS).long().clamp_max(_BINS - 1)
    count = torch.bincount(place, minlength=_BINS)
    sums = [torch.bincount(place, weights=each.double(), minlength=_BINS) for each in (confidence, right)]
    return [
        {"confidence": float(sums[0][b] / count[b]), "accuracy": float(sums[1][b] / count[b]), "count": int(count[b])}
        for b in count.nonzero()[:, 0].tolist()
    ]
