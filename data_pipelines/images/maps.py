"""Maps that lie beside an image, a value for each of its pixels: a mask of classes, or depths (heights, distances).

`KEY.mask.png`: a PNG of 8 or 16 bits, grey or with a palette, whose levels (or places in the palette) are classes; the
highest, 255 or 65535, is "not to be judged". `KEY.depth.png`: grey of 8 or 16 bits, in which 0 is unknown, as in NYU's
and KITTI's. `KEY.depth.npy`: real or whole numbers, in which what is not finite is unknown.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.images.decode import DAMAGE, decode, look, open_image, orientation_of, reason_of
from data_pipelines.images.pixels import MAX_FILE_BYTES, UnusableImageError, check_size
from data_pipelines.images.sample import Sample

_GREY, _PALETTE = 0, 3  # PNG's types of colour
_COLOURS = {2: "red, green and blue", 4: "grey with an opacity", 6: "red, green, blue and an opacity"}
_NPY = b"\x93NUMPY"


class BadMapError(ValueError):
    """A map that cannot be used; the message says whose and why."""


def ignored_level(mask: np.ndarray) -> int:
    """The level of a mask (h, w) that is not to be judged."""
    return int(np.iinfo(mask.dtype).max)


def decode_mask(content: bytes) -> np.ndarray:
    """(h, w) uint8 or uint16: the classes of a mask's pixels, as they are stored.

    Grey of 1, 2 and 4 bits is not stretched to 8, and of a palette the places count, not the colours.

    Raises:
        UnusableImageError: No PNG, too large, or of several channels.
        Exception: One of `decode.DAMAGE`.
    """
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 33:
        raise UnusableImageError("bad_map", "no PNG; classes must not go through a lossy format such as JPEG")
    width, height, bits, colour = struct.unpack_from(">IIBB", content, 16)
    check_size(height, width, 1, 2)
    if colour not in (_GREY, _PALETTE):
        raise UnusableImageError(
            "bad_map",
            f"a PNG of {_COLOURS.get(colour, 'no known type of colour')}, and a mask has one number a pixel: store the "
            "classes as levels of grey or as a palette",
        )
    with open_image(content) as image:
        image.load()
        levels = np.asarray(image)
    if bits == 16:
        return levels.astype(np.uint16, copy=False)
    levels = levels.astype(np.uint8)
    # Pillow stretches 2 and 4 bits of grey over all levels; one bit and palettes it leaves
    return levels // np.uint8(255 // ((1 << bits) - 1)) if colour == _GREY and bits in (2, 4) else levels


def decode_depth(content: bytes) -> np.ndarray:
    """(h, w) float32 of a map of depths, NaN where it is unknown; raises as `decode_mask` does."""
    if content[:6] == _NPY:
        from data_pipelines.images.npy import read_numbers  # few samples have any

        values = read_numbers(content).astype(np.float32)
        return np.where(np.isfinite(values), values, np.float32("nan"))
    if content[25:26] == bytes([_PALETTE]):
        raise UnusableImageError("bad_map", "a PNG with a palette; depths are levels of grey, or an .npy")
    levels = decode_mask(content)
    return np.where(levels == 0, np.float32("nan"), levels.astype(np.float32))


DECODERS = {"mask": decode_mask, "depth": decode_depth}


def upright_size(image: bytes) -> tuple[int, int]:
    """Height and width of an image file as a run sees it; raises one of `decode.DAMAGE`."""
    header = look(image)
    if header.format in ("TIFF", "NPY"):  # whose headers do not tell which axis is which, or how it is turned
        shape = decode(Sample("", Path(), image, None), None, None).shape
        return int(shape[0]), int(shape[1])
    with open_image(image) as opened:
        turned = orientation_of(opened) >= 5
    return (header.width, header.height) if turned else (header.height, header.width)


def read_map(kind: str, content: bytes, size: tuple[int, int] | None, whose: str) -> np.ndarray:
    """A map of a kind, (h, w), whatever is wrong with it told with its owner's name.

    Args:
        kind: One of `KINDS`.
        content: The file.
        size: Height and width that its image has; None: any.
        whose: For the message; empty where it stands beside it.

    Raises:
        BadMapError: Damaged, of another size, or no map.
    """
    of = f" of {whose}" if whose else ""
    try:
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"a file of {len(content):,} bytes")
        found = DECODERS[kind](content)
    except DAMAGE as error:
        raise BadMapError(f"the {kind}{of} cannot be used: {reason_of(error)}") from error
    if size is not None and found.shape != size:
        raise BadMapError(
            f"the {kind}{of} is {found.shape[1]}x{found.shape[0]} px and its image {size[1]}x{size[0]}; each "
            "pixel of the image (turned upright, if its EXIF says so) needs one of its own"
        )
    return found


def problems_of(maps: Mapping[str, bytes], image: bytes) -> tuple[str, ...]:
    """What is wrong with the maps of an image, by kind their bytes; `image` is a file that can be read."""
    size, found = upright_size(image), []
    for kind, content in maps.items():
        try:
            read_map(kind, content, size, "")
        except BadMapError as error:
            found.append(str(error))
    return tuple(found)


def resized_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) of another size: each pixel takes the one in whose area its middle lies."""
    rows, columns = (nearest_places(old, new) for old, new in zip(values.shape, size, strict=True))
    return values[rows[:, None], columns]


def nearest_places(old: int, new: int) -> np.ndarray:
    """(new,) int64: of `old` pixels in a row, those in whose area the middles of `new` ones lie."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def encode_map(values: np.ndarray) -> tuple[bytes, str]:
    """A file of a map and what its name ends with behind the kind: PNG of whole numbers, `.npy` of others."""
    file = io.BytesIO()
    if values.dtype.kind == "f":
        np.save(file, values.astype(np.float32), allow_pickle=False)
        return file.getvalue(), "npy"
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue(), "png"
