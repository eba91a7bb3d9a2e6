"""Rows of batches into memory that is given, by threads: the work of a loader, wherever it is done (no torch)."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_pipelines.balance import BalancedRows
from data_pipelines.cores import cores_per_process
from data_pipelines.datasets import maps
from data_pipelines.datasets.account import BadSampleAccount
from data_pipelines.datasets.bad_samples import Decoder
from data_pipelines.datasets.dataset import NO_LABEL, Dataset
from data_pipelines.datasets.prefetch import Need
from data_pipelines.images.maps import BadMapError
from data_pipelines.layout import CROPS, Field, fields_of
from data_pipelines.remote.fetch import cancel_on
from data_pipelines.rng import DrawFields
from data_pipelines.sampler import Row, Sampler
from data_pipelines.transforms.backends.any_channels import fitting
from data_pipelines.transforms.backends.colours import NUM_COLOURS
from data_pipelines.transforms.backends.select import CpuBackendName
from data_pipelines.transforms.backends.select import backend as make_backend
from data_pipelines.transforms.config import Views
from data_pipelines.transforms.frames import Frames
from data_pipelines.transforms.map_crops import cut_mask
from data_pipelines.transforms.transform import Recipe, SampleCrops

_THUMBNAIL_BYTES = 8192
_THREADS_A_CHILD = 4
_MOST_ROWS = 32  # of a piece


@dataclass(frozen=True)
class Making:
    """How a sample becomes crops; see `loader.Loader`, which says what of it the caller may choose."""

    views: Views
    channels: int
    bits: int
    maker: CpuBackendName
    colour_on_device: bool
    partial_decode: bool
    dct_scaling: bool
    masks: bool = False
    frames: int = 1  # of a stack, see `Frames`
    frame_stride: int | None = None


class RowMaker:
    """Makes rows of any global batch.

    Args:
        sampler: Which sample fills which row.
        making: How.
        accounts: Of the bad samples, by data set.
        draw: Draws what batches hold beside crops, ids, rows and labels.
        threads: Their number; they start with the first rows.
    """

    def __init__(
        self,
        sampler: Sampler,
        making: Making,
        accounts: Mapping[int, BadSampleAccount],
        draw: DrawFields | None,
        threads: int,
    ) -> None:
        self.sampler, self.draw, self.threads, self._making = sampler, draw, threads, making
        self.order = BalancedRows(sampler, making.views)
        self.frames = Frames(making.frames, making.frame_stride)
        self.recipe = Recipe(
            fitting(making.views, making.channels)[0],
            make_backend(making.maker),
            colour_on_device=making.colour_on_device,
            partial_decode=making.partial_decode,
            dct_scaling=making.dct_scaling,
        )
        padded = making.maker == "native"
        self.decoders = {
            key: Decoder(dataset, making.channels, padded=padded, bits=making.bits, account=accounts[key])
            for key, dataset in sampler.datasets.items()
        }
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")  # while those are at earlier steps

    def fields(self) -> dict[str, Field]:
        """What a row's place must hold."""
        making = self._making
        drawn = {} if self.draw is None else self._drawn()
        num_colours = NUM_COLOURS if making.colour_on_device else 0
        planes = making.channels * making.frames
        return fields_of(self.recipe.views, planes, making.bits, drawn, num_colours, making.masks)

    def begin(
        self,
        arrays: dict[str, np.ndarray],
        step: int,
        rows: range,
        first: int = 0,
        *,
        stop: threading.Event,
        wait: Callable[[], None] | None = None,
    ) -> list[Future[None]]:
        """Have the threads make these rows of a step, in pieces small enough to keep them all busy to the end.

        Args:
            arrays: The memory, whose field `rows` says which rows of the global batch lie where.
            step: Optimizer steps before it.
            rows: Positions in the global batch.
            first: The place of the first of them in the memory.
            stop: Ends what the threads fetch.
            wait: Called by the threads before they read or write.
        """
        order = _Once(lambda: self.order.rows(step, rows))  # by a thread: a large batch takes milliseconds
        length = max(1, min(_MOST_ROWS, len(rows) // (4 * self.threads)))
        length = math.ceil(length / self.sampler.repeats) * self.sampler.repeats  # a sample is decoded once a piece

        def fill(begin: int) -> None:
            if stop.is_set():
                return
            cancel_on(stop)
            if wait is not None:
                wait()
            self._fill(arrays, step, first + begin, order()[begin : begin + length])

        self._ahead.submit(self._read_ahead, order, stop)
        return [self._pool.submit(fill, begin) for begin in range(0, len(rows), length)]

    def needs(self, start: int, rows: range) -> Iterator[list[Need]]:
        """The shards that these rows of each step from `start` on are in."""
        datasets = self.sampler.datasets
        for step in itertools.count(start):
            found: dict[int, list[int]] = {}
            for row in self.order.rows(step, rows):
                found.setdefault(row.dataset, []).append(row.sample)
            yield [
                Need(datasets[number], shard)
                for number, samples in found.items()
                for shard in dict.fromkeys(datasets[number].shards_of(samples).tolist())
            ]

    def close(self) -> None:
        """Stop the threads."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, order: _Once, stop: threading.Event) -> None:
        if stop.is_set():
            return
        samples: dict[int, list[int]] = {}
        for row in order():
            if not row.repeat:
                samples.setdefault(row.dataset, []).append(row.sample)
        for number, chosen in samples.items():
            self.sampler.datasets[number].read_ahead(chosen)

    def _fill(self, arrays: dict[str, np.ndarray], step: int, first: int, rows: list[Row]) -> None:
        """Rows that lie at `first` and following."""
        seed = self.sampler.seed
        labels, ids = arrays["labels"], arrays["ids"]
        for _, same in itertools.groupby(enumerate(rows, first), key=lambda numbered: numbered[1][:3]):
            group = list(same)  # the rows, with their places, that show one sample
            row, places = group[0][1], {row.repeat: place for place, row in group}
            identities = [row._replace(repeat=repeat).identity(seed) for repeat in range(self.sampler.repeats)]
            crops = SampleCrops(self.recipe, identities)
            showing = (seed, row.dataset, row.epoch, row.sample)
            wanted = partial(self.frames.drawn, showing) if self.frames.count > 1 else None
            decoded = self.decoders[row.dataset].read(row.sample, crops, wanted)
            for number, picture in enumerate((decoded.picture, *decoded.further)):
                crops.make(picture, self._of_frame(arrays, number), places)
            if self._making.masks:
                self._cut_masks(row.dataset, decoded.sample, crops, arrays["masks"], places)
            for place in places.values():
                labels[place] = NO_LABEL if decoded.label is None else decoded.label
                ids[place] = (row.dataset, decoded.sample)
        if self.draw is not None:
            for place, number in enumerate(arrays["rows"][first : first + len(rows)].tolist(), first):
                if self._making.views.native:
                    self._draw_patches(arrays, seed, step, number, place)
                    continue
                for name, field in self.draw(seed, step, number).items():
                    arrays[name][place] = field

    def _draw_patches(self, arrays: dict[str, np.ndarray], seed: int, step: int, number: int, place: int) -> None:
        """What is drawn of each patch of a row's global crops, into the beginning of their places."""
        assert self.draw is not None
        for name, parts in self.draw(seed, step, number, arrays["global_grids"][place]).items():
            for view, part in enumerate(parts):
                arrays[name][place, view, : len(part)] = part

    def _drawn(self) -> Mapping[str, np.ndarray]:
        """Fields that are drawn, for their shapes and types."""
        assert self.draw is not None
        views = self.recipe.views
        if not views.native:
            return self.draw(self.sampler.seed, 0, 0)
        count, most = len(views.global_crops), views.global_crops[0].max_tokens
        assert most is not None  # of native views it is said
        drawn = self.draw(self.sampler.seed, 0, 0, np.ones((count, 2), np.int64))
        return {name: np.empty((count, most), parts[0].dtype) for name, parts in drawn.items()}

    def _of_frame(self, arrays: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """The memory with the crops narrowed to the channels of one frame of the stacks."""
        if self.frames.count == 1:
            return arrays
        channels = self._making.channels
        own = slice(number * channels, (number + 1) * channels)
        return arrays | {name: arrays[name][..., own, :, :] for name in CROPS if name in arrays}

    def _cut_masks(
        self, dataset: int, sample: int, crops: SampleCrops, out: np.ndarray, places: Mapping[int, int]
    ) -> None:
        """The masks of the first global crops of the rows that show a sample, into their places."""
        mask = maps.read(self.sampler.datasets[dataset], sample, "mask", crops.size)
        if mask is None:
            raise BadMapError(f"sample {self.sampler.datasets[dataset].key(sample)[0]} has no mask")
        for repeat, place in places.items():
            cut_mask(mask, crops.drawn[repeat][0], out[place])


class _Once:
    """What a function returns; the first thread that asks calls it, and the others wait."""

    def __init__(self, function: Callable[[], list[Row]]) -> None:
        self._function, self._lock = function, threading.Lock()
        self._result: list[Row] | None = None

    def __call__(self) -> list[Row]:
        with self._lock:
            if self._result is None:
                self._result = self._function()
            return self._result


def fetched(datasets: Iterable[Dataset]) -> list[float]:
    """Bytes fetched, hits, misses and seconds waited by this process so far; empty where no data set fetches."""
    caches = {id(dataset.cache): dataset.cache.statistics for dataset in datasets if dataset.fetches}
    if not caches:
        return []
    totals = [(one.fetched_bytes, one.hits, one.misses, one.wait_seconds) for one in caches.values()]
    return [sum(values) for values in zip(*totals, strict=True)]


def is_thumbnails(datasets: Sequence[Dataset]) -> bool:
    """Whether images are so small that the interpreter is what takes the time."""
    num_bytes = sum(dataset.num_image_bytes for dataset in datasets)
    return num_bytes / sum(dataset.num_samples for dataset in datasets) <= _THUMBNAIL_BYTES


def default_threads(datasets: Sequence[Dataset], workers: int = 0) -> int:
    """Of a process that makes batches alone: its share of the cores; of each of several, what is left of that.

    1 for thumbnails, where threads only queue for the interpreter's lock. Measured on two cores: images of 110 KB, 2.0
    times as fast with two threads; of 0.9 KB, 0.7 times.
    """
    return 1 if is_thumbnails(datasets) else max(1, math.ceil(cores_per_process() / max(1, workers)))


def default_workers(datasets: Sequence[Dataset]) -> int:
    """Processes that keep this process's share of the cores busy: one a core for thumbnails, else one for four.

    A thread holds the interpreter's lock for an eighth of the time that ten crops of a photo take.
    """
    cores = cores_per_process()
    return cores if is_thumbnails(datasets) else math.ceil(cores / _THREADS_A_CHILD)
