"""The built-in data set's other half: numerals of two kinds in one image, near and far.

What `demo` has in every image once is different here from place to place: what a segmentation, a detector or several
labels need. The ink, the paper and the splits are the same. The class of an image is the numeral that is there most
often. A near numeral is large and covers a far one; `.depth.png` has its distance in mm, of the paper `WALL`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.demo import (
    MAX_SLANT,
    SIDE,
    Ingredients,
    Made,
    as_image,
    background_of,
    cover_of,
    draw_box,
    inked,
    outlined,
    write_images,
)
from data_pipelines.demo_captions import scene_captions

COUNT = (3, 9)  # fewest and most digits in an image
GRID = 3  # they lie in cells of a grid, moved at random
NEAR, FAR, WALL = 1000, 2400, 3000  # mm
SIDE_AT_NEAR = 0.4  # of the image's side; at twice the distance half as large
MAX_SHIFT = 0.06  # of the image's side, from the middle of the cell


def build_scenes(
    out: Path, seed: int = 0, train: int = 3000, val: int = 600, side: int = SIDE, progress: bool = False
) -> Path:
    """Write `out/{train,val}/{0..9}/*.jpg` of `side` px, with `.mask.png`, `.depth.png`, `.txt` and `.json` as
    of `build_demo`; `labels` are the two numerals, `count` all digits, and `grade` counts in steps of two.

    Raises as `build_demo` does; ValueError also for a side of less than 32 px.
    """
    if side < 32:
        raise ValueError(f"side is {side} px; digits can be told from 32 px on")
    counts = {"train": train, "val": val}
    return write_images(Path(out), seed, counts, {"scenes": side}, partial(_draw_scene, side=side), progress)


def _draw_scene(given: Ingredients, rng: np.random.Generator, side: int) -> Made:
    often, seldom = (int(numeral) for numeral in rng.choice(10, 2, replace=False))
    count = int(rng.integers(COUNT[0], COUNT[1] + 1))
    num_seldom = int(rng.integers(1, (count - 1) // 2 + 1))
    distances = np.sort(rng.integers(NEAR, FAR + 1, count))[::-1]  # what is far is drawn first
    numerals = rng.permutation([often] * (count - num_seldom) + [seldom] * num_seldom).tolist()
    chosen = [int(rng.choice(given.own[given.labels[given.own] == numeral])) for numeral in numerals]
    photo = int(rng.integers(len(given.photos)))
    box = draw_box(rng, given.photos[photo].shape, given.split)
    mixed = background_of(given.photos[photo], box, side, rng)
    depth = np.full((side, side), WALL, dtype=np.uint16)
    cells = rng.choice(GRID * GRID, count, replace=False).tolist()
    covers = []
    for digit, distance, cell in zip(given.digits[chosen], distances.tolist(), cells, strict=True):
        length = round(side * SIDE_AT_NEAR * NEAR / distance)
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * side
        middle = (np.array(divmod(cell, GRID))[::-1] + 0.5) * side / GRID + shift
        left, top = (round(float(place) - length / 2) for place in middle)
        covers.append(cover_of(digit, length, rng.uniform(-MAX_SLANT, MAX_SLANT), (left, top), side))
        mixed = inked(mixed, covers[-1], rng)
        depth[covers[-1][..., 0] > 0.5] = distance
    mask, boxes = outlined(covers, numerals)
    facts = {
        "boxes": boxes,
        "count": len(boxes),
        "grade": (len(boxes) - COUNT[0]) // 2,
        "labels": sorted(map(str, (often, seldom))),
    }
    entry = {"digits": chosen, "photo": photo, "box": box}
    maps = {"mask": mask, "depth": depth}
    return Made(as_image(mixed), often, maps, facts, entry, captions=scene_captions(numerals, photo))
