"""A data set that needs no download: real handwriting over real photographs.

The digits (8x8, from 43 writers; Alpaydin and Kaynak 1998) and the two photographs come with scikit-learn. Each
image is a sheet of one numeral in many hands, at random places, sizes, slants and colours, over a random piece of a
faded photograph: the class is plain to a person and hidden from a comparison of pixels. Like a tissue, a crop or a
fabric it is in every part of the image, so that a method which compares parts can find it within minutes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from data_pipelines.files import read_json, write_json

SIDE = 64  # px of an image
GRID = 4  # digits lie in cells of a grid, moved at random
DIGITS = (12, 16)  # fewest and most in an image
DIGIT_SIDES = (14, 19)  # px, smallest and largest
MAX_SHIFT = 7  # px from the middle of the cell
MAX_SLANT = 15  # degrees to either side
PAPER = 210  # mean grey level that a photograph is faded to
CONTRAST = (0.1, 0.4)  # share of the photograph's own that is left; with all of it, images differ in little else
DARKEST, LIGHTEST = 0, 90  # levels of each colour of the ink
VAL_SHARE = 0.2  # of the digits, and of the photographs' width at the right edge
_MANIFEST = "manifest.json"


def build_demo(out: Path, seed: int = 0, train: int = 6000, val: int = 1000) -> Path:
    """Write `out/{train,val}/{0..9}/*.jpg`, 64x64 RGB, for `pack` to pack; the same seed gives the same images.

    The two splits share no digit and no pixel of a photograph. `manifest.json`, written last, says of every
    image which digit and which piece of which photograph it is made of. If it is there, all is done already.

    Raises:
        FileExistsError: `out` holds a demo of another seed or size.
        ValueError: A split of less than one image.
    """
    out = Path(out)
    if min(train, val) < 1:
        raise ValueError(f"train is {train} and val is {val} images; both must be 1 or more")
    made = {"seed": seed, "train": train, "val": val}
    manifest = read_json(out / _MANIFEST)
    if manifest is not None:
        if manifest["made"] != made:
            raise FileExistsError(f"{out} holds a demo made with {manifest['made']}; take another folder, or remove it")
        return out
    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    photos = load_sample_images().images
    shuffled = np.random.default_rng((seed, 0)).permutation(len(digits))
    num_val_digits = round(VAL_SHARE * len(digits))
    sources = {"train": (train, shuffled[num_val_digits:]), "val": (val, shuffled[:num_val_digits])}
    entries = []
    for number, (split, (count, own)) in enumerate(sources.items()):
        shutil.rmtree(out / split, ignore_errors=True)  # what a killed call left
        for label in range(10):
            (out / split / str(label)).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng((seed, 1 + number, index))
            label = int(labels[own[rng.integers(len(own))]])
            count_here = int(rng.integers(DIGITS[0], DIGITS[1] + 1))
            chosen = [int(number) for number in rng.choice(own[labels[own] == label], count_here)]
            photo = int(rng.integers(len(photos)))
            box = _draw_box(rng, photos[photo].shape, split)
            image = compose(digits[chosen], photos[photo], box, rng)
            path = f"{split}/{label}/{index:05d}.jpg"
            image.save(out / path, quality=90)
            entries.append({"path": path, "digits": chosen, "photo": photo, "box": box})
    write_json(out / _MANIFEST, {"made": made, "images": entries})
    return out


def _draw_box(rng: np.random.Generator, shape: tuple[int, ...], split: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a square of a photograph, on the split's side of the border."""
    height, width = shape[:2]
    border = round((1 - VAL_SHARE) * width)
    first, last = (0, border) if split == "train" else (border, width)
    side = int(rng.integers(SIDE // 2, min(height, last - first) + 1))
    left, top = int(rng.integers(first, last - side + 1)), int(rng.integers(0, height - side + 1))
    return left, top, left + side, top + side


def compose(
    digits: np.ndarray, photo: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator
) -> Image.Image:
    """One image.

    Args:
        digits: (n, 8, 8) ink in 0 .. 16.
        photo: (h, w, 3) uint8.
        box: The piece of it that becomes the background.
        rng: Draws the rest: places, sizes, slants, colours.
    """
    left, top, right, bottom = box
    piece = Image.fromarray(photo[top:bottom, left:right]).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0
    )
    background = np.asarray(piece, dtype=np.float32)
    if rng.random() < 0.5:
        background = background[:, ::-1]
    background = PAPER + rng.uniform(*CONTRAST) * (background - background.mean(axis=(0, 1)))
    cells = rng.choice(GRID * GRID, len(digits), replace=False)
    mixed = background
    for digit, cell in zip(digits, cells, strict=True):
        cover = _draw_cover(digit, divmod(int(cell), GRID), rng)
        mixed = cover * rng.uniform(DARKEST, LIGHTEST, 3) + (1 - cover) * mixed
    return Image.fromarray(np.clip(mixed, 0, 255).round().astype(np.uint8))


def _draw_cover(digit: np.ndarray, cell: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Where a digit in a cell (row, column) covers what is behind it: (SIDE, SIDE, 1) in 0 .. 1."""
    side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    ink = Image.fromarray((digit / 16 * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(rng.uniform(-MAX_SLANT, MAX_SLANT), Image.Resampling.BICUBIC)
    shift = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2)
    top, left = (round((place + 0.5) * SIDE / GRID - side / 2) for place in cell)
    sheet = Image.new("L", (SIDE, SIDE))
    sheet.paste(ink, (left + int(shift[0]), top + int(shift[1])))
    return np.clip((np.asarray(sheet, dtype=np.float32) / 255 - 0.3) / 0.3, 0, 1)[..., None]  # blur to a stroke
