"""What happens to a crop's colours, as numbers that go to the device with the crop (imports no torch)."""

from __future__ import annotations

import numpy as np

from data_pipelines.transforms.params import JITTER_OPERATIONS, CropParams

NUM_OPERATIONS = len(JITTER_OPERATIONS)
GREY, BLUR, SOLARISE = 2 * NUM_OPERATIONS, 2 * NUM_OPERATIONS + 1, 2 * NUM_OPERATIONS + 2
#: Numbers that say what happens to a crop's colours: four operations of jitter (their place in `JITTER_OPERATIONS`,
#: -1 for none) in their order, the factor of each, then grey, the blur's radius in px (0: none) and solarise.
NUM_COLOURS = SOLARISE + 1


def write_colours(params: CropParams, out: np.ndarray) -> None:
    """Write what happens to a crop's colours into `out`, (NUM_COLOURS,) float32."""
    out[:NUM_OPERATIONS] = -1
    out[NUM_OPERATIONS:GREY] = 0
    for place, (name, factor) in enumerate(params.jitter):
        out[place] = JITTER_OPERATIONS.index(name)
        out[NUM_OPERATIONS + place] = int(factor * 255) % 256 if name == "hue" else factor  # levels of hue
    out[GREY] = params.grayscale
    out[BLUR] = params.blur_radius or 0
    out[SOLARISE] = params.solarise
