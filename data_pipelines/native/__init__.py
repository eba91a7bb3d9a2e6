"""The kernel in C, where it is built: crops for `transforms/backends/native.py`, random numbers for `rng.py`."""

from __future__ import annotations

import importlib
from typing import Any

kernel: Any
try:
    kernel = importlib.import_module("data_pipelines.native._crops")
except ImportError:
    kernel = None

if not hasattr(kernel, "unfilter"):  # of an earlier checkout: it lacks what this one asks for
    kernel = None

BUILT = kernel is not None
HOW_TO_BUILD = "with a C compiler installed, run `python setup.py build_ext --inplace` in the checkout"
