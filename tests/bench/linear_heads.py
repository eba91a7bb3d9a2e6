"""A step of the linear probe's classifiers: gathered into memory that is used again, against a new matrix a step.

25,000 images, 10 classes, 13 rates, and the inputs of a ViT of width 384: five of up to 1,920 columns, each
standardised and not. `one gather`: what it would save at most to gather the whole row once for inputs of all widths.
"""

from __future__ import annotations

import argparse
import math

import torch
from _compare import compare
from einops import rearrange, repeat

from eval.linear_heads import Classifiers, Kind, fit
from eval.probes.linear import LEARNING_RATES, LinearRecipe

INPUTS = {"class": (1152, 1536), "mean": (1536, 1920), "both": (1152, 1920), "last 4": (0, 1536), "all": (0, 1920)}
CLASSES, BATCH = 10, 1024


def groups() -> list[list[Kind]]:
    """The kinds of each width."""
    by_width: dict[int, list[Kind]] = {}
    for name, (start, stop) in INPUTS.items():
        by_width.setdefault(stop - start, []).extend(Kind(name, flag) for flag in (False, True))
    return list(by_width.values())


@torch.no_grad()
def before(features: dict[str, torch.Tensor], labels: torch.Tensor, kinds: list[Kind], recipe: LinearRecipe) -> None:
    """The step as it was: every kind copied into one new matrix."""
    generator = torch.Generator().manual_seed(0)
    dim, rates = features[kinds[0].input].shape[1], len(LEARNING_RATES)
    weight = torch.zeros(len(kinds), CLASSES * rates, dim)
    bias = weight.new_zeros(len(kinds), CLASSES * rates, 1)
    momentum, bias_momentum, rate = torch.zeros_like(weight), torch.zeros_like(bias), torch.full_like(bias, 0.1)
    scaling = {kind: (torch.zeros(dim), torch.ones(dim)) for kind in kinds if kind.standardised}
    minus_one = torch.full((len(kinds), 1, rates, BATCH), -1.0)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            if len(rows) < BATCH:
                continue
            prepared = weight.new_empty(len(kinds), BATCH, dim)
            gathered: dict[str, torch.Tensor] = {}
            for place, kind in enumerate(kinds):
                if kind.input not in gathered:
                    gathered[kind.input] = features[kind.input].index_select(0, rows)
                if kind in scaling:
                    torch.sub(gathered[kind.input], scaling[kind][0], out=prepared[place]).mul_(scaling[kind][1])
                else:
                    prepared[place] = gathered[kind.input]
            logits = rearrange(torch.baddbmm(bias, weight, prepared.mT), "k (c h) b -> k c h b", c=CLASSES)
            gradient = logits.softmax(dim=1)
            gradient.scatter_add_(1, repeat(labels[rows], "b -> k 1 h b", k=len(kinds), h=rates), minus_one)
            gradient = rearrange(gradient, "k c h b -> k (c h) b").div_(BATCH)
            momentum.baddbmm_(gradient, prepared, beta=0.9)
            bias_momentum.mul_(0.9).add_(gradient.sum(dim=2, keepdim=True))
            weight.addcmul_(momentum, rate, value=-1)
            bias.addcmul_(bias_momentum, rate, value=-1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    matrix = torch.randn(asked.images, 1920, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (asked.images,), generator=torch.Generator().manual_seed(1))
    features = {name: matrix[:, start:stop] for name, (start, stop) in INPUTS.items()}
    recipe = LinearRecipe(epochs=1)
    rows = torch.arange(asked.images)

    def ours() -> None:
        for kinds in groups():
            fit(features, labels, rows, dict.fromkeys(kinds, LEARNING_RATES), CLASSES, recipe, 0, "cpu")

    def theirs() -> None:
        for kinds in groups():
            before(features, labels, kinds, recipe)

    compare("linear heads, an epoch", "images", asked.images, ours, theirs, asked.turns)

    steps = math.floor(asked.images / BATCH)
    heads = [
        Classifiers(tuple(kinds), torch.zeros(len(kinds), 1, 1), torch.zeros(len(kinds), 1, 1), {}, CLASSES)
        for kinds in groups()
    ]
    whole = torch.empty(BATCH, 1920)

    def per_input() -> None:
        for _ in range(steps):
            batch = torch.randint(asked.images, (BATCH,))
            for each in heads:
                each.prepare(features, batch)

    def at_once() -> None:
        for _ in range(steps):
            torch.index_select(matrix, 0, torch.randint(asked.images, (BATCH,)), out=whole)

    compare("of it, one gather against one an input", "images", asked.images, at_once, per_input, asked.turns)


if __name__ == "__main__":
    main()
