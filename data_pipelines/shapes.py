"""The built-in data set on sheets of several shapes: as many digits of one numeral, on paper from 1:4 to 4:1.

What is in an image, and how large, is `demo`'s; only the outline differs. Squashed to squares, numerals lose their
proportions, which images at their own shape keep.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipelines.demo import (
    DIGIT_SIDES,
    DIGITS,
    GRID,
    MAX_SHIFT,
    MAX_SLANT,
    SIDE,
    Ingredients,
    Made,
    as_image,
    background_of,
    cover_of,
    draw_box,
    inked,
    write_images,
)

CELL = SIDE // GRID  # px
#: Rows and columns of cells: 64x64, 48x80, 80x48, 32x128 and 128x32 px, each 60 or 64 patches of 8 px.
SHAPES = ((4, 4), (3, 5), (5, 3), (2, 8), (8, 2))
_CANVAS = CELL * max(max(shape) for shape in SHAPES)  # px; sheets are cut from squares


def build_shapes(out: Path, seed: int = 0, train: int = 6000, val: int = 1000, progress: bool = False) -> Path:
    """Write `out/{train,val}/{0..9}/*.jpg` of the `SHAPES`, each as often, with a `.json` of `count`, `grade` and
    `labels` as of `demo.build_demo`, which says what it raises."""
    counts = {"train": train, "val": val}
    return write_images(Path(out), seed, counts, {"shapes": [list(shape) for shape in SHAPES]}, _draw_sheet, progress)


def _draw_sheet(given: Ingredients, rng: np.random.Generator) -> Made:
    rows, columns = SHAPES[int(rng.integers(len(SHAPES)))]
    label = int(given.labels[given.own[rng.integers(len(given.own))]])
    count = int(rng.integers(DIGITS[0], min(DIGITS[1], rows * columns) + 1))
    chosen = [int(number) for number in rng.choice(given.own[given.labels[given.own] == label], count)]
    photo = int(rng.integers(len(given.photos)))
    box = draw_box(rng, given.photos[photo].shape, given.split)
    mixed = background_of(given.photos[photo], box, _CANVAS, rng)[: rows * CELL, : columns * CELL]
    for digit, cell in zip(given.digits[chosen], rng.choice(rows * columns, count, replace=False), strict=True):
        side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
        slant = rng.uniform(-MAX_SLANT, MAX_SLANT)
        shift = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2)
        top, left = (round((place + 0.5) * CELL - side / 2) for place in divmod(int(cell), columns))
        cover = cover_of(digit, side, slant, (left + int(shift[0]), top + int(shift[1])), _CANVAS)
        mixed = inked(mixed, cover[: rows * CELL, : columns * CELL], rng)
    facts = {"count": count, "grade": count - DIGITS[0], "labels": [str(label)]}
    return Made(as_image(mixed), label, {}, facts, {"digits": chosen, "photo": photo, "box": box})
