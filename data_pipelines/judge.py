"""One image judged as a run would: whether it can be used, and what is worth knowing about it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_pipelines.decode import DAMAGE, BadSampleError, decode, open_image, orientation_of
from data_pipelines.index import Sample

#: The suffixes that name a format; a phone's JPEG with several pictures is an MPO to Pillow.
_SUFFIXES = {"JPEG": ("jpg", "jpeg"), "MPO": ("jpg", "jpeg"), "PNG": ("png",), "WEBP": ("webp",)}
_TINY = 8  # px


class Verdict(NamedTuple):
    """What was found; `reason` and `case` are None for an image that can be used."""

    reason: str | None  # in words
    case: str | None  # in `CASES`, an error
    notes: tuple[str, ...] = ()  # in `CASES`
    width: int = 0  # px as stored, before EXIF turns it; 0 where the header cannot be read
    height: int = 0
    mode: str = ""  # Pillow's


def judge(content: bytes, suffix: str = "", *, channels: int = 3, headers_only: bool = False) -> Verdict:
    """Decode an image file as a run would, and say what was found; never raises for what the bytes hold.

    Args:
        content: The file.
        suffix: What its name ends with, without the dot; empty if unknown.
        channels: Of the run.
        headers_only: Do not decode the pixels: much faster, and blind to damage in them.
    """
    sample = Sample("", Path(), content, None)
    verdict = Verdict(None, None)
    try:
        with open_image(content) as image:
            verdict = Verdict(None, None, _notes(image, content, suffix.lower()), *image.size, image.mode)
        if not headers_only:
            decode(sample, channels)
    except DAMAGE as error:
        bad = error if isinstance(error, BadSampleError) else BadSampleError.of(sample, error)
        return verdict._replace(reason=bad.reason, case=bad.case, notes=())
    return verdict


def _notes(image: Image.Image, content: bytes, suffix: str) -> tuple[str, ...]:
    found = {
        "wrong_suffix": bool(suffix) and suffix not in _SUFFIXES[image.format or ""],
        "animated": getattr(image, "n_frames", 1) > 1,
        "transparent": image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
        "palette": image.mode in ("P", "PA"),
        "cmyk": image.mode == "CMYK",
        "deep": image.format == "PNG" and content[24:25] == b"\x10",  # the header's bit depth: Pillow hides it for RGB
        "turned": orientation_of(image) != 1,
        "tiny": min(image.size) < _TINY,
    }
    return tuple(name for name, is_so in found.items() if is_so)
