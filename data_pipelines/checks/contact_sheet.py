"""Pictures with captions in a grid: images of any depth and channels, made fit to be looked at."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 12  # px
LINE = 15  # px from line to line
_GAP = 8
_PAPER, _INK = (255, 255, 255), (30, 30, 30)
_PERCENTILES = (1.0, 99.0)


class Display:
    """How the pixels of one image, and of the crops of it, are shown on a screen.

    8-bit images keep their levels. Of deeper ones, the range between the 1st and 99th percentile of every channel
    shown becomes 0 .. 255. One channel is shown as grey, two as red and green; of more those that `bands` names,
    counted from 0: three, or one as grey.

    Raises ValueError for a band that the image has not.
    """

    def __init__(self, image: np.ndarray, bands: Sequence[int] = (0, 1, 2)) -> None:
        channels = image.shape[2]
        self.bands = list(range(channels)) if channels < 3 else list(bands)
        if len(self.bands) not in (min(channels, 2), 1, 3) or not all(band < channels for band in self.bands):
            raise ValueError(
                f"bands are {','.join(map(str, bands))}; name one or three of the image's {channels}, counted from 0"
            )
        if len(self.bands) == 1:
            self.bands *= 3
        self.levels = [(0.0, 255.0)] * len(self.bands)
        if image.dtype != np.uint8:
            self.levels = [tuple(np.percentile(image[:, :, band], _PERCENTILES)) for band in self.bands]

    def rgb(self, image: np.ndarray) -> Image.Image:
        """(h, w, c) of 8 or 16 bits to red, green and blue."""
        shown = np.zeros((*image.shape[:2], 3), dtype=np.uint8)
        for place, (band, (low, high)) in enumerate(zip(self.bands, self.levels, strict=True)):
            scaled = (image[:, :, band] - low) * (255 / max(high - low, 1e-6))
            shown[:, :, place] = np.clip(np.round(scaled), 0, 255)
        return Image.fromarray(shown)


@dataclass(frozen=True)
class Tile:
    """An image and the lines below it."""

    image: Image.Image
    caption: tuple[str, ...] = ()


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image enlarged or reduced so that its longer side is `side` px; small ones by whole pixels, unsmoothed."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def grid(rows: Sequence[Sequence[Tile]], title: str = "") -> Image.Image:
    """Rows of tiles; in a column all are as wide as the widest, and captions are cut to that."""
    font = _font()
    columns = [[row[place] for row in rows if place < len(row)] for place in range(max(map(len, rows)))]
    widths = [max(tile.image.width for tile in column) for column in columns]
    heights = [max(tile.image.height + LINE * len(tile.caption) for tile in row) for row in rows]
    width = sum(widths) + _GAP * (len(widths) + 1)
    heading = _wrapped(title, width - 2 * _GAP, font)
    top = _GAP + LINE * len(heading)
    sheet = Image.new("RGB", (width, top + sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        pen.text((_GAP, _GAP + number * LINE), line, fill=_INK, font=font)
    y = top + _GAP
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for tile, column in zip(row, widths, strict=False):
            sheet.paste(tile.image, (x, y))
            for number, line in enumerate(tile.caption):
                below = y + tile.image.height + 1 + number * LINE
                pen.text((x, below), _cut(line, column, font), fill=_INK, font=font)
            x += column + _GAP
        y += height + _GAP
    return sheet


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@functools.cache
def _font() -> _Font:
    """Matplotlib's DejaVu Sans: names of classes may have letters that Pillow's own font has not."""
    import matplotlib  # here, as not every command that imports this draws

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE - 1)


def _wrapped(text: str, width: int, font: _Font) -> list[str]:
    lines: list[str] = []
    for word in _printable(text).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _printable(text: str) -> str:
    """Keys may be any bytes."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _cut(text: str, width: int, font: _Font) -> str:
    """The text, or as much of its end as fits: keys differ in their ends."""
    text = _printable(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"..{text}") > width:
        text = text[1:]
    return f"..{text}"
