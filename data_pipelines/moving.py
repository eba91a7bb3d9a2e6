"""The built-in data as stacks: a numeral that crosses a piece of a photograph and is thrown back by the borders.

The ingredients are those of `demo`. The class of a clip is its numeral; how it moves is in its `.json`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.demo import (
    DARKEST,
    LIGHTEST,
    MAX_SLANT,
    SIDE,
    Ingredients,
    Made,
    as_image,
    background_of,
    cover_of,
    draw_box,
    write_images,
)

SPEEDS = (1.5, 5.0)  # px a frame, smallest and largest, of images of `SIDE` px


def build_moving(
    out: Path, seed: int = 0, train: int = 600, val: int = 100, frames: int = 12, progress: bool = False
) -> Path:
    """Write `out/{train,val}/{0..9}/CLIP/*.jpg`, `frames` of 64x64 RGB each, for `pack --from stacks`; the same seed
    gives the same clips. Raises as `build_demo` does; ValueError also for fewer than two frames."""
    if frames < 2:
        raise ValueError(f"frames is {frames}; a clip has two or more")
    draw = partial(_draw_clip, frames=frames)
    return write_images(Path(out), seed, {"train": train, "val": val}, {"frames": frames}, draw, progress)


def _draw_clip(given: Ingredients, rng: np.random.Generator, frames: int) -> Made:
    number = int(given.own[rng.integers(len(given.own))])
    photo = int(rng.integers(len(given.photos)))
    box = draw_box(rng, given.photos[photo].shape, given.split)
    paper = background_of(given.photos[photo], box, SIDE, rng)
    side, slant = int(rng.integers(SIDE // 3, SIDE // 2)), rng.uniform(-MAX_SLANT, MAX_SLANT)
    ink = rng.uniform(DARKEST, LIGHTEST, 3)
    place = rng.uniform(0, SIDE - side, 2)
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEEDS)
    step = speed * np.array([np.cos(angle), np.sin(angle)])
    images = []
    for time in range(frames):
        left, top = thrown_back(place + time * step, SIDE - side)
        cover = cover_of(given.digits[number], side, slant, (round(left), round(top)), SIDE)
        images.append(as_image(cover * ink + (1 - cover) * paper))
    label = int(given.labels[number])
    facts = {"speed": round(float(speed), 3), "angle": round(float(np.degrees(angle)), 1)}
    return Made(images[0], label, {}, facts, {"digit": number, "photo": photo, "box": box}, tuple(images))


def thrown_back(places: np.ndarray, length: float) -> np.ndarray:
    """Places along lines of `length` with walls at both ends, of what would be at `places` without them."""
    folded = np.mod(places, 2 * length)
    return np.where(folded > length, 2 * length - folded, folded)
