"""The samples of a random step of a billion, each of another pass, so that nothing is known from before."""

from __future__ import annotations

import statistics
import time

import numpy as np

from data_pipelines.order import Order

NUM_SHARDS, SAMPLES, BATCH, TURNS, GOAL_MS = 100_000, 10_000, 4096, 25, 100


def main() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(SAMPLES - 500, SAMPLES + 500, NUM_SHARDS)
    order = Order(0, sizes.tolist(), BATCH)
    milliseconds = []
    for step in draw.choice(100, TURNS, replace=False) * order.steps_per_pass + draw.integers(
        order.steps_per_pass, size=TURNS
    ):
        began = time.perf_counter()
        order.ids(int(step))
        milliseconds.append(1000 * (time.perf_counter() - began))
    print(
        f"seek to a random step of {order.num_samples:,} samples in {NUM_SHARDS:,} shards: median "
        f"{statistics.median(milliseconds):.0f} ms, slowest {max(milliseconds):.0f} ms (goal: {GOAL_MS} ms)"
    )


if __name__ == "__main__":
    main()
