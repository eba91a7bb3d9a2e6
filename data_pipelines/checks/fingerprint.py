"""What is remembered of an image to find it again: hashes of its bytes, its pixels and its looks.

The perceptual hash is of the family of pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash
functions"), with the signs of more coefficients. Measured on photographs, bits of 128 that differ at the 99th
percentile: re-encoded at quality 50: 3; reduced to a third: 8; to 64 px: 7; brighter by 30 %: 15; 2 % cut off: 14; 5 %:
26. Of unrelated images one pair in a million differs in fewer than 29.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

import cv2
import numpy as np
from einops import rearrange, reduce

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.decode import BadSampleError, decode
from data_pipelines.loader import default_threads

HASH_BITS = 128
THUMBNAIL_SIDE = 16
_SIDE = 32  # px of the reduced image whose cosine transform is taken
_PIECE = 64  # images a thread looks at at a time
#: A coefficient below this is decided by rounding; of textured images nearly all are larger.
_NOISE = 1.0


def _cosines() -> np.ndarray:
    """The orthonormal cosine transform: (frequency, px)."""
    frequency, place = np.arange(_SIDE)[:, None], np.arange(_SIDE)[None] + 0.5
    basis = np.cos(np.pi * frequency * place / _SIDE) * np.sqrt(2 / _SIDE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def _lowest_frequencies() -> np.ndarray:
    """(HASH_BITS, 2) vertical and horizontal frequency, the lowest first, without the mean."""
    frequencies = np.stack(np.meshgrid(np.arange(_SIDE), np.arange(_SIDE), indexing="ij"), axis=-1).reshape(-1, 2)
    order = np.lexsort((frequencies[:, 1], frequencies.max(axis=1), frequencies.sum(axis=1)))
    return frequencies[order[1 : 1 + HASH_BITS]]


_COSINES = _cosines()
_FREQUENCIES = _lowest_frequencies()


def _packed(bits: np.ndarray) -> np.ndarray:
    octets = np.packbits(np.ascontiguousarray(bits), axis=-1, bitorder="little")
    return octets.view("<u8").astype(np.uint64)


#: (2,) uint64: a mirrored image has the image's hash with these bits turned (odd cosines change their sign).
MIRROR_BITS = _packed(_FREQUENCIES[:, 1] % 2 == 1)


@dataclass(frozen=True)
class Fingerprints:
    """One row a sample of a data set."""

    readable: np.ndarray  # (n,) bool; all else means nothing where this is False
    textured: np.ndarray  # (n,) bool; of other images (blank, plain gradients) the hash is noise
    byte_digests: np.ndarray  # (n, 2) uint64: half of the SHA-256 of the file
    pixel_digests: np.ndarray  # (n, 2) uint64: half of the SHA-256 of the decoded pixels and their shape
    hashes: np.ndarray  # (n, 2) uint64: HASH_BITS signs
    thumbnails: np.ndarray  # (n, THUMBNAIL_SIDE ** 2) uint8, grey, from the image's darkest to its lightest level
    num_pixels: np.ndarray  # (n,) int64

    @classmethod
    def empty(cls, count: int) -> Fingerprints:
        """Room for `count` samples, about 330 bytes each."""
        return cls(
            np.zeros(count, dtype=bool),
            np.zeros(count, dtype=bool),
            np.zeros((count, 2), dtype=np.uint64),
            np.zeros((count, 2), dtype=np.uint64),
            np.zeros((count, 2), dtype=np.uint64),
            np.zeros((count, THUMBNAIL_SIDE**2), dtype=np.uint8),
            np.zeros(count, dtype=np.int64),
        )

    def part(self, rows: slice) -> Fingerprints:
        """Some rows, in the same memory."""
        return Fingerprints(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def take_fingerprints(
    dataset: Dataset,
    into: Fingerprints,
    *,
    threads: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Decode every sample and fill `into`, one row a sample.

    Args:
        dataset: Where to read.
        into: As many rows as the data set has samples.
        threads: Default: see `loader.default_threads`.
        advance: Called with the number of images done.
    """

    def take(rows: slice) -> int:
        _take_piece(dataset, rows, into.part(rows))
        return rows.stop - rows.start

    starts = iter(range(0, dataset.num_samples, _PIECE))
    pending: deque[Future[int]] = deque()
    threads = threads or default_threads((dataset,))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fingerprint")
    try:
        while True:
            while len(pending) < 4 * threads and (start := next(starts, None)) is not None:
                pending.append(pool.submit(take, slice(start, min(start + _PIECE, dataset.num_samples))))
            if not pending:
                return
            advance(pending.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _take_piece(dataset: Dataset, rows: slice, into: Fingerprints) -> None:
    reduced = np.zeros((rows.stop - rows.start, _SIDE, _SIDE), dtype=np.float32)
    for place, number in enumerate(range(rows.start, rows.stop)):
        stored = dataset.read(number)
        try:
            image = decode(stored, channels=None, bits=None)
        except BadSampleError:  # the caller counts them, `verify` names them
            continue
        into.readable[place] = True
        into.byte_digests[place] = _digest(stored.image)
        into.pixel_digests[place] = _digest(
            repr((image.shape, image.dtype.str)).encode(), np.ascontiguousarray(image).data
        )
        into.num_pixels[place] = image.shape[0] * image.shape[1]
        reduced[place] = reduce_grey(image)
    into.hashes[:], into.textured[:] = perceptual_hashes(reduced)
    into.thumbnails[:] = _thumbnails(reduced)


def _digest(*parts: bytes | memoryview) -> np.ndarray:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return np.frombuffer(digest.digest()[:16], dtype=np.uint64)


def reduce_grey(image: np.ndarray) -> np.ndarray:
    """An image (h, w, c) of 8 or 16 bits squeezed to 32x32 px, the mean of its channels: float32 in its own levels."""
    height, width, channels = image.shape
    if channels not in (1, 3):  # OpenCV resizes up to four
        image = image.mean(axis=2, dtype=np.float32)
    small = (min(width, _SIDE), min(height, _SIDE))
    if small != (width, height):  # enlarging and reducing apart: the area average reduces only
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    if small != (_SIDE, _SIDE):
        image = cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    return image.reshape(_SIDE, _SIDE, -1).mean(axis=2, dtype=np.float32)


def perceptual_hashes(reduced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (n, 2) uint64 of reduced images (n, 32, 32), and which of them (n,) have the texture for one.

    The signs of the lowest frequencies but the mean: brightness and contrast do not change them. Where half of the
    coefficients are below the rounding of the pixels, the image is blank or a plain gradient.
    """
    spectra = _COSINES @ reduced @ _COSINES.T
    coefficients = spectra[:, _FREQUENCIES[:, 0], _FREQUENCIES[:, 1]]
    textured = np.median(np.abs(coefficients), axis=1) > _NOISE
    return _packed(coefficients > 0), textured


def _thumbnails(reduced: np.ndarray) -> np.ndarray:
    small = reduce(reduced, "n (h a) (w b) -> n (h w)", "mean", h=THUMBNAIL_SIDE, w=THUMBNAIL_SIDE)
    low, high = small.min(axis=1, keepdims=True), small.max(axis=1, keepdims=True)
    return np.round((small - low) * (255 / np.maximum(high - low, 1e-6))).astype(np.uint8)


def correlations(one: np.ndarray, other: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Pearson's correlation of thumbnails, row by row: (n,) of two (n, THUMBNAIL_SIDE ** 2).

    `mirrored`: with the other's mirror image. A flat thumbnail correlates with nothing: 0.
    """
    if mirrored:
        other = rearrange(other, "n (h w) -> n h w", h=THUMBNAIL_SIDE)[:, :, ::-1].reshape(len(other), -1)
    x, y = (values.astype(np.float32) - values.mean(axis=1, keepdims=True) for values in (one, other))
    norms = np.sqrt(np.einsum("nd,nd->n", x, x) * np.einsum("nd,nd->n", y, y))
    return np.einsum("nd,nd->n", x, y) / np.maximum(norms, 1e-6)
