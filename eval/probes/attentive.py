"""Attentive probe: a learned query asks the frozen patch tokens, and its answer is classified.

Models that are trained to reconstruct have no token that stands for the image, so a mean of their tokens undersells
them: MAE's ViT-B goes from 67.7 (linear) to 75.6 on ImageNet. The forms are those of `eval.pooling`: `cross`
(V-JEPA's), `capi` and `efficient` (few parameters); `mean` is trained alike without attention, to tell what that adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eval.base import Column, NativeTokens, ProbeSpec, Scores, Store
from eval.outcomes import with_right
from eval.patches import AnyTokens
from eval.pooling import FORMS, Pooling, build
from eval.scores import deviation_of
from eval.stratified import stratified_split

BASELINE = "mean"  # what every form is held to
_BETAS, _EPS = (0.9, 0.999), 1e-8
_SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class AttentiveSettings:
    """How the classifiers are trained: AdamW, rates warmed up over a tenth of the steps, then cosine to zero."""

    forms: tuple[str, ...] = ("cross", "efficient")
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # trained side by side; of several ..
    bounds: tuple[float, float] = (3e-5, 0.1)  # .. more are tried up to here while the best lies at the edge
    passes: int = 10  # over the images; more, where that makes ..
    least_steps: int = 600  # .. fewer steps than these: from its small first weights a query learns slowly
    choosing: int = 3  # the training that chooses the rate is so many times shorter
    batch_size: int = 256  # smaller where train has fewer than 16 such batches
    weight_decay: float = 0.05  # of matrices
    held_out: float = 0.1  # share of train that chooses the rate

    def __post_init__(self) -> None:
        for form in self.forms:
            if form not in FORMS or form == BASELINE:
                raise ValueError(f"forms has {form!r}; there are {', '.join(set(FORMS) - {BASELINE})}")
        if not self.forms or not self.rates or min(self.passes, self.choosing) < 1 or self.batch_size < 2:
            raise ValueError(f"an attentive probe needs a form, a rate, a pass and batches of two; got {self}")


class Trained(NamedTuple):
    """r classifiers, and what the last pass of their training showed of each: the share it had right."""

    heads: Pooling
    share: list[float]


@dataclass(frozen=True)
class Chosen:
    """The rate of a form, and the share of the held-out part of train that it classifies rightly."""

    rate: float
    held_out: float
    held_out_loss: float = field(repr=False)
    at_edge: bool


def train(
    form: str,
    tokens: AnyTokens,
    labels: Tensor,
    rows: Tensor,
    num_classes: int,
    rates: Sequence[float],
    settings: AttentiveSettings,
    seeds: Sequence[int],
    device: str,
) -> Trained:
    """Classifiers of one form on the images `rows` (n,) of `tokens`, side by side: one for each rate and its seed.

    They share their batches, whose order is of the first seed, so what is read of the tokens is read once; they differ
    by rates, and by first weights where the seeds do. `labels` are of all images.
    """
    heads = build(form, tokens.dim, num_classes, seeds).to(device)
    generator = torch.Generator().manual_seed(seeds[0])
    size = min(settings.batch_size, max(16, len(rows) // 16), len(rows))
    per_pass = len(rows) // size
    steps = max(settings.passes, -(-settings.least_steps // per_pass)) * per_pass
    descent = _AdamW(heads, torch.tensor(rates, device=device), settings.weight_decay)
    right, seen = torch.zeros(len(rates), device=device), 0
    heads.train()
    for step in range(steps):
        if step % per_pass == 0:  # the ragged end of a permutation is left out, another one every pass
            order = rows[torch.randperm(len(rows), generator=generator)]
        begin = step % per_pass * size
        batch = order[begin : begin + size]
        target = repeat(labels[batch].to(device), "b -> r b", r=len(rates))
        logits = heads(*shown(tokens, batch, device))
        # the sum over classifiers: each gets the gradient of its own mean
        loss = F.cross_entropy(logits.mT, target, reduction="sum") / len(batch)
        gradients = torch.autograd.grad(loss, list(heads.parameters()))
        descent.step(gradients, _schedule(step, steps))
        if step >= steps - per_pass:
            right += (logits.argmax(dim=2) == target).sum(dim=1)
            seen += len(batch)
    heads.eval()
    return Trained(heads, (right / max(seen, 1)).tolist())


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    decayed = max(0, step - warmup) / max(1, steps - warmup)
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * decayed))


class _AdamW:
    """Loshchilov & Hutter 2019, with a rate of its own for each place of the parameters' leading axis."""

    def __init__(self, heads: Pooling, rates: Tensor, weight_decay: float) -> None:
        self.parameters, self.rates, self.weight_decay, self.steps = list(heads.parameters()), rates, weight_decay, 0
        self.moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in self.parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], share: float) -> None:
        """One step at `share` of the rates."""
        self.steps += 1
        corrections = [1 - beta**self.steps for beta in _BETAS]
        for parameter, gradient, (first, second) in zip(self.parameters, gradients, self.moments, strict=True):
            rate = (self.rates * share).view(-1, *[1] * (parameter.ndim - 1))
            first.lerp_(gradient, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            if parameter.ndim > 2:  # with the axis of classifiers: a matrix
                parameter.mul_(1 - rate * self.weight_decay)
            parameter.sub_((first / corrections[0]) / ((second / corrections[1]).sqrt_().add_(_EPS)) * rate)


def shown(tokens: AnyTokens, rows: Tensor, device: str) -> tuple[Tensor, Tensor | None]:
    """What classifiers are given of the images `rows` (b,): tokens (b, t, d), and which of these (b, t) each image has;
    None: all, as where images are of one size."""
    if not isinstance(tokens, NativeTokens):
        return tokens[rows].to(device), None
    images = tokens.images(rows)
    there = torch.arange(max(map(len, images))) < torch.tensor([len(image) for image in images])[:, None]
    return pad_sequence(images, batch_first=True).to(device), there.to(device)


@torch.no_grad()
def score(heads: Pooling, tokens: AnyTokens, labels: Tensor, rows: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """(r, m) which of the images `rows` each classifier gets right, and (r,) its mean loss; of a diverged one none,
    and inf."""
    right, loss = [], torch.zeros(heads.num, dtype=torch.float64, device=device)
    for batch in rows.split(_SCORED_AT_ONCE):
        logits = heads(*shown(tokens, batch, device))
        target = repeat(labels[batch].to(device), "b -> r b", r=heads.num)
        right.append(logits.argmax(dim=2) == target)
        loss += F.cross_entropy(logits.mT, target, reduction="none").sum(dim=1).double()
    diverged = ~loss.isfinite()
    return torch.cat(right, dim=1) & ~diverged[:, None], (loss / len(rows)).masked_fill(diverged, math.inf)


def choose(
    form: str, tokens: AnyTokens, labels: Tensor, groups: Tensor | None, num_classes: int, settings: AttentiveSettings,
    seed: int, device: str,
) -> Chosen:  # fmt: skip
    """The rate that is best on a held-out part of train after a shorter training; of equals the one of the smallest
    loss. While the best lies at the edge of those tried, two more beyond it are tried."""
    kept, rest = stratified_split(labels, settings.held_out, seed, groups)
    shorter = replace(
        settings, passes=-(-settings.passes // settings.choosing), least_steps=settings.least_steps // settings.choosing
    )
    tried: dict[float, tuple[float, float]] = {}  # rate -> share that is right, - loss
    wanted = [*settings.rates]
    while wanted:
        heads, _ = train(form, tokens, labels, kept, num_classes, wanted, shorter, [seed] * len(wanted), device)
        right, loss = score(heads, tokens, labels, rest, device)
        tried |= zip(wanted, zip(right.float().mean(dim=1).tolist(), (-loss).tolist(), strict=True), strict=True)
        best = max(tried, key=tried.__getitem__)
        wanted = _beyond(best, tried, settings.bounds) if len(settings.rates) > 1 else []
    share, minus_loss = tried[best]
    if not math.isfinite(minus_loss):
        raise ValueError(
            f"all {len(tried)} attentive probes of the form {form} diverged, at rates {min(tried):g} .. "
            f"{max(tried):g}; look for tokens that are not finite, or give smaller rates"
        )
    edge = len(settings.rates) > 1 and share < 1 and best in (min(tried), max(tried))
    return Chosen(best, share, -minus_loss, edge)


def _beyond(best: float, tried: Mapping[float, tuple[float, float]], bounds: tuple[float, float]) -> list[float]:
    """Two rates beyond the edge at which the best lies, within the bounds; none where all of them diverged, or where it
    makes no mistake."""
    share, minus_loss = tried[best]
    if not math.isfinite(minus_loss) or share == 1 or best not in (min(tried), max(tried)):
        return []
    factors = (3, 10) if best == max(tried) else (1 / 3, 1 / 10)
    return [rate for factor in factors if bounds[0] <= (rate := float(f"{best * factor:.1g}")) <= bounds[1]]


class _Means:
    """The mean of each image's tokens as its only one: read once, where nothing else is looked at."""

    def __init__(self, tokens: AnyTokens, at_once: int) -> None:
        self.dim, self.grid = tokens.dim, (1, 1)
        parts = torch.arange(len(tokens)).split(at_once)
        if isinstance(tokens, NativeTokens):
            means = [torch.stack([image.mean(dim=0, keepdim=True) for image in tokens.images(rows)]) for rows in parts]
        else:
            means = [reduce(tokens[rows], "b t d -> b 1 d", "mean") for rows in parts]
        self.values = torch.cat(means)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.values[rows]


def run(store: Store, settings: AttentiveSettings) -> Scores:
    """{form: accuracy} of every form and of the mean of tokens, over seeds; nothing for raw pixels, which have none."""
    tokens, val_tokens = store.train.tokens, store.val.tokens
    if store.train.pooled_as == "pixels":
        return {}
    if tokens is None or val_tokens is None:
        raise ValueError("an attentive probe reads patch tokens, and this store has none; make one with --tokens")
    labels, val, classes = store.train.labels, store.val, store.num_classes
    found: Scores = {}
    for form in (*settings.forms, BASELINE):
        store.progress(f"attentive: {form}, rates {min(settings.rates):g} to {max(settings.rates):g}")
        if form == BASELINE:
            tokens, val_tokens = _Means(tokens, settings.batch_size), _Means(val_tokens, settings.batch_size)
        chosen = choose(
            form, tokens, labels, store.train.groups, classes, settings, store.seeds[0], store.device
        )  # fmt: skip
        store.progress(f"attentive: {form}, the chosen rate {chosen.rate:g}")
        rates, every = [chosen.rate] * len(store.seeds), torch.arange(len(labels))
        heads, on_train = train(form, tokens, labels, every, classes, rates, settings, store.seeds, store.device)
        right, _ = score(heads, val_tokens, val.labels, torch.arange(len(val.labels)), store.device)
        of_seed = right.float().mean(dim=1).tolist()
        share_right = right.float().mean(dim=0).cpu()
        found[form] = {
            **with_right({"top1": float(share_right.mean())}, share_right, val.groups),
            "rate": chosen.rate,
            "at_edge": chosen.at_edge,
            "held_out": chosen.held_out,
            "on_train": sum(on_train) / len(on_train),
            "parameters": sum(each[0].numel() for each in heads.parameters()),
            "top1_of_seed": dict(zip(map(str, store.seeds), of_seed, strict=True)),
            "std_over_seeds": deviation_of(of_seed),
        }
    return found


def columns(result: Scores, headline: str) -> list[Column]:
    """The first form in the table; the others and the mean of tokens below it."""
    return [
        Column(
            "attentive" if not place else f"attentive_{form}",
            {"cross": "attentive", BASELINE: "mean of tokens, trained alike"}.get(form, f"attentive, {form}"),
            ((form,),), headline=not place, more=place > 0,
        )
        for place, form in enumerate(result)
    ]  # fmt: skip


def notes(result: Scores, settings: AttentiveSettings) -> list[str]:
    """How each form was trained, and an explanation where none is better than the mean of the same tokens."""
    if not result:
        return []
    forms = [form for form in result if form != BASELINE]
    told = "; ".join(
        f"{form} of {result[form]['parameters']:,} parameters at lr {result[form]['rate']:g}" for form in forms
    )
    lines = [
        f"attentive: {told}; AdamW, {settings.passes} passes or more over frozen tokens, rates of "
        f"{min(settings.rates):g} .. {max(settings.rates):g} and beyond, chosen on {100 * settings.held_out:g} % held "
        "out of train; seeds are of first weights"
    ]
    lines += [
        f"warning: the attentive probe's rate {result[form]['rate']:g} ({form}) lies at the edge of what is tried"
        for form in forms
        if result[form]["at_edge"]
    ]
    best = max(forms, key=lambda form: result[form]["held_out"])
    gain = result[best]["top1"] - result[BASELINE]["top1"]
    if gain <= result[best]["standard_error"]:
        ours, mean = result[best], result[BASELINE]
        why = (
            "it knows its train images by heart, so more of them would help"
            if ours["on_train"] - ours["top1"] > mean["on_train"] - mean["top1"] + 0.05
            else "it has not even learned train, so more passes would help"
            if ours["on_train"] < mean["on_train"]
            else "the tokens say of the image what their mean says"
        )
        lines.append(
            f"attentive: {best} is no better than the mean of the same tokens ({100 * gain:+.1f}): "
            f"{100 * ours['on_train']:.1f} on train in its last pass, the mean {100 * mean['on_train']:.1f}; {why}"
        )
    return lines


SPEC = ProbeSpec(
    "attentive", run, columns, AttentiveSettings, needs="tokens", labels=("class", "grade"), notes=notes, native=True
)
