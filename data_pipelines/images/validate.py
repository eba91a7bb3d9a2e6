"""One image judged as a run would: whether it can be used, and what is worth knowing about it."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data_pipelines.images import rasters
from data_pipelines.images.decode import (
    DAMAGE,
    BadSampleError,
    channels_of,
    decode_picture,
    frames,
    is_transparent,
    open_image,
    orientation_of,
)
from data_pipelines.images.pixels import Header, check_file_size
from data_pipelines.images.sample import Sample
from data_pipelines.images.stacks import decode_stack

#: The suffixes that name a format; a phone's JPEG with several pictures is an MPO to Pillow.
_SUFFIXES = {
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"),
    "NPY": ("npy",),
}
_TINY = 8  # px
_FRAMES_AT_A_TIME = 16


class Verdict(NamedTuple):
    """What was found; `reason` and `case` are None for an image that can be used."""

    reason: str | None  # in words
    case: str | None  # in `CASES`, an error
    notes: tuple[str, ...] = ()  # in `CASES`
    width: int = 0  # px as stored, before EXIF turns it; 0 where the header cannot be read
    height: int = 0
    mode: str = ""  # as in `Header`
    channels: int | None = None  # likewise


def validate(content: bytes, suffix: str = "", *, channels: int | None = None, headers_only: bool = False) -> Verdict:
    """Decode an image file as a run would, and say what was found; never raises for what the bytes hold.

    Args:
        content: The file.
        suffix: What its name ends with, without the dot; empty if unknown.
        channels: Of the run; None: as they are stored, which says nothing of what a run can use.
        headers_only: Do not decode the pixels: much faster, and blind to damage in them.
    """
    sample = Sample("", Path(), content, None)
    verdict = Verdict(None, None)
    try:
        check_file_size(len(content))
        header = rasters.look(content)
        if header is not None:
            notes = _notes_of_raster(header, suffix.lower())
            verdict = Verdict(None, None, notes, header.width, header.height, header.mode, header.channels)
        else:
            with open_image(content) as image:
                verdict = Verdict(
                    None, None, _notes(image, suffix.lower()), *image.size, image.mode, channels_of(image)
                )
        if not headers_only:
            notes = decode_picture(sample, channels, bits=None).notes
            verdict = verdict._replace(notes=tuple(dict.fromkeys(verdict.notes + notes)))
    except DAMAGE as error:
        bad = error if isinstance(error, BadSampleError) else BadSampleError.of(sample, error)
        return verdict._replace(reason=bad.reason, case=bad.case, notes=())
    return verdict


def validate_stack(sample: Sample, *, channels: int | None = None) -> Verdict:
    """All frames of a stack, each as `validate` judges an image; what is wrong names the frame."""
    verdicts = [validate(frame, channels=channels) for frame in sample.frames]
    if not verdicts:
        verdicts = [validate(sample.image, headers_only=True)]
        try:
            for first in itertools.count(0, _FRAMES_AT_A_TIME):
                if not decode_stack(sample, partial(_some, first), channels, bits=None):
                    break
        except BadSampleError as error:
            return verdicts[0]._replace(reason=error.reason, case=error.case, notes=())
    for number, verdict in enumerate(verdicts):
        if verdict.case is not None:
            return verdict._replace(reason=f"frame {number} of {len(verdicts)}: {verdict.reason}")
        if (verdict.width, verdict.height) != (verdicts[0].width, verdicts[0].height):
            size = f"{verdict.width}x{verdict.height} px, and the stack's are {verdicts[0].width}x{verdicts[0].height}"
            return verdict._replace(reason=f"frame {number} has {size}", case="other_frames", notes=())
    notes = dict.fromkeys(note for verdict in verdicts for note in verdict.notes if note != "animated" or sample.frames)
    return verdicts[0]._replace(notes=tuple(notes))


def _some(first: int, available: int) -> range:
    return range(first, min(first + _FRAMES_AT_A_TIME, available))


def _notes_of_raster(header: Header, suffix: str) -> tuple[str, ...]:
    found = {
        "wrong_suffix": bool(suffix) and suffix not in _SUFFIXES[header.format],
        "animated": header.num_images > 1,
        "transparent": header.transparent,
        "palette": header.mode == "palette",
        "deep": header.bits > 8,
        "tiny": min(header.width, header.height) < _TINY,
    }
    return tuple(name for name, is_so in found.items() if is_so)


def _notes(image: Image.Image, suffix: str) -> tuple[str, ...]:
    found = {
        "wrong_suffix": bool(suffix) and suffix not in _SUFFIXES[image.format or ""],
        "animated": frames(image) > 1,
        "transparent": is_transparent(image),
        "palette": image.mode in ("P", "PA"),
        "cmyk": image.mode == "CMYK",
        "turned": orientation_of(image) != 1,
        "tiny": min(image.size) < _TINY,
    }
    return tuple(name for name, is_so in found.items() if is_so)
