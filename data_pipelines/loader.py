"""Sample numbers to batches of integer tensors, by threads that write straight into reused buffers."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from data_pipelines.buffers import Batch, StepBuffer
from data_pipelines.cores import cores_per_process
from data_pipelines.datasets.bad_samples import BadSampleLog, Decoder
from data_pipelines.datasets.dataset import NO_LABEL, Dataset
from data_pipelines.datasets.prefetch import PREFETCH_STEPS, Need, ShardPrefetcher, naming
from data_pipelines.remote.fetch import cancel_on
from data_pipelines.rng import DrawFields
from data_pipelines.sampler import Row, Sampler
from data_pipelines.transforms.backends.any_channels import fitting
from data_pipelines.transforms.backends.device import NUM_COLOURS
from data_pipelines.transforms.backends.select import backend as make_backend
from data_pipelines.transforms.backends.select import on_cpu, resolve_backend
from data_pipelines.transforms.config import BackendName, Views
from data_pipelines.transforms.transform import Recipe, SampleCrops

_THUMBNAIL_BYTES = 8192


class Loader:
    """This rank's part of every global batch.

    The batch of a step is a function of the sampler, the views and the step alone: neither ranks, accumulation,
    threads nor a restart change it. Rank r takes rows [rB/R, (r+1)B/R), and its micro-batches are consecutive
    parts of those.

    Args:
        sampler: Which sample fills which row; its data sets stay open when the loader closes.
        views: The crops to make.
        rank: r of `world_size`.
        world_size: R.
        grad_accum_steps: Micro-batches of a step; the global batch is a multiple of `world_size * grad_accum_steps`.
        draw: Draws what batches hold beside crops, ids, rows and labels; called once a row, see `rng.DrawFields`.
        threads: Default: see `default_threads`.
        prefetch: Steps made ahead of the one in use; each costs a buffer.
        pin_memory: Buffers that a GPU can copy from asynchronously. They are not written to again before
            the copies that the consumer enqueued on its current stream are done.
        max_bad_share: See `Decoder`.
        channels: Of the crops: 3 are RGB, 1 is grey; with others `views` loses what needs colours (see `fitting`).
        bits: Of a channel: 8 give uint8, 16 uint16.
        backend: Makes the crops: see `backends`. With `device`, `device.finish` completes the batches.
        partial_decode: Decode of a JPEG only what its crops touch, where `jpeg.has_regions`; the crops are the same.
        dct_scaling: Decode a large JPEG at a half, a quarter or an eighth where its crops have px to spare.
        bad_samples: Where bad samples are written down.
        shard_prefetch_steps: Steps of which the shards are fetched before they are read, where shards are fetched.
    """

    def __init__(
        self,
        sampler: Sampler,
        views: Views,
        *,
        rank: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        draw: DrawFields | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        pin_memory: bool = False,
        max_bad_share: float = 0.01,
        channels: int = 3,
        bits: int = 8,
        backend: BackendName = "auto",
        partial_decode: bool = True,
        dct_scaling: bool = True,
        bad_samples: BadSampleLog | None = None,
        shard_prefetch_steps: int = PREFETCH_STEPS,
    ) -> None:
        batch_size = sampler.batch_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}; ranks count from 0 to world_size - 1")
        if batch_size % (world_size * grad_accum_steps):
            raise ValueError(
                f"a batch of {batch_size} does not divide into {world_size} ranks x {grad_accum_steps} micro-batches; "
                f"it must be a multiple of {world_size * grad_accum_steps}"
            )
        self.sampler, self.grad_accum_steps = sampler, grad_accum_steps
        self.num_rows = batch_size // world_size
        self.first_row = rank * self.num_rows
        self.wait_seconds = 0.0
        backend = resolve_backend(backend, channels, bits)
        maker = on_cpu(backend)
        #: Who makes the crops, in words.
        self.backend = f"{maker}, colours by the device" if backend == "device" else maker
        self.recipe = Recipe(
            fitting(views, channels)[0],
            make_backend(maker),
            colour_on_device=backend == "device",
            partial_decode=partial_decode,
            dct_scaling=dct_scaling,
        )
        self._channels, self._bits = channels, bits
        self.draw, self.prefetch, self._pin_memory = draw, prefetch, pin_memory
        padded = maker == "native"
        self.decoders = {
            key: Decoder(dataset, channels, max_bad_share, padded, bad_samples, bits)
            for key, dataset in sampler.datasets.items()
        }
        self.threads = threads or default_threads(list(sampler.datasets.values()))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="loader")
        self._pending: deque[tuple[StepBuffer, list[Future[None]]]] = deque()
        self._shard_prefetch_steps = shard_prefetch_steps
        self._stop = threading.Event()  # ends what the threads are fetching

    @property
    def num_bad(self) -> int:
        """Reads of this rank that found a bad sample."""
        return sum(decoder.num_bad for decoder in self.decoders.values())

    def steps(self, start: int = 0) -> Generator[list[Batch], None, None]:
        """Yield this rank's micro-batches of step `start`, `start + 1` and so on, without end.

        The tensors are reused: they hold until the next item is asked for.
        """
        buffers = deque(self._allocate() for _ in range(self.prefetch + 1))
        pending = self._pending = deque()
        upcoming = itertools.count(start)
        stop = self._stop = threading.Event()
        prefetcher = ShardPrefetcher(
            self.sampler.datasets.values(), self._needs(start), self._shard_prefetch_steps, start
        )
        try:
            for step in itertools.count(start):
                while buffers:
                    buffer = buffers.popleft()
                    pending.append((buffer, self._fill(buffer, next(upcoming))))
                buffer, futures = pending.popleft()
                began = time.perf_counter()
                with naming(step):
                    for future in futures:
                        future.result()
                self.wait_seconds += time.perf_counter() - began
                yield buffer.split(self.grad_accum_steps)
                buffer.release()
                buffers.append(buffer)
                prefetcher.advance()
        finally:
            stop.set()
            prefetcher.close()
            remaining = [future for _, futures in pending for future in futures if not future.cancel()]
            wait(remaining)  # they write into buffers that go now

    def rows(self, step: int, rows: range) -> Batch:
        """These rows of the global batch of a step, whoever's they are, in memory of their own."""
        buffer = self._allocate(rows)
        self._pool.submit(self._fill_rows, buffer, step, 0, self.sampler.rows(step, rows)).result()
        return buffer.split(1)[0]

    def fetch_metrics(self) -> dict[str, float]:
        """What this process has fetched so far; empty where no data set fetches."""
        caches = {id(dataset.cache): dataset.cache for dataset in self.sampler.datasets.values() if dataset.fetches}
        totals = [cache.statistics for cache in caches.values()]
        if not totals:
            return {}
        return {
            "fetch/gigabytes": sum(total.fetched_bytes for total in totals) / 1e9,
            "fetch/hits": sum(total.hits for total in totals),  # shards that were here when a reader came
            "fetch/misses": sum(total.misses for total in totals),
            "fetch/wait_seconds": sum(total.wait_seconds for total in totals),  # of all threads; see data_wait
        }

    @property
    def ready(self) -> bool:
        """Whether the iterator of `steps` made last has its next item without waiting."""
        return bool(self._pending) and all(future.done() for future in self._pending[0][1])

    def close(self) -> None:
        """Stop the threads. Iterators of `steps` cannot go on after this."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _needs(self, start: int) -> Iterator[list[Need]]:
        """The shards that this rank's rows of each step from `start` on are in."""
        datasets = self.sampler.datasets
        for step in itertools.count(start):
            rows = self.sampler.rows(step, range(self.first_row, self.first_row + self.num_rows))
            found: list[Need] = []
            for number, group in itertools.groupby(rows, key=lambda row: row.dataset):
                shards = datasets[number].shards_of([row.sample for row in group])
                found += [Need(datasets[number], shard) for shard in dict.fromkeys(shards.tolist())]
            yield found

    def _allocate(self, rows: range | None = None) -> StepBuffer:
        """Memory for `rows` of the global batch, by default this rank's."""
        fields = {} if self.draw is None else self.draw(self.sampler.seed, 0, 0)  # for names, shapes and types
        rows = rows or range(self.first_row, self.first_row + self.num_rows)
        num_colours = NUM_COLOURS if self.recipe.colour_on_device else 0
        return StepBuffer(self.recipe.views, self._channels, rows, fields, self._pin_memory, num_colours, self._bits)

    def _fill(self, buffer: StepBuffer, step: int) -> list[Future[None]]:
        """Have the threads make a step, in pieces small enough to keep them all busy to its end."""
        rows = self.sampler.rows(step, range(self.first_row, self.first_row + self.num_rows))
        length = max(1, min(32, self.num_rows // (4 * self.threads)))
        length = math.ceil(length / self.sampler.repeats) * self.sampler.repeats  # a sample is decoded once a piece
        return [
            self._pool.submit(self._fill_rows, buffer, step, first, rows[first : first + length])
            for first in range(0, self.num_rows, length)
        ]

    def _fill_rows(self, buffer: StepBuffer, step: int, first: int, rows: list[Row]) -> None:
        """Rows `first` and following of the buffer."""
        cancel_on(self._stop)
        buffer.wait_until_free()
        arrays, seed = buffer.arrays, self.sampler.seed
        for _, same in itertools.groupby(enumerate(rows, first), key=lambda numbered: numbered[1][:3]):
            group = list(same)  # the rows, with their places, that show one sample
            row, places = group[0][1], {row.repeat: place for place, row in group}
            identities = [row._replace(repeat=repeat).identity(seed) for repeat in range(self.sampler.repeats)]
            crops = SampleCrops(self.recipe, identities)
            decoded = self.decoders[row.dataset].read(row.sample, crops)
            crops.make(decoded.picture, arrays, places)
            for place in places.values():
                arrays["labels"][place] = NO_LABEL if decoded.label is None else decoded.label
                arrays["ids"][place] = (row.dataset, decoded.sample)
        if self.draw is not None:
            for place in range(first, first + len(rows)):
                number = int(arrays["rows"][place])
                for name, field in self.draw(seed, step, number).items():
                    arrays[name][place] = field


def default_threads(datasets: Sequence[Dataset]) -> int:
    """This process's share of the cores; 1 for thumbnails, where threads only queue for the interpreter's lock.

    Measured on two cores: images of 110 KB, 2.0 times as fast with two threads; of 0.9 KB, 0.7 times.
    """
    num_bytes = sum(dataset.num_image_bytes for dataset in datasets)
    mean_bytes = num_bytes / sum(dataset.num_samples for dataset in datasets)
    return cores_per_process() if mean_bytes > _THUMBNAIL_BYTES else 1
