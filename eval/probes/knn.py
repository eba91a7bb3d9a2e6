"""k-nearest-neighbour accuracy of frozen features. Tensors in, shares out: training may call it too."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import with_right
from eval.scores import HEADLINE_K

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK_ELEMENTS = 2**25  # similarities held at once: 128 MiB in float32
BANK_BYTES = 2**30  # of train's features in float32 that are held at once
_ROWS = 8192  # brought to length 1 at a time


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, dict[str, float]]:
    """Share of `val` (m, d) that its k nearest neighbours in `train` (n, d) classify rightly; see `knn_ranks`.

    Returns {k: {"top1": share, "top5": share}}, top5 only above 5 classes.
    """
    ranks = knn_ranks(
        train, train_labels, val, val_labels, num_classes=num_classes, ks=ks, temperature=temperature
    )  # fmt: skip
    return {k: shares(rank, num_classes) for k, rank in ranks.items()}


def shares(rank: Tensor, num_classes: int) -> dict[str, float]:
    """Top-1 and, above 5 classes, top-5 share of places (m,) of the right class."""
    tops = {"top1": 1, "top5": 5} if num_classes > 5 else {"top1": 1}
    return {name: int((rank < top).sum()) / len(rank) for name, top in tops.items()}


@torch.no_grad()
def knn_ranks(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """(m,) the place of the right class of each of `val` (m, d) among what its k nearest in `train` (n, d) vote for.

    Neighbours are the k largest cosine similarities s; each votes for its label with weight exp(s / temperature)
    (Wu et al. 2018, section 3.4; DINO, Caron et al. 2021, appendix F). Labels (n,) and (m,) lie in
    0 .. num_classes - 1.

    Places count from 0. A label with no vote is never right, and of equal votes the lower class wins, so that every
    device gives the same answer. A k beyond n uses all n, with a warning. The work runs on the device of `train`.
    """
    _check(train, train_labels, val, val_labels, num_classes, ks)
    clipped = sorted(k for k in ks if k > len(train))
    if clipped:
        warnings.warn(f"k = {clipped} is more than the {len(train)} train samples; all of them vote", stacklevel=3)
    train_labels, val_labels = train_labels.to(train.device), val_labels.to(train.device)
    largest = min(max(ks), len(train))
    ranks: dict[int, list[Tensor]] = {k: [] for k in ks}

    bank = _Bank(train)
    chunk = max(1, CHUNK_ELEMENTS // bank.rows)
    for queries, labels in zip(val.split(chunk), val_labels.split(chunk), strict=True):
        queries = F.normalize(queries.to(train.device).float(), dim=1)
        similarities, neighbours = bank.nearest(queries, largest)
        # relative to the nearest: the same votes, which no temperature can overflow
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        neighbour_labels = train_labels[neighbours]
        for k in ks:
            votes = weights.new_zeros(len(queries), num_classes)
            votes.scatter_add_(1, neighbour_labels[:, :k], weights[:, :k])
            ranks[k].append(_rank(votes, labels))
    return {k: torch.cat(parts) for k, parts in ranks.items()}


class _Bank:
    """Features (n, d) of length 1 in float32: all of them, or of very many some `rows` at a time, which are made anew
    for each chunk of queries."""

    def __init__(self, features: Tensor) -> None:
        most = max(1, BANK_BYTES // (4 * features.shape[1]))
        self.features, self.rows = features, min(len(features), most)
        self._whole = _unit(features) if self.rows == len(features) else None

    def nearest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(m, count) the largest cosine similarities of queries (m, d), falling, and whose they are."""
        if self._whole is not None:
            return (queries @ self._whole.T).topk(count, dim=1)
        best = (
            queries.new_empty(len(queries), 0),
            torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device),
        )
        for first in range(0, len(self.features), self.rows):
            part = _unit(self.features[first : first + self.rows])
            values, places = (queries @ part.T).topk(min(count, len(part)), dim=1)
            best = torch.cat([best[0], values], dim=1), torch.cat([best[1], places + first], dim=1)
            values, chosen = best[0].topk(min(count, best[0].shape[1]), dim=1)
            best = values, best[1].gather(1, chosen)
        return best


def _unit(features: Tensor) -> Tensor:
    """(n, d) float32 of length 1, made some rows at a time: memory for one copy."""
    found = torch.empty(features.shape, device=features.device)
    for into, part in zip(found.split(_ROWS), features.split(_ROWS), strict=True):
        into.copy_(F.normalize(part.float(), dim=1))
    return found


def _rank(votes: Tensor, labels: Tensor) -> Tensor:
    """(b,) place of the right class among votes (b, classes), 0 the first; last where it has no vote."""
    own = votes.gather(1, labels[:, None])
    classes = torch.arange(votes.shape[1], device=votes.device)
    before = (votes > own) | ((votes == own) & (classes < labels[:, None]))
    return torch.where(own[:, 0] > 0, before.sum(dim=1), votes.shape[1])


def _check(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, num_classes: int, ks: Sequence[int]
) -> None:
    if train.ndim != 2 or val.ndim != 2 or train.shape[1] != val.shape[1]:
        raise ValueError(f"features are {tuple(train.shape)} and {tuple(val.shape)}; expected (n, d) and (m, d)")
    if not len(train) or not len(val):
        raise ValueError(f"{len(train)} train and {len(val)} val features; both need at least one")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {tuple(ks)}; give one or more numbers of neighbours, each at least 1")
    for name, features, labels in (("train", train, train_labels), ("val", val, val_labels)):
        if labels.shape != (len(features),):
            raise ValueError(f"{name} labels are {tuple(labels.shape)} for {len(features)} features")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{name} labels lie in {low} .. {high}; with num_classes={num_classes} they must lie in "
                f"0 .. {num_classes - 1}: leave unlabelled samples (-1) out"
            )


@dataclass(frozen=True)
class KnnSettings:
    """How many neighbours vote, and how much a nearer one counts."""

    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        if HEADLINE_K not in self.ks:
            raise ValueError(f"ks is {self.ks}; k = {HEADLINE_K} is the headline and must be among them")


def run(store: Store, settings: KnnSettings) -> Scores:
    """{input: {k: accuracy}} of every single feature, the headline first."""
    train, val, found = store.train, store.val, {}
    for name in dict.fromkeys((store.headline, "class", "mean", "pooled")):
        if name not in train.inputs:
            continue
        few = (
            f", of which all {len(train.labels)} vote for the larger k" if len(train.labels) < max(settings.ks) else ""
        )
        store.progress(f"k-NN: {name}{few}")
        with warnings.catch_warnings(action="ignore"):  # of a k beyond the train samples: small data, not a fault
            by_k = knn_ranks(
                train.inputs[name].to(store.device), train.labels, val.inputs[name], val.labels,
                num_classes=store.num_classes, ks=settings.ks, temperature=settings.temperature,
            )  # fmt: skip
        found[name] = {
            str(k): with_right(shares(rank, store.num_classes), rank < 1, val.groups) for k, rank in by_k.items()
        }
    return found


def columns(result: Scores, headline: str) -> list[Column]:
    """One a feature; raw pixels have a single one, which stands in each."""
    k, several = str(HEADLINE_K), len(result) > 1
    return [
        Column(
            f"knn_{name}", f"k-NN {name}{'*' if several and name == headline else ''}", ((name, k), ("pixels", k)),
            headline=name == headline,
        )
        for name in result
    ]  # fmt: skip


def notes(result: Scores, settings: KnnSettings) -> list[str]:
    """What the numbers were made with."""
    starred = f"; the headline (*) is {next(iter(result))}" if len(result) > 1 else ""
    return [f"k-NN: k = {HEADLINE_K}, T = {settings.temperature:g}{starred}"]


SPEC = ProbeSpec("knn", run, columns, KnnSettings, labels=("class", "grade"), notes=notes, always=True)
