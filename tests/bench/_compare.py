"""Two ways to do the same thing, timed in turns within one run: machines are noisy, ratios less so."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def compare(
    what: str,
    unit: str,
    count: int,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    turns: int = 5,
    target: float | None = None,
) -> None:
    """Print the medians of both in `unit` per second (`count` of them a call), their ratio and what it should be."""
    ours()
    theirs()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(turns):
        for name, call in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: count / statistics.median(times) for name, times in seconds.items()}
    aim = "" if target is None else f" (target {target:g} x)"
    ratio = rate["ours"] / rate["theirs"]
    print(f"{what}: {rate['ours']:,.0f} against {rate['theirs']:,.0f} {unit}/s = {ratio:.2f} x{aim}", flush=True)
