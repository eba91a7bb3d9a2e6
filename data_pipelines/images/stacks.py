"""Stacks: samples of several images of one size, which are frames of a clip, slices of a volume, or times of a place.

A stack is stored as numbered members of a shard (`KEY.000.jpg`, `KEY.001.jpg`, ...), each of which is decoded as any
image is, as a TIFF of several pages, or as an `.npy` of (t, h, w), (t, h, w, c) or (t, c, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.images import rasters
from data_pipelines.images.decode import DAMAGE, BadSampleError, decode_picture
from data_pipelines.images.pixels import UnusableImageError, check_file_size, check_size, convert
from data_pipelines.images.regions import Choose, Picture, Region, whole
from data_pipelines.images.sample import Sample

#: Told how many frames a stack has: the numbers of those that are wanted, some perhaps several times.
ChooseFrames = Callable[[int], Sequence[int]]


def every(available: int) -> Sequence[int]:
    """All frames."""
    return range(available)


def decode_stack(
    sample: Sample,
    wanted: ChooseFrames = every,
    channels: int | None = 3,
    choose: Choose = whole,
    padded: bool = False,
    bits: int | None = 8,
) -> list[Picture]:
    """The wanted frames of a sample, in their order, each as `decode.decode_picture` gives an image; a frame that is
    wanted several times is decoded once.

    `choose` is told the size of the frames, which is one.

    Raises:
        BadSampleError: A wanted frame cannot be used, is of another size than the first, or the sample is one image;
            the reason names the frame.
    """
    try:
        if not sample.frames:
            return _of_one_file(sample, wanted, channels, choose, bits)
        numbers = list(wanted(len(sample.frames)))
        return _of_members(sample, numbers, channels, choose, padded, bits)
    except DAMAGE as error:
        raise error if isinstance(error, BadSampleError) else BadSampleError.of(sample, error) from error


def _of_members(
    sample: Sample, numbers: Sequence[int], channels: int | None, choose: Choose, padded: bool, bits: int | None
) -> list[Picture]:
    sizes: list[tuple[int, int]] = []

    def told(size: tuple[int, int]) -> Region:
        sizes.append(size)
        return choose(size) if size == sizes[0] else whole(size)

    made: dict[int, Picture] = {}
    for number in dict.fromkeys(numbers):
        try:
            picture = decode_picture(sample._replace(image=sample.frames[number]), channels, told, padded, bits)
        except BadSampleError as error:
            reason = f"frame {number} of {len(sample.frames)}: {error.reason}"
            raise BadSampleError(sample.key, sample.shard, reason, error.case) from error
        if sizes[-1] != sizes[0]:
            (height, width), (first_height, first_width) = sizes[-1], sizes[0]
            reason = f"frame {number} has {width}x{height} px, and the stack's are {first_width}x{first_height}"
            raise UnusableImageError("other_frames", reason)
        if not made:  # before the others take as much
            height, width, depth = picture.pixels.shape
            check_size(height, width, depth * len(set(numbers)), picture.pixels.itemsize)
        made[number] = picture
    return [made[number] for number in numbers]


def _of_one_file(
    sample: Sample, wanted: ChooseFrames, channels: int | None, choose: Choose, bits: int | None
) -> list[Picture]:
    check_file_size(len(sample.image))
    found = rasters.read_frames(sample.image, wanted, channels)
    if found is None:
        raise UnusableImageError(
            "other_frames", "one image, and data.frames asks for stacks of several: KEY.000.jpg, KEY.001.jpg and so on"
        )
    if not found.numbers:
        return []
    made = {number: np.ascontiguousarray(convert(pixels, channels, bits)) for number, pixels in found.by_number.items()}
    choose(next(iter(made.values())).shape[:2])
    return [Picture(made[number]) for number in found.numbers]
