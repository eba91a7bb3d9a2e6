"""Linear probe: many linear classifiers on cached frozen features, one of them chosen without a look at val.

The grid is DINOv2's (Oquab et al. 2023, appendix B.3): learning rates x which blocks x class token with or without the
mean of patch tokens. MAE's variant (He et al. 2022, appendix A.1), a BatchNorm without affine parameters before the
linear layer, is one more axis: on frozen cached features it is standardisation with train's statistics. MAE's LARS is
not used: it steadies batches of 16,384, and here the batch is about 1,024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.scores import deviation_of, mean_of, with_error

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass(frozen=True)
class LinearRecipe:
    """How the linear layers are trained: SGD with momentum, no weight decay, cosine to zero."""

    learning_rates: tuple[float, ...] = LEARNING_RATES  # at batch size 256, scaled linearly; of several ..
    bounds: tuple[float, float] = (1e-8, 100.0)  # .. more are tried up to here while the best lies at the edge
    standardised: tuple[bool, ...] = (False, True)  # MAE's BatchNorm without affine parameters
    epochs: int = 100
    batch_size: int = 1024  # smaller where train has fewer than 16 such batches
    momentum: float = 0.9
    held_out: float = 0.1  # share of train that chooses the head

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rates or not self.standardised:
            raise ValueError(f"a linear probe needs epochs, a batch and at least one head; got {self}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it is a share of train between 0 and 1, such as 0.1")


@dataclass(frozen=True)
class Head:
    """One cell of the grid, and the share of the held-out part of train it classifies rightly."""

    input: str
    standardised: bool
    learning_rate: float  # at batch size 256
    held_out: float
    held_out_loss: float = field(repr=False)


@dataclass(frozen=True)
class LinearScores:
    """The chosen head's val accuracy per seed, and how it came to be chosen."""

    top1: tuple[float, ...]  # one a seed
    top5: tuple[float, ...] | None  # above 5 classes
    chosen: Head
    best_of_input: dict[str, float]  # held-out accuracy of the best head on each input
    at_grid_edge: bool  # the chosen rate is the smallest or largest, and the bound allows no other
    rates: tuple[float, ...]  # all that were tried with the chosen input, in order
    batch_size: int


def linear_probe(
    train: Mapping[str, Tensor],
    train_labels: Tensor,
    val: Mapping[str, Tensor],
    val_labels: Tensor,
    *,
    num_classes: int,
    recipe: LinearRecipe | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> LinearScores:
    """Train every head on 90 % of train, choose on the other 10 %, train the choice on all of train, test on val.

    `train` and `val` name the feature sets to choose from, (n, d) and (m, d) with d of each set its own; labels are
    (n,) and (m,) in 0 .. num_classes - 1. The first seed splits train (stratified) and makes the choice; every seed
    then draws its own initial weights and order of batches for the chosen head. `progress` is told what runs.
    Features stay where they lie; batches move to `device`.
    """
    recipe = recipe or LinearRecipe()
    if not seeds:
        raise ValueError("seeds is empty; give at least one, such as (0,)")
    if set(train) != set(val) or not train:
        raise ValueError(f"train has the feature sets {sorted(train)} and val {sorted(val)}; they must be the same")
    train_labels, val_labels = train_labels.cpu(), val_labels.cpu()
    kept, held_out = stratified_split(train_labels, recipe.held_out, seeds[0])

    heads: list[Head] = []
    for name, features in train.items():
        for standardised in recipe.standardised:
            tried: list[Head] = []
            rates: Sequence[float] = recipe.learning_rates
            while rates:
                kind = f"{name}{', standardised' if standardised else ''}"
                progress(f"linear: {kind}" + (f", rates to {rates[-1]:g}" if tried else ""))
                fitted = _fit(features, train_labels, kept, standardised, rates, num_classes, recipe, seeds[0], device)
                accuracy, _, loss = fitted.score(features, train_labels, held_out)
                tried += [Head(name, standardised, *cell) for cell in zip(rates, accuracy, loss, strict=True)]
                rates = _further(tried, recipe.bounds)
            heads += tried
    chosen = _best(heads)
    beside = [head.learning_rate for head in heads if _kind(head) == _kind(chosen)]
    if not math.isfinite(chosen.held_out_loss):
        raise ValueError(
            f"all {len(heads)} linear heads diverged, at rates {min(beside):g} .. {max(beside):g}; look for values "
            "that are not finite in the features, or give smaller learning_rates"
        )

    everything, all_val = torch.arange(len(train_labels)), torch.arange(len(val_labels))
    top1, top5 = [], []
    for seed in seeds:
        progress(f"linear: the chosen head, seed {seed}")
        classifiers = _fit(
            train[chosen.input], train_labels, everything, chosen.standardised, [chosen.learning_rate], num_classes,
            recipe, seed, device,
        )  # fmt: skip
        first, five, _ = classifiers.score(val[chosen.input], val_labels, all_val)
        top1.append(first[0])
        top5.append(five[0])
    return LinearScores(
        top1=tuple(top1),
        top5=tuple(top5) if num_classes > 5 else None,
        chosen=chosen,
        best_of_input={name: max(head.held_out for head in heads if head.input == name) for name in train},
        at_grid_edge=len(beside) > 1 and chosen.learning_rate in (min(beside), max(beside)),
        rates=tuple(sorted(beside)),
        batch_size=_batch_size(recipe, len(train_labels)),
    )


def _kind(head: Head) -> tuple[str, bool]:
    return head.input, head.standardised


def _best(heads: Sequence[Head]) -> Head:
    """The head that classifies most of the held-out part rightly, of equals the one of the smallest loss."""
    return max(heads, key=lambda head: (head.held_out, -head.held_out_loss))


def _further(tried: Sequence[Head], bounds: tuple[float, float]) -> list[float]:
    """Three rates beyond the edge at which the best of `tried` lies, within the bounds; none where it lies inside."""
    rates, best = [head.learning_rate for head in tried], _best(tried)
    if len(rates) < 2 or not math.isfinite(best.held_out_loss):
        return []
    if best.learning_rate == max(rates):
        beyond = [best.learning_rate * factor for factor in (2, 5, 10)]
    elif best.learning_rate == min(rates):
        beyond = [best.learning_rate / factor for factor in (2, 5, 10)]
    else:
        return []
    # ten times a tenth is not always one: rates are round numbers here
    return [rate for rate in (float(f"{rate:.6g}") for rate in beyond) if bounds[0] <= rate <= bounds[1]]


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices (kept, held out) of `labels` (n,), ascending; the same `share` of every class is held out.

    A class with a single sample is kept. Raises ValueError where no class has two samples.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held_out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    if not held_out.any():
        raise ValueError(
            f"every class of the {len(labels)} train samples has one sample, so none can be held out to choose a head; "
            "pack more labelled samples"
        )
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


@dataclass(frozen=True)
class _Classifiers:
    """h linear classifiers of the same features, side by side: weight (classes * h, d), bias (classes * h, 1).

    Classes come first: softmax over the slowest axis is 13 times faster on a CPU than over a short fastest one.
    """

    weight: Tensor
    bias: Tensor
    centre: Tensor  # (d,)
    inverse_scale: Tensor  # (d,)
    num_classes: int

    def prepare(self, features: Tensor, rows: Tensor) -> Tensor:
        """(b, d) the given rows as the classifiers see them."""
        chosen = features.index_select(0, rows.to(features.device))  # 9 times faster than features[rows]
        return chosen.to(self.weight.device).float().sub_(self.centre).mul_(self.inverse_scale)

    def logits(self, prepared: Tensor) -> Tensor:
        """(classes, h, b) from prepared features (b, d)."""
        flat = torch.addmm(self.bias, self.weight, prepared.T)
        return rearrange(flat, "(c h) b -> c h b", c=self.num_classes)

    @torch.no_grad()
    def score(self, features: Tensor, labels: Tensor, rows: Tensor) -> tuple[list[float], list[float], list[float]]:
        """Top-1 share, top-5 share and mean loss of each classifier on `rows`; a diverged one scores 0 and inf."""
        num_heads, device = len(self.bias) // self.num_classes, self.weight.device
        totals = torch.zeros(3, num_heads, dtype=torch.float64, device=device)
        classes = rearrange(torch.arange(self.num_classes, device=device), "c -> c 1 1")
        for part in rows.split(max(1, 2**24 // len(self.bias))):
            logits = self.logits(self.prepare(features, part))
            target = repeat(labels[part].to(device), "b -> 1 h b", h=num_heads)
            own = logits.gather(0, target)
            # of equal logits the lower class wins, as in k-NN
            rank = ((logits > own) | ((logits == own) & (classes < target))).sum(dim=0)
            loss = logits.logsumexp(dim=0) - own[0]
            totals += torch.stack([(rank < 1).double(), (rank < 5).double(), loss.double()]).sum(dim=2)
        totals /= len(rows)
        diverged = ~totals[2].isfinite()
        totals[:2].masked_fill_(diverged, 0)
        totals[2].masked_fill_(diverged, math.inf)
        top1, top5, loss = totals.tolist()
        return top1, top5, loss


def _batch_size(recipe: LinearRecipe, num_rows: int) -> int:
    """The recipe's batch, or what gives a small train set about 16 steps an epoch."""
    return min(recipe.batch_size, max(16, num_rows // 16), num_rows)


@torch.no_grad()
def _fit(
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    standardised: bool,
    rates: Sequence[float],
    num_classes: int,
    recipe: LinearRecipe,
    seed: int,
    device: torch.device | str,
) -> _Classifiers:
    """One classifier a learning rate on the given rows, all of them in one pair of matrix products a step.

    The classifiers share initial weights and batches, so they differ by their rate alone. The gradient of the softmax
    cross-entropy is written out: the rates cost one product (classes * h, d) x (d, b) forward and one back.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, batch_size = features.shape[1], _batch_size(recipe, len(rows))
    weight = repeat(torch.randn(num_classes, dim, generator=generator) * 0.01, "c d -> (c h) d", h=len(rates))
    centre, inverse_scale = _statistics(features, rows) if standardised else (torch.zeros(dim), torch.ones(dim))
    heads = _Classifiers(
        weight=weight.to(device),
        bias=torch.zeros(num_classes * len(rates), 1, device=device),
        centre=centre.to(device),
        inverse_scale=inverse_scale.to(device),
        num_classes=num_classes,
    )
    scaled = torch.tensor(rates, device=device) * batch_size / 256
    rate_of_row = repeat(scaled, "h -> (c h) 1", c=num_classes)
    weight_momentum, bias_momentum = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    minus_one = torch.full((1, len(rates), batch_size), -1.0, device=device)

    steps_per_epoch = len(rows) // batch_size
    num_steps = recipe.epochs * steps_per_epoch
    for step in range(num_steps):
        if step % steps_per_epoch == 0:  # the ragged end of a permutation is left out, another one every epoch
            order = rows[torch.randperm(len(rows), generator=generator)]
        begin = step % steps_per_epoch * batch_size
        batch = order[begin : begin + batch_size]
        prepared = heads.prepare(features, batch)
        # (softmax - one-hot) / b is the gradient of the mean cross-entropy
        gradient = heads.logits(prepared).softmax(dim=0)
        gradient.scatter_add_(0, repeat(labels[batch].to(device), "b -> 1 h b", h=len(rates)), minus_one)
        gradient = rearrange(gradient, "c h b -> (c h) b").div_(batch_size)
        weight_momentum.mul_(recipe.momentum).addmm_(gradient, prepared)
        bias_momentum.mul_(recipe.momentum).add_(gradient.sum(dim=1, keepdim=True))
        rate = rate_of_row * (0.5 * (1 + math.cos(math.pi * step / num_steps)))
        heads.weight.addcmul_(weight_momentum, rate, value=-1)
        heads.bias.addcmul_(bias_momentum, rate, value=-1)
    return heads


def _statistics(features: Tensor, rows: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """(d,) mean and inverse standard deviation over the given rows; a constant feature is left at zero."""
    total = torch.zeros(2, features.shape[1], dtype=torch.float64, device=features.device)
    shift = features[0].double()  # near the mean: variances by squares lose nothing
    for part in rows.to(features.device).split(chunk):
        values = features.index_select(0, part).double() - shift
        total += torch.stack([values.sum(0), values.square().sum(0)])
    mean, square = total / len(rows)
    variance = (square - mean.square()).clamp_min(0)
    return (mean + shift).float(), (variance + 1e-6).rsqrt().float()  # BatchNorm's way; 1e-6 as in MAE's probe


def run(store: Store, settings: LinearRecipe) -> Scores:
    """Accuracy of the chosen head, the mean over seeds, and how it was chosen among all inputs."""
    train, val = store.train, store.val
    found = linear_probe(
        train.inputs, train.labels, val.inputs, val.labels, num_classes=store.num_classes, recipe=settings,
        seeds=store.seeds, device=store.device, progress=store.progress,
    )  # fmt: skip
    return {
        **asdict(found),
        **with_error({"top1": mean_of(found.top1)}, len(val.labels)),
        "top5": None if found.top5 is None else mean_of(found.top5),
        "top1_of_seed": dict(zip(map(str, store.seeds), found.top1, strict=True)),
        "std_over_seeds": deviation_of(found.top1),
    }


def notes(result: Scores, settings: LinearRecipe) -> list[str]:
    """How the head was chosen; and where its rate lies at the edge of all that may be tried."""
    chosen, spread, rates = result["chosen"], result["std_over_seeds"], result["rates"]
    lines = [
        f"linear: on {chosen['input']}{', standardised' if chosen['standardised'] else ''}, "
        f"lr {chosen['learning_rate']:g} x batch / 256 of {rates[0]:g} .. {rates[-1]:g}, chosen on "
        f"{100 * settings.held_out:g} % held out of train ({100 * chosen['held_out']:.1f} there); "
        f"{settings.epochs} epochs on cached centre crops; "
        + (f"std over {len(result['top1_of_seed'])} seeds {100 * spread:.2f}" if spread is not None else "one seed")
    ]
    if result["at_grid_edge"]:
        lines.append(f"warning: the linear probe's rate {chosen['learning_rate']:g} lies at the edge of what is tried")
    return lines


def columns(result: Scores, headline: str) -> list[Column]:
    """One."""
    return [Column("linear", "linear")]


SPEC = ProbeSpec("linear", run, columns, LinearRecipe, notes=notes, always=True)
