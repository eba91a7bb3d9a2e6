"""Every image once, whole or cropped at its centre, in order: what the probes look at."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.datasets.prefetch import ShardPrefetcher, in_batches, in_order
from data_pipelines.images.decode import BadSampleError, decode
from data_pipelines.images.stacks import decode_stack
from data_pipelines.loader import default_threads
from data_pipelines.remote.fetch import cancel_on
from data_pipelines.transforms.backends import any_channels
from data_pipelines.transforms.backends.base import to_pillow, write_channels
from data_pipelines.transforms.frames import Frames
from data_pipelines.transforms.native_shape import Box, grid_of, trimmed

_AHEAD = 2  # batches being made while one is used
_log = logging.getLogger(__name__)


def center_crops(
    dataset: Dataset,
    size: int,
    *,
    resize: int | None = None,
    batch_size: int = 256,
    threads: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    channels: int = 3,
    bits: int = 8,
    frames: int = 1,
    frame_stride: int | None = None,
    samples: Sequence[int] | np.ndarray | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (images, labels, samples) in the order of the samples; the tensors are new each time.

    Bad samples are left out, logged: a probe must not count a neighbour in their place.

    Args:
        dataset: Where to read.
        size: Side of the square crop in px.
        resize: Short side in px before the crop; default `round(size * 256 / 224)`, the protocol of the
            k-NN probe (Caron et al. 2021). An image of exactly `size` x `size` is taken whole when
            `resize` is not given: small data sets are not enlarged only to be cut.
        batch_size: Images at a time; the last batch and those with bad samples have fewer.
        threads: See `loader.default_threads`.
        rank: Of `world_size`; each takes an equal run of samples (to one), so that ranks in order make the whole.
        world_size: Ranks that share the work.
        channels: Of the images, as `decode` gives them.
        bits: Of a channel, 8 or 16.
        frames: Of a stack, which has `frames * channels` planes, the channels of a frame side by side; see
            `transforms.frames.Frames`, of which the frames in the middle are taken. 1: samples are images.
        frame_stride: See there.
        samples: Only these, in this order; default: all.

    Yields:
        images (b, c, size, size) uint8, or uint16 for 16 bits; labels (b,) int64 with -1 where unknown; sample
        numbers (b,) int64.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks count from 0 to world_size - 1")
    wanted: Sequence[int] | np.ndarray = range(dataset.num_samples) if samples is None else samples
    first, last = (len(wanted) * part // world_size for part in (rank, rank + 1))
    load = partial(
        _load, dataset, size=size, resize=resize, channels=channels, bits=bits, frames=Frames(frames, frame_stride)
    )
    for images, labels, numbers in _loaded(dataset, samples, (first, last), batch_size, threads, load):
        yield torch.from_numpy(np.stack(images)), labels, numbers


def whole_images(
    dataset: Dataset,
    tokens: int,
    patch: int,
    *,
    batch_size: int = 256,
    channels: int = 3,
    bits: int = 8,
    samples: Sequence[int] | np.ndarray | None = None,
) -> Iterator[tuple[list[np.ndarray], Tensor, Tensor]]:
    """Yield (images, labels, samples) as `center_crops` does, of images at their own shape.

    Each is resized to sides that are multiples of `patch` px, to as many of at most `tokens` patches as its shape
    allows; of what is left over, half is cut off at either side. Images are (c, h, w).
    """
    load = partial(_load_whole, dataset, tokens=tokens, patch=patch, channels=channels, bits=bits)
    last = dataset.num_samples if samples is None else len(samples)
    yield from _loaded(dataset, samples, (0, last), batch_size, None, load)


def _load_whole(dataset: Dataset, sample: int, tokens: int, patch: int, channels: int, bits: int) -> np.ndarray | None:
    try:
        image = decode(dataset.read(sample), channels, bits)
    except BadSampleError as error:
        _log.warning("%s; it is left out", error)
        return None
    size, box = whole_geometry(image.shape[0], image.shape[1], tokens, patch)
    out = np.empty((channels, *size), dtype=image.dtype)
    any_channels.store(any_channels.resized(image, box, size, "bicubic"), out)
    return out


def whole_geometry(height: int, width: int, tokens: int, patch: int) -> tuple[tuple[int, int], Box]:
    """Height and width in px that `whole_images` brings an image to, and the box that it keeps of it."""
    grid = grid_of(height, width, tokens)
    return (grid[0] * patch, grid[1] * patch), trimmed((0, 0, width, height), grid)


def _loaded(
    dataset: Dataset,
    samples: Sequence[int] | np.ndarray | None,
    part: tuple[int, int],
    batch_size: int,
    threads: int | None,
    load: Callable[[int], np.ndarray | None],
) -> Iterator[tuple[list[np.ndarray], Tensor, Tensor]]:
    """Batches of this part of the samples, less the bad ones, with their labels and numbers."""
    wanted: Sequence[int] | np.ndarray = range(dataset.num_samples) if samples is None else samples
    first, last = part
    starts = iter(range(first, last, batch_size))
    pending: deque[list[Future[np.ndarray | None]]] = deque()
    begins: deque[Sequence[int] | np.ndarray] = deque()
    stop = threading.Event()
    in_turn = in_order(dataset, first, last, batch_size)
    prefetcher = ShardPrefetcher(
        (dataset,), in_turn if samples is None else in_batches(dataset, samples[first:last], batch_size)
    )
    pool = ThreadPoolExecutor(threads or default_threads((dataset,)), "eval-loader", cancel_on, (stop,))
    try:
        while True:
            while len(pending) <= _AHEAD and (start := next(starts, None)) is not None:
                batch = wanted[start : min(start + batch_size, last)]
                begins.append(batch)
                pending.append([pool.submit(load, sample) for sample in batch])
            if not pending:
                return
            batch, images = begins.popleft(), [future.result() for future in pending.popleft()]
            found = [(sample, image) for sample, image in zip(batch, images, strict=True) if image is not None]
            if found:
                numbers = np.array([sample for sample, _ in found])
                labels = torch.from_numpy(dataset.labels[numbers].astype(np.int64))
                yield [image for _, image in found], labels, torch.from_numpy(numbers)
            prefetcher.advance()
    finally:
        stop.set()
        prefetcher.close()
        pool.shutdown(wait=True, cancel_futures=True)


def _load(
    dataset: Dataset, sample: int, size: int, resize: int | None, channels: int, bits: int, frames: Frames
) -> np.ndarray | None:
    """One crop, (c, size, size), of a stack (t * c, size, size); None for a bad sample."""
    try:
        stored = dataset.read(sample)
        if frames.count == 1:
            return cropped(decode(stored, channels, bits), size, resize)
        pictures = decode_stack(stored, frames.chosen, channels, bits=bits)
    except BadSampleError as error:
        _log.warning("%s; it is left out", error)
        return None
    return np.concatenate([cropped(picture.pixels, size, resize) for picture in pictures])


def cropped(image: np.ndarray, size: int, resize: int | None = None) -> np.ndarray:
    """(c, size, size) of an image (h, w, c) of any channels and depth; see `center_crops`."""
    out = np.empty((image.shape[2], size, size), dtype=image.dtype)
    if any_channels.is_plain(image):
        write_channels(center_crop(to_pillow(image), size, resize), out)
    else:
        height, width, _ = image.shape
        (new_width, new_height), (left, top) = geometry(width, height, size, resize)
        planes = any_channels.resized(image, (0, 0, width, height), (new_height, new_width), "bicubic")
        any_channels.store(planes[:, top : top + size, left : left + size], out)
    return out


def center_crop(image: Image.Image, size: int, resize: int | None = None) -> Image.Image:
    """Resize the short side (bicubic), then cut a square of `size` px from the middle; see `center_crops`."""
    resized_to, (left, top) = geometry(*image.size, size, resize)
    if resized_to != image.size:
        image = image.resize(resized_to, Image.Resampling.BICUBIC)
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def geometry(width: int, height: int, size: int, resize: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height to resize to, then left and top of the crop."""
    if resize is None:
        resize = size if (width, height) == (size, size) else round(size * 256 / 224)
    if resize < size:
        raise ValueError(
            f"the short side is resized to {resize} px and the crop is {size} px; it must be as large at least"
        )
    short = min(width, height)
    if short != resize:
        width, height = int(resize * width / short), int(resize * height / short)  # torchvision's rounding
    return (width, height), (round((width - size) / 2), round((height - size) / 2))
