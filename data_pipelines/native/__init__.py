"""The crop kernel in C, where it was built: the same pictures as `data_pipelines.wheels`, in half the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_pipelines.crops import CropJob

BUILT = False
HOW_TO_BUILD = "install a C compiler and run `pip install --no-deps --force-reinstall .` (or `-e .`) in the checkout"


def render(image: np.ndarray, jobs: Sequence[CropJob]) -> None:
    """Make the crops that `jobs` ask for; see `crops.Executor`."""
    raise NotImplementedError
