"""A data set that needs no download: real handwriting over real photographs.

The digits (8x8, from 43 writers; Alpaydin and Kaynak 1998) and the two photographs come with scikit-learn. Each
image is a sheet of one numeral in many hands, at random places, sizes, slants and colours, over a random piece of a
faded photograph: the class is plain to a person and hidden from a comparison of pixels. Like a tissue, a crop or a
fabric it is in every part of the image, so that a method which compares parts can find it within minutes.

Beside each image lie captions (`.txt`, see `demo_captions`), a mask (`.mask.png`: 0 the paper, 1 .. 10 the numerals
0 .. 9 with a margin of 2 px, so that a patch of 8 px can be mostly numeral; `mask_names.json` names them) and a
`.json`: `boxes` (left, top,
right, bottom in px, class as in the mask), `count` (how many digits), `grade` (the same from 0) and `labels` (the
numerals). Images of several numerals, with depths too, are made by `scenes`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter
from sklearn.datasets import load_digits, load_sample_images

from data_pipelines.demo_captions import sheet_captions
from data_pipelines.files import read_json, write_json
from data_pipelines.packing.meter import Meter

SIDE = 64  # px of an image
GRID = 4  # digits lie in cells of a grid, moved at random
DIGITS = (12, 16)  # fewest and most in an image
DIGIT_SIDES = (14, 19)  # px, smallest and largest
MAX_SHIFT = 7  # px from the middle of the cell
MAX_SLANT = 15  # degrees to either side
PAPER = 210  # mean grey level that a photograph is faded to
CONTRAST = (0.1, 0.4)  # share of the photograph's own that is left; with all of it, images differ in little else
DARKEST, LIGHTEST = 0, 90  # levels of each colour of the ink
MARGIN = 1 / 32  # of the image's side, around a digit in its mask
VAL_SHARE = 0.2  # of the digits, and of the photographs' width at the right edge
MASK_NAMES = "mask_names.json"  # beside the images, for `pack --mask-names`
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MANIFEST = "manifest.json"


def build_demo(out: Path, seed: int = 0, train: int = 6000, val: int = 1000, progress: bool = False) -> Path:
    """Write `out/{train,val}/{0..9}/*.jpg`, 64x64 RGB, and what is known of each, for `pack` to pack; the same seed
    gives the same images.

    The two splits share no digit and no pixel of a photograph. `manifest.json`, written last, says of every
    image which digit and which piece of which photograph it is made of. If it is there, all is done already.

    Raises:
        FileExistsError: `out` holds a demo of another seed or size.
        ValueError: A split of less than one image.
    """
    return write_images(Path(out), seed, {"train": train, "val": val}, {}, _draw_sheet, progress)


@dataclass(frozen=True)
class Ingredients:
    """What images of a split are made of: `own` are the numbers of its digits, `labels` those of all."""

    split: str
    digits: np.ndarray  # (n, 8, 8) ink in 0 .. 16
    labels: np.ndarray  # (n,)
    own: np.ndarray
    photos: list[np.ndarray]  # (h, w, 3) uint8 each


class Made(NamedTuple):
    """An image and what is known of it."""

    image: Image.Image
    label: int  # its class
    maps: dict[str, np.ndarray]  # by kind, (h, w)
    facts: dict[str, Any]  # for its .json
    entry: dict[str, Any]  # what it is made of
    frames: tuple[Image.Image, ...] = ()  # of a clip, of which `image` is the first
    captions: tuple[str, ...] = ()


def write_images(
    out: Path,
    seed: int,
    counts: dict[str, int],
    settings: dict[str, Any],
    draw: Callable[[Ingredients, np.random.Generator], Made],
    progress: bool = False,
) -> Path:
    """Write what `draw` makes of a generator for each image of each split, behind a bar for `progress`; see
    `build_demo`."""
    if min(counts.values()) < 1:
        told = " and ".join(f"{split} is {count}" for split, count in counts.items())
        raise ValueError(f"{told} images; both must be 1 or more")
    made = {"seed": seed, **counts, **settings}
    manifest = read_json(out / _MANIFEST)
    if manifest is not None:
        if manifest["made"] != made:
            raise FileExistsError(f"{out} holds a demo made with {manifest['made']}; take another folder, or remove it")
        return out
    digits, labels = load_digits(return_X_y=True)
    photos = load_sample_images().images
    shuffled = np.random.default_rng((seed, 0)).permutation(len(digits))
    num_val_digits = round(VAL_SHARE * len(digits))
    own = {"train": shuffled[num_val_digits:], "val": shuffled[:num_val_digits]}
    entries = []
    with Meter(sum(counts.values()), progress, "drawing") as meter:
        for number, (split, count) in enumerate(counts.items()):
            shutil.rmtree(out / split, ignore_errors=True)  # what a killed call left
            for label in range(10):
                (out / split / str(label)).mkdir(parents=True)
            ingredients = Ingredients(split, digits.reshape(-1, 8, 8), labels, own[split], photos)
            for index in range(count):
                one = draw(ingredients, np.random.default_rng((seed, 1 + number, index)))
                path = f"{split}/{one.label}/{index:05d}.jpg"
                meter.advance(_write(out / path, one))
                entries.append({"path": path, **one.entry})
    write_json(out / MASK_NAMES, {str(level): name for level, name in enumerate(("paper", *NUMERALS))})
    write_json(out / _MANIFEST, {"made": made, "images": entries})
    return out


def _write(path: Path, one: Made) -> int:
    """Write an image, or a folder of frames, and beside it what is known of it; the bytes of the (first) image."""
    path.with_suffix(".json").write_text(json.dumps(one.facts), encoding="utf-8")
    if one.captions:
        path.with_suffix(".txt").write_text("\n".join(one.captions) + "\n", encoding="utf-8")
    if one.frames:
        folder = path.with_suffix("")
        folder.mkdir()
        for number, frame in enumerate(one.frames):
            frame.save(folder / f"{number}.jpg", quality=90)
        return (folder / "0.jpg").stat().st_size
    one.image.save(path, quality=90)
    for kind, values in one.maps.items():
        Image.fromarray(values).save(path.with_suffix(f".{kind}.png"))
    return path.stat().st_size


def _draw_sheet(given: Ingredients, rng: np.random.Generator) -> Made:
    label = int(given.labels[given.own[rng.integers(len(given.own))]])
    count = int(rng.integers(DIGITS[0], DIGITS[1] + 1))
    chosen = [int(number) for number in rng.choice(given.own[given.labels[given.own] == label], count)]
    photo = int(rng.integers(len(given.photos)))
    box = draw_box(rng, given.photos[photo].shape, given.split)
    image, covers = compose(given.digits[chosen], given.photos[photo], box, rng)
    mask, boxes = outlined(covers, [label] * count)
    facts = {"boxes": boxes, "count": count, "grade": count - DIGITS[0], "labels": [str(label)]}
    entry = {"digits": chosen, "photo": photo, "box": box}
    return Made(image, label, {"mask": mask}, facts, entry, captions=sheet_captions(label, count, photo))


def outlined(covers: Sequence[np.ndarray], numerals: Sequence[int]) -> tuple[np.ndarray, list[list[int]]]:
    """Mask (h, w) uint8 and boxes (left, top, right, bottom, class) of digits that cover each other in this order.

    A digit is where it covers more than half of what is behind it; the mask has a margin around it, the box has none.
    Of a digit that is hidden altogether there is no box.
    """
    order: np.ndarray = np.zeros(covers[0].shape[:2], dtype=np.int64)  # of the digit on top, from 1
    reach = 1 + 2 * round(MARGIN * order.shape[0])
    for place, cover in enumerate(covers, 1):
        # along rows, then columns: Pillow's filter of a square takes 6 times as long at 64 px, 240 times at 512
        order[maximum_filter((cover[..., 0] > 0.5).astype(np.uint8), reach) > 0] = place
    classes = np.array([0, *(numeral + 1 for numeral in numerals)], dtype=np.uint8)
    boxes = []
    for place, cover in enumerate(covers, 1):
        if (order == place).any():
            rows, columns = np.nonzero(cover[..., 0] > 0.5)
            sides = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, classes[place])
            boxes.append([int(side) for side in sides])
    return classes[order], boxes


def draw_box(rng: np.random.Generator, shape: tuple[int, ...], split: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a square of a photograph, on the split's side of the border."""
    height, width = shape[:2]
    border = round((1 - VAL_SHARE) * width)
    first, last = (0, border) if split == "train" else (border, width)
    side = int(rng.integers(SIDE // 2, min(height, last - first) + 1))
    left, top = int(rng.integers(first, last - side + 1)), int(rng.integers(0, height - side + 1))
    return left, top, left + side, top + side


def compose(
    digits: np.ndarray, photo: np.ndarray, box: tuple[int, int, int, int], rng: np.random.Generator
) -> tuple[Image.Image, list[np.ndarray]]:
    """One image, and where each digit covers what is behind it: (SIDE, SIDE, 1) in 0 .. 1.

    Args:
        digits: (n, 8, 8) ink in 0 .. 16.
        photo: (h, w, 3) uint8.
        box: The piece of it that becomes the background.
        rng: Draws the rest: places, sizes, slants, colours.
    """
    mixed = background_of(photo, box, SIDE, rng)
    cells = rng.choice(GRID * GRID, len(digits), replace=False)
    covers = []
    for digit, cell in zip(digits, cells, strict=True):
        covers.append(_draw_cover(digit, divmod(int(cell), GRID), rng))
        mixed = inked(mixed, covers[-1], rng)
    return as_image(mixed), covers


def background_of(photo: np.ndarray, box: tuple[int, int, int, int], side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side, 3) float32: a piece of a photograph, faded, perhaps mirrored."""
    left, top, right, bottom = box
    piece = Image.fromarray(photo[top:bottom, left:right]).resize(
        (side, side), Image.Resampling.BICUBIC, reducing_gap=2.0
    )
    background = np.asarray(piece, dtype=np.float32)
    if rng.random() < 0.5:
        background = background[:, ::-1]
    return PAPER + rng.uniform(*CONTRAST) * (background - background.mean(axis=(0, 1)))


def inked(image: np.ndarray, cover: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image (h, w, 3) with ink of a random colour where it is covered."""
    return cover * rng.uniform(DARKEST, LIGHTEST, 3) + (1 - cover) * image


def as_image(levels: np.ndarray) -> Image.Image:
    """(h, w, 3) levels as a picture."""
    return Image.fromarray(np.clip(levels, 0, 255).round().astype(np.uint8))


def _draw_cover(digit: np.ndarray, cell: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Where a digit in a cell (row, column) covers what is behind it: (SIDE, SIDE, 1) in 0 .. 1."""
    side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    slant = rng.uniform(-MAX_SLANT, MAX_SLANT)
    shift = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, 2)
    top, left = (round((place + 0.5) * SIDE / GRID - side / 2) for place in cell)
    return cover_of(digit, side, slant, (left + int(shift[0]), top + int(shift[1])), SIDE)


def cover_of(digit: np.ndarray, side: int, slant: float, place: tuple[int, int], of_image: int) -> np.ndarray:
    """Where a digit (8, 8) of `side` px, turned by `slant` degrees, with its left and top at `place`, covers an image
    of `of_image` px a side: (of_image, of_image, 1) in 0 .. 1."""
    ink = Image.fromarray((digit / 16 * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    ink = ink.rotate(slant, Image.Resampling.BICUBIC)
    sheet = Image.new("L", (of_image, of_image))
    sheet.paste(ink, place)
    return np.clip((np.asarray(sheet, dtype=np.float32) / 255 - 0.3) / 0.3, 0, 1)[..., None]  # blur to a stroke
