"""A run's pictures over time, small enough to travel within the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

#: Bytes of all pictures of a page, before they become text a third longer.
BUDGET = 5_000_000
ROWS_A_BLOCK = 4
_MOST_STEPS = 16  # of one series of pictures
_SIDE = 1000  # px
_SMALL = 200_000  # px in all
T = TypeVar("T")


class Frame(NamedTuple):
    """The pictures of a step, as data URIs with their size in px: a sheet of many rows is cut into blocks."""

    step: int
    blocks: list[tuple[str, int, int]]
    width: int  # of the sheet as it was drawn


def frames_of(
    steps: Sequence[tuple[int, Path]], budget: int, problems: list[str], row_height: int | None = None
) -> list[Frame]:
    """Pictures evenly spread over the steps, the first and the last among them, of `budget` bytes together."""
    chosen = spread(steps, _MOST_STEPS)
    encoded = [(step, found) for step, path in chosen if (found := _encode(path, problems, row_height)) is not None]
    while len(encoded) > 1 and sum(map(_size, encoded)) > budget:
        encoded = spread(encoded, max(1, len(encoded) // 2))
    return [
        Frame(
            step,
            [
                (f"data:image/{kind};base64,{base64.b64encode(content).decode()}", *size)
                for content, kind, size in blocks
            ],
            width,
        )
        for step, (width, blocks) in encoded
        if _size((step, (width, blocks))) <= budget
    ]


def _size(encoded: tuple[int, tuple[int, list[tuple[bytes, str, tuple[int, int]]]]]) -> int:
    return sum(len(content) for content, _, _ in encoded[1][1])


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, evenly spread; the last one always, and the first of several."""
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _encode(
    path: Path, problems: list[str], row_height: int | None
) -> tuple[int, list[tuple[bytes, str, tuple[int, int]]]] | None:
    """The sheet's width and its blocks of rows; None for what is no picture (a run may be writing it)."""
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            if opened.width * opened.height > 50_000_000:
                raise ValueError(f"{opened.width} x {opened.height} px are too many for a page")
            sheet = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        problems.append(f"pictures/{path.name} is left out: {error}")
        return None
    block = sheet.height
    if row_height and sheet.height % row_height == 0:
        block = min(block, ROWS_A_BLOCK * row_height)
    tops = range(0, sheet.height, block)
    return sheet.width, [_block(sheet.crop((0, top, sheet.width, min(top + block, sheet.height)))) for top in tops]


def _block(picture: Image.Image) -> tuple[bytes, str, tuple[int, int]]:
    """A picture as PNG or JPEG, whichever is smaller."""
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    forms = {"jpeg": _as(picture, "jpeg", quality=85, subsampling=0)}
    if picture.width * picture.height <= _SMALL:  # enlarged pixels, which JPEG would blur
        forms["png"] = _as(picture, "png", optimize=True)
    kind = "png" if len(forms.get("png", b"")) in range(1, 2 * len(forms["jpeg"])) else "jpeg"
    return forms[kind], kind, picture.size


def _as(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
