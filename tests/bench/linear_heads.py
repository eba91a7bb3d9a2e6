"""What gathering costs of a step of the linear probe: an input at a time, against the whole row at once.

The images, 10 classes, 13 rates, and the inputs of a ViT of width 384: five of up to 1,920 columns, each standardised
and not. Where the share is small, it is no reason to train heads of all widths on one order of batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from eval.linear_heads import Kind, fit
from eval.probes.linear import LEARNING_RATES, LinearRecipe

INPUTS = {"class": (1152, 1536), "mean": (1536, 1920), "both": (1152, 1920), "last 4": (0, 1536), "all": (0, 1920)}
CLASSES, BATCH = 10, 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    matrix = torch.randn(asked.images, 1920, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (asked.images,), generator=torch.Generator().manual_seed(1))
    features = {name: matrix[:, start:stop] for name, (start, stop) in INPUTS.items()}
    rows = torch.arange(asked.images)
    kinds: dict[int, list[Kind]] = {}
    for name, (start, stop) in INPUTS.items():
        kinds.setdefault(stop - start, []).extend(Kind(name, flag) for flag in (False, True))
    recipe = LinearRecipe(epochs=4, batch_size=BATCH)
    steps = recipe.epochs * (asked.images // BATCH)

    def train() -> None:
        for of_width in kinds.values():
            fit(features, labels, rows, dict.fromkeys(of_width, LEARNING_RATES), CLASSES, recipe, 0, "cpu")

    def an_input_at_a_time() -> None:
        for _ in range(steps):
            batch = torch.randint(asked.images, (BATCH,))
            for values in features.values():
                values.index_select(0, batch)

    def the_row_at_once() -> None:
        for _ in range(steps):
            matrix.index_select(0, torch.randint(asked.images, (BATCH,)))

    seconds: dict[Callable[[], None], list[float]] = {train: [], an_input_at_a_time: [], the_row_at_once: []}
    for turn in range(asked.turns + 1):
        for call, found in seconds.items():
            start = time.perf_counter()
            call()
            found += [time.perf_counter() - start] if turn else []
    whole, apart, once = (1000 * statistics.median(found) / steps for found in seconds.values())
    print(f"linear heads: {whole:.1f} ms a step, of which gathering each input {apart:.2f}, all at once {once:.2f}")
    print(f"one gather for all would spare {100 * (apart - once) / whole:.1f} % of a step")


if __name__ == "__main__":
    main()
