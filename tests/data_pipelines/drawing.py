"""What tests have drawn for each row, by processes that import no torch."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from typing import Any

import numpy as np


def draw(*place: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(place)
    return {"drop_mask": rng.random((4, 4)) < 0.5, "token_mask": rng.random((2, 2)) < 0.3}


def heavy(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
    """Whether this process has torch."""
    return {"heavy": np.array("torch" in sys.modules)}


def dies(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
    """Nothing, but in step 2, where the process ends as by the kernel's killer."""
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


class Failing:
    """Raises something in row 5 of step 2."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.error = {"disk": OSError(5, "Input/output error", "/shards"), "mask": OSError("the mask is gone")}[
            given["what"]
        ]

    def __call__(self, seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        if (step, row) == (2, 5):
            raise self.error
        return {}


class Gated:
    """Step 1 waits for a file."""

    def __init__(self, given: str) -> None:
        self.gate = given

    def __call__(self, seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        deadline = time.monotonic() + 30
        while step == 1 and not os.path.exists(self.gate) and time.monotonic() < deadline:  # noqa: PTH110
            time.sleep(0.005)
        return {}


class Warning:
    """Warns of the same in every row of steps after the first."""

    def __init__(self, given: None) -> None:
        pass

    def __call__(self, seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        if step:
            logging.getLogger("drawing").warning("mind the %s", "gap")
        return {}


class WarningOfNothing(Warning):
    """Warns in words that don't go with their values, likewise."""

    def __call__(self, seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        if step:
            logging.getLogger("drawing").warning("%d things", "none")
        return {}


def draw_patches(seed: int, step: int, row: int, grids: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Of crops of their own shape: a number for each patch."""
    rng = np.random.default_rng((seed, step, row))
    return {"drawn": [rng.random(int(rows * columns)) for rows, columns in grids]}
