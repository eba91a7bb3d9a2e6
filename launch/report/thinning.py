"""A series of any length in bounded memory, its spikes kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_PENDING = 4096  # values that are folded together
_MOST_BAD = 500  # steps of values that are no numbers, kept to be marked


class Thinned:
    """Values over steps in at most `2 * limit` buckets of neighbours, each with its mean, lowest and highest.

    While there are fewer values than that, each is a bucket of its own and nothing is lost. Values that are not finite
    are in no bucket: `num_bad` counts them and `bad_steps` has the first few hundred.
    """

    def __init__(self, limit: int = 500) -> None:
        self.limit = limit
        self.last: float | None = None
        self.num_bad = 0
        self.bad_steps: list[int] = []
        self._width = 1  # values a bucket
        self._steps: list[float] = []
        self._values: list[float] = []
        #: Rows: last step, sum of steps, sum, lowest, highest, count.
        self._buckets = np.empty((6, 0))

    def add(self, step: float, value: float) -> None:
        """One more value; steps do not fall, see `rewind`."""
        if not math.isfinite(value):
            self.num_bad += 1
            if len(self.bad_steps) < _MOST_BAD:
                self.bad_steps.append(int(step))
            return
        self.last = value
        self._steps.append(step)
        self._values.append(value)
        if len(self._values) >= max(_PENDING, self._width):
            self._fold()

    def rewind(self, step: float) -> None:
        """Forget what was added for `step` and later: a run that came back does these steps again."""
        self._fold(everything=True)
        self._buckets = self._buckets[:, self._buckets[0] < step]
        self.bad_steps = [bad for bad in self.bad_steps if bad < step]

    def columns(self) -> dict[str, list[float]]:
        """`x` (steps), `y` (means) and, where buckets hold several values, `lo` and `hi`; ready for JSON."""
        self._fold(everything=True)
        _, steps, total, low, high, count = self._buckets
        columns = {"x": np.round(steps / count), "y": total / count}
        if len(count) and count.max() > 1:
            columns |= {"lo": low, "hi": high}
        return {name: _short(values) for name, values in columns.items()}

    def extent(self) -> tuple[float, float] | None:
        """The lowest and the highest value; None where there is none."""
        self._fold(everything=True)
        if not self._buckets.shape[1]:
            return None
        return float(self._buckets[3].min()), float(self._buckets[4].max())

    def last_step(self) -> int | None:
        """The step of the last finite value."""
        if self._steps:
            return int(self._steps[-1])
        return int(self._buckets[0, -1]) if self._buckets.shape[1] else None

    def _fold(self, everything: bool = False) -> None:
        """Bring pending values into buckets: whole ones only, unless `everything` must go in."""
        whole = len(self._values) // self._width * self._width
        take = len(self._values) if everything else whole
        if not take:
            return
        steps, values = np.array(self._steps[:take]), np.array(self._values[:take])
        del self._steps[:take], self._values[:take]
        starts = np.arange(0, take, self._width)
        ends = np.minimum(starts + self._width, take)
        added = np.stack(
            [
                steps[ends - 1],
                np.add.reduceat(steps, starts),
                np.add.reduceat(values, starts),
                np.minimum.reduceat(values, starts),
                np.maximum.reduceat(values, starts),
                (ends - starts).astype(float),
            ]
        )
        self._buckets = np.concatenate([self._buckets, added], axis=1)
        while self._buckets.shape[1] > 2 * self.limit:
            self._halve()

    def _halve(self) -> None:
        pairs = np.arange(0, self._buckets.shape[1], 2)
        last, steps, total, low, high, count = self._buckets
        self._buckets = np.stack(
            [
                np.maximum.reduceat(last, pairs),
                *(np.add.reduceat(row, pairs) for row in (steps, total)),
                np.minimum.reduceat(low, pairs),
                np.maximum.reduceat(high, pairs),
                np.add.reduceat(count, pairs),
            ]
        )
        self._width *= 2


def _short(values: np.ndarray[Any, Any]) -> list[float]:
    """Six digits are more than a screen shows."""
    return [int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}") for value in values]
