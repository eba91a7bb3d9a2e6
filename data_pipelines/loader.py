"""Sample numbers to batches of integer tensors, written straight into reused buffers by threads or processes."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING

from data_pipelines.buffers import Batch, StepBuffer
from data_pipelines.datasets.account import BadSampleAccount, BadSampleLog
from data_pipelines.datasets.bad_samples import Decoder
from data_pipelines.datasets.prefetch import PREFETCH_STEPS, naming
from data_pipelines.images.decode import BadSampleError
from data_pipelines.rng import DrawFields
from data_pipelines.rows import Making, RowMaker, default_threads, fetched
from data_pipelines.runs import ChildRun, Run, ThreadRun
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends.select import on_cpu, resolve_backend
from data_pipelines.transforms.config import BackendName, Views
from data_pipelines.wording import counted

if TYPE_CHECKING:  # imported where there are to be any
    from data_pipelines.children.parent import Children
    from data_pipelines.children.wire import Message

__all__ = ["Batch", "Loader", "default_threads"]


class Loader:
    """This rank's part of every global batch.

    The batch of a step is a function of the sampler, the views and the step alone: neither ranks, accumulation,
    processes, threads nor a restart change it. Rank r takes rows [rB/R, (r+1)B/R), and its micro-batches are
    consecutive parts of those.

    Args:
        sampler: Which sample fills which row; its data sets stay open when the loader closes.
        views: The crops to make.
        rank: r of `world_size`.
        world_size: R.
        grad_accum_steps: Micro-batches of a step; the global batch is a multiple of `world_size * grad_accum_steps`.
        draw: Draws what batches hold beside crops, ids, rows and labels; called once a row, see `rng.DrawFields`. With
            workers, a `NamedDraw` or a function of a module, for they look it up by its name.
        workers: Processes that make the batches, each with threads of its own; 0: threads of this process do.
        threads: Of each process. Default: see `default_threads`.
        prefetch: Steps made ahead of the one in use; each costs a buffer.
        pin_memory: Buffers that a GPU can copy from asynchronously. They are not written to again before
            the copies that the consumer enqueued on its current stream are done.
        max_bad_share: See `Decoder`.
        channels: Of the crops: 3 are RGB, 1 is grey; with others `views` loses what needs colours (see `fitting`).
        frames: With several, samples are stacks, and a crop has the `frames * channels` planes of one region in so many
            frames, the channels of a frame side by side. What is drawn (box, flip, colours) is the same in all of them.
            Which frames are shown, says `transforms.frames.Frames`.
        frame_stride: See there.
        bits: Of a channel: 8 give uint8, 16 uint16.
        backend: Makes the crops: see `backends`. With `device`, `device.finish` completes the batches.
        partial_decode: Decode of a JPEG only what its crops touch, where `jpeg.has_regions`; the crops are the same.
        dct_scaling: Decode a large JPEG at a half, a quarter or an eighth where its crops have px to spare.
        bad_samples: Where bad samples are written down.
        masks: Whether batches hold `masks` (b, h, w) int32 of the first global crops: the classes of the samples'
            `KEY.mask.png`, -1 where they are not to be judged. Every sample must have one.
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
        workers: int = 0,
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
        masks: bool = False,
        frames: int = 1,
        frame_stride: int | None = None,
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
        self.sampler, self.grad_accum_steps, self.prefetch = sampler, grad_accum_steps, prefetch
        self.num_rows = batch_size // world_size
        self.first_row = rank * self.num_rows
        self.wait_seconds = 0.0
        backend = resolve_backend(backend, channels, bits)
        if views.native and (backend == "device" or masks or frames > 1):
            what = "leaves colours to the device" if backend == "device" else "holds masks" if masks else "holds stacks"
            raise ValueError(
                f"crops keep their own shape (shape=native), and the batch {what}, which goes with crops of one size; "
                f"set {'data.backend=native' if backend == 'device' else 'shape=fixed'}"
            )
        if frames > 1 and (backend == "device" or masks):
            what = "masks are cut of images" if masks else "backend 'device' does the colours of images"
            raise ValueError(f"{what}, and frames is {frames}: stacks go without")
        on_device, maker = backend == "device", on_cpu(backend)
        #: Who makes the crops, in words.
        self.backend = f"{maker}, colours by the device" if on_device else maker
        self.workers, self.threads = workers, threads or default_threads(list(sampler.datasets.values()), workers)
        self._accounts = {
            key: BadSampleAccount(dataset.num_samples, max_bad_share, bad_samples)
            for key, dataset in sampler.datasets.items()
        }
        making = Making(
            views, channels, bits, maker, on_device, partial_decode, dct_scaling, masks, frames, frame_stride
        )
        #: Makes rows in this process.
        self.maker = RowMaker(sampler, making, self._accounts, draw, self.threads)
        self._pin_memory, self._horizon = pin_memory, shard_prefetch_steps
        self._children: Children | None = None
        if workers:
            from data_pipelines.children.parent import Children
            from data_pipelines.children.state import State

            self._children = Children(
                State(sampler, making, draw, self.threads),
                self._rows,
                workers,
                multiple=sampler.repeats,
                hear=self._hear,
                fetches=bool(shard_prefetch_steps) and any(dataset.fetches for dataset in sampler.datasets.values()),
                horizon=shard_prefetch_steps,
            )
        self._run: Run | None = None
        self._upcoming: int | None = None  # the step that is asked for next

    @property
    def draw(self) -> DrawFields | None:
        """What draws the fields beside crops, ids, rows and labels."""
        return self.maker.draw

    @property
    def decoders(self) -> dict[int, Decoder]:
        """Of this process, by data set."""
        return self.maker.decoders

    @property
    def num_bad(self) -> int:
        """Reads of this rank that found a bad sample."""
        return sum(account.num_bad for account in self._accounts.values())

    def steps(self, start: int = 0) -> Generator[list[Batch], None, None]:
        """Yield this rank's micro-batches of step `start`, `start + 1` and so on, without end.

        The tensors are reused: they hold until the next item is asked for.
        """
        run = self._run = self._begin(start)
        free, upcoming, numbers = deque(range(len(run.buffers))), itertools.count(start), deque[int]()
        try:
            for step in itertools.count(start):
                while free:
                    numbers.append(free.popleft())
                    run.begin(numbers[-1], next(upcoming))
                self._upcoming, number = step, numbers.popleft()
                began = time.perf_counter()
                with naming(step):
                    run.wait(step)
                self.wait_seconds += time.perf_counter() - began
                self._upcoming = step + 1
                yield run.buffers[number].split(self.grad_accum_steps)
                run.buffers[number].release()
                free.append(number)
                run.advance()
        finally:
            if self._run is run:
                self._run = None
            run.close()

    def rows(self, step: int, rows: range) -> Batch:
        """These rows of the global batch of a step, whoever's they are, in memory of their own."""
        buffer = StepBuffer.allocate(self.maker.fields(), rows, self._pin_memory)
        for piece in self.maker.begin(buffer.arrays, step, rows, stop=threading.Event()):
            piece.result()
        return buffer.split(1)[0]

    def fetch_metrics(self) -> dict[str, float]:
        """What this rank has fetched so far; empty where no data set fetches."""
        own = fetched(self.sampler.datasets.values())
        totals = ([own] if own else []) + ([] if self._children is None else self._children.fetched())
        if not totals:
            return {}
        num_bytes, hits, misses, seconds = (sum(values) for values in zip(*totals, strict=True))
        return {
            "fetch/gigabytes": num_bytes / 1e9,
            "fetch/hits": hits,  # shards that were here when a reader came
            "fetch/misses": misses,
            "fetch/wait_seconds": seconds,  # of all threads; see data_wait
        }

    @property
    def ready(self) -> bool:
        """Whether the iterator of `steps` made last has its next item without waiting."""
        return self._run is not None and self._upcoming is not None and self._run.is_made(self._upcoming)

    @property
    def makers(self) -> str:
        """Who makes the batches of this rank, in words: `2 processes x 1 thread`."""
        threads = counted(self.threads, "thread")
        if self._children is None:
            return threads
        count = self._children.count
        asked = "" if count == self.workers else f" ({self.workers} for {counted(self.num_rows, 'row')})"
        return f"{counted(count, 'process')} x {threads}{asked}"

    @property
    def child_processes(self) -> list[int]:
        """The numbers of the processes that make the batches; none with `workers=0`."""
        return [] if self._children is None else self._children.pids

    def close(self) -> None:
        """Stop the threads and processes. Iterators of `steps` cannot go on after this."""
        if self._run is not None:
            self._run.close()
            self._run = None
        if self._children is not None:
            self._children.close()
        self.maker.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _rows(self) -> range:
        """This rank's, of the global batch."""
        return range(self.first_row, self.first_row + self.num_rows)

    def _begin(self, start: int) -> Run:
        count = self.prefetch + 1
        if self._children is None:
            horizon = self._horizon
            return ThreadRun(self.maker, self._rows, count, pin_memory=self._pin_memory, start=start, horizon=horizon)
        fields = self.maker.fields()
        return ChildRun(self._children, fields, self._rows, count, pin_memory=self._pin_memory, start=start)

    def _hear(self, message: Message) -> None:
        """Keep the account of what a child has read."""
        for key, count in message.get("good", ()):
            self._accounts[key].count_good(count)
        if "note" in message:
            self._accounts[message["note"]].note(message["cases"], message["where"])
        if "bad" in message:
            account, dataset = self._accounts[message["bad"]], self.sampler.datasets[message["bad"]]
            number = message["number"]
            shard = dataset.shards[int(dataset.shards_of([number])[0])]
            error = BadSampleError(message["key"], shard, message["reason"], message["case"])
            try:
                account.count_bad(error)
            finally:
                account.name(number, error, message["instead"])
