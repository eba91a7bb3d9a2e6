"""Few labels: accuracy with 1 to 20 images a class, over several draws, by the nearest class mean and by logistic
regression.

Features are taken less the mean of train, of all its images and without a look at labels, and brought to length 1: so a
nearest mean is SimpleShot's (Wang et al. 2019, "CL2N"). The strength of the logistic regression is fixed, for so few
images leave none to choose it on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from eval.base import Column, ProbeSpec, Scores, Store
from eval.outcomes import with_right
from eval.scores import deviation_of, wilson

HEADLINE_SHOTS = 5
MOST_DRAWN = 2**26  # numbers of drawn features that are held at once: 256 MiB
_METHODS = ("mean", "logistic")


@dataclass(frozen=True)
class FewShotSettings:
    """How many images of a class are drawn, how often, and how strong the logistic regression is held back.

    strength: lambda of mean cross-entropy + lambda / 2 x |weight|^2, on features of length 1; the bias is free.
    """

    shots: tuple[int, ...] = (1, 2, 5, 10, 20)
    draws: int = 10
    strength: float = 1e-3

    def __post_init__(self) -> None:
        if HEADLINE_SHOTS not in self.shots or min(self.shots) < 1:
            raise ValueError(f"shots is {self.shots}; {HEADLINE_SHOTS} stands in the table and must be among them")
        if self.draws < 2 or self.strength <= 0:
            raise ValueError(f"draws is {self.draws} and strength {self.strength}; give two at least, and more than 0")


def prepared(train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
    """Both (.., d) float32 less the mean of `train`, of length 1."""
    centre = train.mean(dim=0)
    return F.normalize(train.float() - centre, dim=1), F.normalize(val.float() - centre, dim=1)


def orders(labels: Tensor, draws: int, seed: int) -> list[Tensor]:
    """For each class that `labels` (n,) have, its rows in random order, (draws, images of the class).

    n images of a class are the first n: what is drawn of few is among what is drawn of more.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0]
        found.append(rows[torch.rand(draws, len(rows), generator=generator).argsort(dim=1)])
    return found


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(draws, classes, d) of length 1, the mean of each class of features (draws, n, d) with labels (n,)."""
    members = F.one_hot(labels, num_classes).to(features)
    return F.normalize(einsum(members, features, "n c, r n d -> r c d"), dim=2)


def fit(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, *, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Weight (draws, classes, d) and bias (draws, classes) of a logistic regression of each draw's features (draws, n,
    d), n images with labels (n,).

    All draws are fitted as one problem, the sum of theirs: it is least where each of them is, and its matrix products
    are large enough for the machine. With fewer images than dimensions the weight is a sum of the images, and
    is sought there: in n dimensions, and not in d.
    """
    draws, num, dim = features.shape
    basis = None
    if num < dim:  # rows of `basis` are an orthonormal basis of what the images span: no distance changes
        basis = torch.linalg.qr(features.mT).Q.mT
        features = einsum(features, basis, "r n d, r k d -> r n k")
    weight = features.new_zeros(draws, num_classes, features.shape[2], requires_grad=True)
    bias = features.new_zeros(draws, 1, num_classes, requires_grad=True)
    target = labels.repeat(draws)
    descent = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-9, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        descent.zero_grad()
        logits = torch.baddbmm(bias, features, weight.mT)
        fitted = F.cross_entropy(rearrange(logits, "r n c -> (r n) c"), target, reduction="sum") / num
        loss = fitted + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        descent.step(objective)
    weight = weight.detach()
    if basis is not None:
        weight = einsum(weight, basis, "r c k, r k d -> r c d")
    return weight, bias.detach()[:, 0]


def nearest_mean(features: Tensor, labels: Tensor, num_classes: int, strength: float) -> tuple[Tensor, Tensor | None]:
    """The same by cosine to each class's mean, without a bias."""
    return class_means(features, labels, num_classes), None


_HEADS: dict[str, Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor | None]]] = {
    "mean": nearest_mean,
    "logistic": fit,
}


def few_shot_right(
    train: Tensor,
    train_labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    *,
    settings: FewShotSettings,
    seed: int = 0,
    methods: Sequence[str] = _METHODS,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """For each number of shots, by method (`mean`, `logistic`), (draws, m) which of `val` (m, d) each draw gets right.

    Features are `prepared`. Classes that only val has can't be told: theirs are wrong.
    """
    known, train_labels = train_labels.unique(), train_labels.cpu()
    of_class = orders(train_labels, settings.draws, seed)
    places = torch.searchsorted(known.cpu(), train_labels)  # classes that there are, counted from 0
    known, val_labels = known.to(train.device), val_labels.to(train.device)
    for shots in settings.shots:
        rows = torch.cat([order[:, :shots] for order in of_class], dim=1)  # (draws, n): n is the same of every draw
        labels = places[rows[0]].to(train.device)
        right: dict[str, list[Tensor]] = {method: [] for method in methods}
        for part in rows.split(max(1, MOST_DRAWN // (rows.shape[1] * train.shape[1]))):
            flat = train.index_select(0, rearrange(part, "r n -> (r n)").to(train.device))
            features = rearrange(flat, "(r n) d -> r n d", r=len(part))
            for method in methods:
                weight, bias = _HEADS[method](features, labels, len(known), settings.strength)
                for place in range(len(part)):  # one draw at a time: (m, classes) is as much as is held
                    logits = val @ weight[place].T if bias is None else torch.addmm(bias[place], val, weight[place].T)
                    right[method].append(known[logits.argmax(dim=1)] == val_labels)
        yield shots, {method: torch.stack(found) for method, found in right.items()}


def scored_over_draws(right: Tensor, groups: Tensor | None = None) -> Scores:
    """The mean `top1` of `right` (draws, m), and how sure it is.

    The standard error is that of the draws and that over images (or `groups` (m,) of them), added in squares; what
    draws and images share is counted in both, so it errs on the large side. The interval is Wilson's, of as many images
    as would have that error.
    """
    share = right.float().mean(dim=0).cpu()  # of the draws that have each image right
    of_draw = right.float().mean(dim=1).tolist()
    top1 = float(share.mean())
    scores = with_right({"top1": top1}, share, groups)
    over_images = float(share.std() / math.sqrt(len(share))) if groups is None else scores["standard_error"]
    over_draws = (deviation_of(of_draw) or 0.0) / math.sqrt(len(of_draw))
    error = math.hypot(over_images, over_draws)
    worth = min(float(len(share)), top1 * (1 - top1) / error**2) if error > 0 else float(len(share))
    return {
        **scores,
        "std_over_draws": deviation_of(of_draw),
        "standard_error": error,
        "interval": list(wilson(top1, max(1, round(worth)))),
    }


def run(store: Store, settings: FewShotSettings) -> Scores:
    """{method: {shots: accuracy}} of the headline feature, and what classes are too small."""
    train, val, name = store.train, store.val, store.headline
    features = prepared(train.inputs[name].to(store.device), val.inputs[name].to(store.device))
    found: Scores = {method: {} for method in _METHODS}
    store.progress(f"few-shot: {settings.draws} draws of {', '.join(map(str, settings.shots))} images a class")
    for shots, right in few_shot_right(
        features[0], train.labels, features[1], val.labels, settings=settings, seed=store.seeds[0]
    ):
        for method, each in right.items():
            found[method][str(shots)] = scored_over_draws(each, val.groups)
    _, images = train.labels.unique(return_counts=True)
    return {
        "input": name,
        **found,
        "num_classes": len(images),
        "small_classes": {str(shots): int((images < shots).sum()) for shots in settings.shots},
    }


def columns(result: Scores, headline: str) -> list[Column]:
    """Five images a class in the table, the others below it; blindly each class is as likely, as shots are balanced."""
    titles = {"mean": "nearest mean", "logistic": "logistic"}
    return [
        Column(
            f"few_shot_{shots}{'_logistic' if method == 'logistic' else ''}", f"{shots}-shot {titles[method]}",
            ((method, shots),), headline=method == "mean", chance=1 / result["num_classes"],
            more=int(shots) != HEADLINE_SHOTS,
        )
        for shots in result["mean"] for method in _METHODS
    ]  # fmt: skip


def notes(result: Scores, settings: FewShotSettings) -> list[str]:
    """What the numbers were made with, and which of them have fewer images than they say."""
    lines = [
        f"few-shot: on {result['input']} less train's mean, of length 1; {settings.draws} draws of train, ± over draws "
        f"and images; nearest class mean by cosine; logistic regression with lambda {settings.strength:g}"
    ]
    small = [
        f"{num} of {result['num_classes']} classes have fewer than {shots}"
        for shots, num in result["small_classes"].items()
        if num
    ]
    if small:
        lines.append(f"few-shot: {', '.join(small)} images to draw from; they give what they have")
    return lines


SPEC = ProbeSpec("few_shot", run, columns, FewShotSettings, labels=("class", "grade"), notes=notes)
