"""Several labels an image: one logistic regression a class, and the shares of the nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.measures import ranking_draws
from eval.outcomes import Outcome, scored
from eval.scores import HEADLINE_K
from eval.statistics import average_precision, blind_average_precision, mean_average_precision
from eval.stratified import stratified_split

#: scikit-learn's C: the inverse strength of regularisation, on standardised features.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_ELEMENTS = 2**25
_MOST_NAMED = 5


@dataclass(frozen=True)
class MultilabelSettings:
    """How much of train chooses the strength; how many neighbours vote, by cosine, each alike."""

    held_out: float = 0.1
    k: int = HEADLINE_K


def run(store: Store, settings: MultilabelSettings) -> Scores:
    """Mean average precision over classes of both; `per_class`: of the logistic regression, by the class's name."""
    train, val, name = store.train, store.val, store.headline
    features, others = train.inputs[name].to(store.device).float(), val.inputs[name].to(store.device).float()
    targets = train.labels.to(store.device)
    none = torch.zeros(len(targets), dtype=torch.int64)
    kept, rest = stratified_split(none, settings.held_out, store.seeds[0], train.groups)
    goodness: dict[float, float] = {}
    solution = None
    for strength in STRENGTHS:  # each solution starts the next, weaker one
        store.progress(f"multilabel: C = {strength:g}")
        solution = fit(features[kept], targets[kept], strength, solution)
        logits = apply(solution, features[rest]).cpu()
        found = mean_average_precision(logits, train.labels[rest], torch.ones(1, len(rest)))
        goodness[strength] = float(found.nan_to_num(0.0)[0])  # not defined where none of them has any label
    chosen = max(goodness, key=lambda strength: (goodness[strength], -strength))
    store.progress("multilabel: the chosen C on all of train")
    logits = apply(fit(features, targets, chosen, None), others).cpu()
    store.progress("multilabel: k-NN")
    votes = neighbour_shares(features, targets, others, settings.k)
    draws = ranking_draws(*logits.shape)
    ones = torch.ones(1, len(val.labels))
    per_class = {}
    for place, class_name in enumerate(store.class_names):
        precision, there = average_precision(logits[:, place], val.labels[:, place], ones)
        per_class[class_name] = float(precision[0]) if bool(there[0]) else None
    blind = blind_average_precision(len(val.labels), val.labels.sum(dim=0))
    return {
        "logistic": scored(Outcome("mean_average_precision", logits, val.labels), groups=val.groups, draws=draws),
        "knn": scored(Outcome("mean_average_precision", votes, val.labels), groups=val.groups, draws=draws),
        "per_class": per_class,
        "blind": float(blind[blind > 0].mean()),
        "input": name,
        "chosen": chosen,
        "held_out": goodness[chosen],
        "at_grid_edge": chosen in (STRENGTHS[0], STRENGTHS[-1]),
    }


Solution = tuple[Tensor, Tensor, Tensor, Tensor]  # mean and inverse deviation (d,), weight (c, d), bias (c,)


def fit(features: Tensor, targets: Tensor, strength: float, start: Solution | None, iterations: int = 100) -> Solution:
    """One logistic regression a class: C x the summed loss + |weight|^2 / 2, divided by C n, by L-BFGS; features (n, d)
    are standardised, targets (n, c) are 0 or 1."""
    mean, scale = features.mean(dim=0), (features.var(dim=0, correction=0) + 1e-6).rsqrt()
    standardised = (features - mean) * scale
    num_classes = targets.shape[1]
    weight = (
        features.new_zeros(num_classes, features.shape[1]) if start is None else start[2].clone()
    ).requires_grad_()
    bias = (features.new_zeros(num_classes) if start is None else start[3].clone()).requires_grad_()
    penalty = 1 / (2 * strength * len(features))
    descent = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        descent.zero_grad()
        logits = torch.addmm(bias, standardised, weight.T)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(features)
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        descent.step(objective)
    return mean, scale, weight.detach(), bias.detach()


def apply(solution: Solution, features: Tensor) -> Tensor:
    """(m, c) logits of features (m, d)."""
    mean, scale, weight, bias = solution
    return torch.addmm(bias, (features - mean) * scale, weight.T)


def neighbour_shares(train: Tensor, targets: Tensor, val: Tensor, k: int) -> Tensor:
    """(m, c) of the k nearest by cosine of `train` (n, d) with targets (n, c), the share that has each class."""
    train = F.normalize(train, dim=1)
    found = []
    for queries in val.split(max(1, _ELEMENTS // len(train))):
        similarities = F.normalize(queries, dim=1) @ train.T
        found.append(targets[similarities.topk(min(k, len(train)), dim=1).indices].mean(dim=1).cpu())
    return torch.cat(found)


def columns(result: Scores, headline: str) -> list[Column]:
    """Mean average precision of both."""
    return [
        Column(
            f"multilabel_{name}", f"{title} mAP", ((name,),), name == "logistic", key="value", chance=result["blind"]
        )
        for name, title in (("knn", "k-NN"), ("logistic", "logistic"))
    ]


def notes(result: Scores, settings: MultilabelSettings) -> list[str]:
    """What was chosen, and the classes that are found worst."""
    known = sorted((value, name) for name, value in result["per_class"].items() if value is not None)
    worst = ", ".join(f"{name} {100 * value:.1f}" for value, name in known[:_MOST_NAMED])
    edge = ", at the edge of what is tried" if result["at_grid_edge"] else ""
    return [
        f"multilabel: on {result['input']}, standardised, C {result['chosen']:g}{edge}, chosen on train; mean over "
        "classes of average precision; chance is that of a random order of the images",
        f"multilabel: the classes found worst are {worst}",
    ]


SPEC = ProbeSpec("multilabel", run, columns, MultilabelSettings, labels="several", notes=notes, always=True)
