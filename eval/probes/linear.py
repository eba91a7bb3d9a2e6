"""Linear probe: many linear classifiers on cached frozen features, one of them chosen without a look at val.

The grid is DINOv2's (Oquab et al. 2023, appendix B.3): learning rates x which blocks x class token with or without the
mean of patch tokens. MAE's variant (He et al. 2022, appendix A.1), a BatchNorm without affine parameters before the
linear layer, is one more axis: on frozen cached features it is standardisation with train's statistics. MAE's LARS is
not used: it steadies batches of 16,384, and here the batch is about 1,024.

Most of the grid is far from the best, which a tenth of the training shows already. So all of it is trained for a few
epochs; only the best kinds, at the rates about their best, are trained in full, and of these one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.linear_heads import Kind, batch_size_of, fit
from eval.measures import class_measures, measure_columns, measure_notes, ranks
from eval.outcomes import with_right
from eval.scores import deviation_of, mean_of
from eval.stratified import stratified_split

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOST_WEIGHTS = 2**26  # of all heads that are trained side by side: 256 MiB, and twice as much beside them


@dataclass(frozen=True)
class LinearRecipe:
    """How the linear layers are trained: SGD with momentum, no weight decay, cosine to zero."""

    learning_rates: tuple[float, ...] = LEARNING_RATES  # at batch size 256, scaled linearly; of several ..
    bounds: tuple[float, float] = (1e-8, 100.0)  # .. more are tried up to here while the best lies at the edge
    standardised: tuple[bool, ...] = (False, True)  # MAE's BatchNorm without affine parameters
    epochs: int = 100
    screening_epochs: int = 10  # of all of the grid; as many as `epochs`, and none of it is left out
    finalists: int = 3  # kinds of input that are trained in full, of those that may yet be the best
    batch_size: int = 1024  # smaller where train has fewer than 16 such batches
    momentum: float = 0.9
    held_out: float = 0.1  # share of train that chooses the head

    def __post_init__(self) -> None:
        if (
            min(self.epochs, self.screening_epochs, self.finalists, self.batch_size) < 1
            or not self.learning_rates
            or not self.standardised
        ):
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
    right: Tensor = field(repr=False, compare=False)  # (m,) of seeds, the share whose head has each val image right
    logits: Tensor = field(repr=False, compare=False)  # (m, classes) of val, by the first seed's head
    chosen: Head
    best_of_input: dict[str, float]  # held-out accuracy of the best head on each input, after what it was trained
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
    groups: Tensor | None = None,
    recipe: LinearRecipe | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> LinearScores:
    """Train every head on 90 % of train, choose on the other 10 %, train the choice on all of train, test on val.

    `train` and `val` name the feature sets to choose from, (n, d) and (m, d) with d of each set its own; labels are
    (n,) and (m,) in 0 .. num_classes - 1. The first seed splits train (stratified; of `groups` (n,) each lies in one
    part) and makes the choice; every seed then draws its own initial weights and order of batches for the chosen head.
    `progress` is told what runs. Features stay where they lie; batches move to `device`.
    """
    recipe = recipe or LinearRecipe()
    if not seeds:
        raise ValueError("seeds is empty; give at least one, such as (0,)")
    if set(train) != set(val) or not train:
        raise ValueError(f"train has the feature sets {sorted(train)} and val {sorted(val)}; they must be the same")
    train_labels, val_labels = train_labels.cpu(), val_labels.cpu()
    kept, held_out = stratified_split(train_labels, recipe.held_out, seeds[0], groups)

    def tried_for(epochs: int, wanted: Mapping[Kind, Sequence[float]]) -> dict[Kind, list[Head]]:
        shorter = replace(recipe, epochs=epochs)
        found: dict[Kind, list[Head]] = {kind: [] for kind in wanted}
        for rates_of in _passes(wanted, train, num_classes):
            told = "; ".join(f"{kind}, rates to {rates[-1]:g}" for kind, rates in rates_of.items())
            progress(f"linear, {epochs} epochs: {told}")
            fitted = fit(train, train_labels, kept, rates_of, num_classes, shorter, seeds[0], device)
            cells = [(kind, rate) for kind, rates in rates_of.items() for rate in rates]
            for (kind, rate), share, loss in zip(cells, *fitted.score(train, train_labels, held_out)[::2], strict=True):
                found[kind].append(Head(*kind, rate, share, loss))
        return found

    kinds = [Kind(name, flag) for name in train for flag in recipe.standardised]
    wanted: dict[Kind, Sequence[float]] = dict.fromkeys(kinds, recipe.learning_rates)
    screened: dict[Kind, list[Head]] = {}
    if recipe.screening_epochs < recipe.epochs:
        screened = tried_for(recipe.screening_epochs, wanted)
        wanted = _finalists(screened, recipe, len(held_out))
    tried: dict[Kind, list[Head]] = {kind: [] for kind in wanted}
    while wanted:
        for kind, found_heads in tried_for(recipe.epochs, wanted).items():
            tried[kind] += found_heads
        enough = _enough([head for heads in tried.values() for head in heads], len(held_out))
        wanted = {kind: rates for kind in wanted if (rates := _further(tried[kind], recipe.bounds, enough))}
    heads = [head for heads in tried.values() for head in heads]
    chosen = _best(heads)
    kind = Kind(chosen.input, chosen.standardised)
    beside = [head.learning_rate for head in tried[kind]]
    if not math.isfinite(chosen.held_out_loss):
        raise ValueError(
            f"all {len(heads)} linear heads diverged, at rates {min(beside):g} .. {max(beside):g}; look for values "
            "that are not finite in the features, or give smaller learning_rates"
        )

    everything, all_val = torch.arange(len(train_labels)), torch.arange(len(val_labels))
    top1, top5 = [], []
    right, logits = torch.zeros(len(val_labels)), torch.empty(0)
    for place, seed in enumerate(seeds):
        progress(f"linear: the chosen head, seed {seed}")
        rates_of = {kind: [chosen.learning_rate]}
        classifiers = fit(train, train_labels, everything, rates_of, num_classes, recipe, seed, device)
        found = classifiers.predict(val, all_val)
        rank = ranks(found, val_labels)
        logits = found if not place else logits
        right += (rank < 1).float() / len(seeds)
        top1.append(int((rank < 1).sum()) / len(rank))
        top5.append(int((rank < 5).sum()) / len(rank))
    return LinearScores(
        top1=tuple(top1),
        top5=tuple(top5) if num_classes > 5 else None,
        right=right,
        logits=logits,
        chosen=chosen,
        best_of_input={
            name: max(head.held_out for of in (screened | tried).values() for head in of if head.input == name)
            for name in train
        },
        at_grid_edge=len(beside) > 1 and chosen.held_out < 1 and chosen.learning_rate in (min(beside), max(beside)),
        rates=tuple(sorted(beside)),
        batch_size=batch_size_of(recipe.batch_size, len(train_labels)),
    )


def _best(heads: Sequence[Head]) -> Head:
    """The head that classifies most of the held-out part rightly, of equals the one of the smallest loss."""
    return max(heads, key=lambda head: (head.held_out, -head.held_out_loss))


def _enough(heads: Sequence[Head], num_held_out: int) -> float:
    """The held-out share from which on more rates are worth their time: three standard errors below the best."""
    share = _best(heads).held_out
    return share - 3 * math.sqrt(share * (1 - share) / num_held_out)


def _finalists(
    screened: Mapping[Kind, Sequence[Head]], recipe: LinearRecipe, num_held_out: int
) -> dict[Kind, Sequence[float]]:
    """The kinds that are trained in full, the best first, and the rates about the best of each: after more epochs a
    smaller one may be the best, hardly a larger one."""
    enough = _enough([head for heads in screened.values() for head in heads], num_held_out)
    best_of = {kind: _best(heads) for kind, heads in screened.items()}
    ordered = sorted(best_of, key=lambda kind: (-best_of[kind].held_out, best_of[kind].held_out_loss))
    chosen = [kind for kind in ordered if best_of[kind].held_out >= enough][: recipe.finalists]
    rates = sorted(recipe.learning_rates)

    def about(rate: float) -> tuple[float, ...]:
        place = rates.index(rate)
        return tuple(rates[max(0, place - 3) : place + 2])

    return {kind: about(best_of[kind].learning_rate) for kind in chosen}


def _further(tried: Sequence[Head], bounds: tuple[float, float], enough: float) -> list[float]:
    """Three rates beyond the edge at which the best of `tried` lies, within the bounds.

    None where it lies inside, where it is not `enough`, so that more rates would hardly make it the best of all, and
    where it makes no mistake.
    """
    rates, best = [head.learning_rate for head in tried], _best(tried)
    if len(rates) < 2 or not math.isfinite(best.held_out_loss) or not enough <= best.held_out < 1:
        return []
    if best.learning_rate == max(rates):
        beyond = [best.learning_rate * factor for factor in (2, 5, 10)]
    elif best.learning_rate == min(rates):
        beyond = [best.learning_rate / factor for factor in (2, 5, 10)]
    else:
        return []
    # ten times a tenth is not always one: rates are round numbers here
    return [rate for rate in (float(f"{rate:.6g}") for rate in beyond) if bounds[0] <= rate <= bounds[1]]


def _passes(
    wanted: Mapping[Kind, Sequence[float]], features: Mapping[str, Tensor], num_classes: int
) -> Iterator[dict[Kind, Sequence[float]]]:
    """What is trained side by side: the kinds of one input, and no more rates of them than fit in memory."""
    for name in dict.fromkeys(kind.input for kind in wanted):
        most = max(1, MOST_WEIGHTS // (features[name].shape[1] * num_classes))
        cells = [(kind, rate) for kind, rates in wanted.items() if kind.input == name for rate in rates]
        for first in range(0, len(cells), most):
            part = cells[first : first + most]
            yield {kind: [rate for of, rate in part if of == kind] for kind in dict.fromkeys(kind for kind, _ in part)}


def run(store: Store, settings: LinearRecipe) -> Scores:
    """Accuracy of the chosen head, the mean over seeds, and how it was chosen among all inputs."""
    train, val = store.train, store.val
    found = linear_probe(
        train.inputs, train.labels, val.inputs, val.labels, num_classes=store.num_classes, groups=train.groups,
        recipe=settings, seeds=store.seeds, device=store.device, progress=store.progress,
    )  # fmt: skip
    plain = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("right", "logits", "chosen")}
    return {
        **plain,
        "chosen": asdict(found.chosen),
        **with_right({"top1": mean_of(found.top1)}, found.right, val.groups),
        "top5": None if found.top5 is None else mean_of(found.top5),
        "measures": class_measures(found.logits, val.labels, train.labels, store.class_names, val.groups)
        | {"names": list(store.class_names)},
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
    return lines + measure_notes("linear", result["measures"])


def columns(result: Scores, headline: str) -> list[Column]:
    """Its accuracy; more of its measures."""
    return [Column("linear", "linear"), *measure_columns("linear", result["measures"])]


SPEC = ProbeSpec("linear", run, columns, LinearRecipe, labels=("class", "grade"), notes=notes, always=True)
