"""The crop kernel in C, where it is built: the pictures of Pillow with the same parameters, at nine times the pace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from data_pipelines.transforms.backends.base import CropJob

_crops: Any
try:
    from data_pipelines.transforms.backends.native import _crops
except ImportError:
    _crops = None

BUILT = _crops is not None
Stream: Any = _crops.Stream if BUILT else None  # see data_pipelines.rng
HOW_TO_BUILD = "with a C compiler installed, run `python setup.py build_ext --inplace` in the checkout"

_INTERPOLATIONS = {"bilinear": 0, "bicubic": 1, "lanczos": 2}
_OPERATIONS = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}


def render(image: np.ndarray, jobs: Sequence[CropJob], *, portable: bool = False) -> None:
    """Make the crops that `jobs` ask for; see `crops.Backend`.

    Args:
        image: (h, w, c) uint8 of any strides. RGB pixels that lie 3 or 4 bytes apart are read fastest.
        jobs: What to make.
        portable: Leave the processor's vector instructions alone; the bytes are the same.

    Raises:
        ValueError: A box that is not within the image, an array of another type or shape.
    """
    packed = [
        (
            out,
            params.box,
            _INTERPOLATIONS[interpolation],
            params.flip,
            tuple((_OPERATIONS[name], factor) for name, factor in params.jitter),
            params.grayscale,
            params.blur_radius or 0.0,
            params.solarise,
        )
        for params, interpolation, out in jobs
    ]
    _crops.render(image, packed, portable)
