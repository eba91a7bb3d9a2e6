"""How fast a run goes, and the lines that say so."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from data_pipelines.loader import Loader
from pretrain.tracking.bar import Bar
from pretrain.tracking.console import say
from pretrain.tracking.log_file import say_in_log

LINE_SECONDS = 30.0
BAR_SECONDS = 0.2


@dataclass
class Window:
    """Speed since the last log line, without the time of checkpoints."""

    step: int
    clock: Callable[[], float] = time.monotonic
    rates: Callable[[float], dict[str, float]] = lambda images_per_second: {}  # what follows from it
    seconds_per_step: float = 0.0
    seconds: float = 0.0  # of what was measured last
    _since: float = field(init=False)
    _waited: float = 0.0
    _paused: float = 0.0

    def __post_init__(self) -> None:
        self._since = self.worked()

    def worked(self) -> float:
        """Seconds on the clock, but for those that were left out."""
        return self.clock() - self._paused

    def measure(self, step: int, batch_size: int, loader: Loader) -> dict[str, float]:
        """Images per second (global) and the share of time spent waiting for data, since the last call."""
        now, waited = self.worked(), loader.wait_seconds
        seconds = max(now - self._since, 1e-9)
        self.seconds = seconds
        self.seconds_per_step = seconds / max(step - self.step, 1)
        images_per_second = (step - self.step) * batch_size / seconds
        measured = {
            "images_per_second": images_per_second,
            **self.rates(images_per_second),
            "data_wait": min(1.0, (waited - self._waited) / seconds),
            **loader.fetch_metrics(),
        }
        self.step, self._since, self._waited = step, now, waited
        return measured

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the next measurement."""
        before = self.clock()
        yield
        self._paused += self.clock() - before


class Watched:
    """What the person who watches rank 0 sees between the log lines, which are by steps.

    At a terminal, a bar below all lines; elsewhere, and in the log of the run, a line after the first step of a start
    and whenever LINE_SECONDS have passed without one. Nothing is gathered for it, and nothing is written to the
    metrics: the speed is rank 0's, of the last LINE_SECONDS.

    Args:
        step, total: How far the run is at its start, and where it ends.
        batch_size: Images of a step on all ranks.
        window: Whose time counts.
    """

    def __init__(self, step: int, total: int, batch_size: int, window: Window) -> None:
        self._total, self._batch_size, self._window = total, batch_size, window
        self._marks = deque([(window.worked(), step, 0.0)])  # time, step, seconds waited for data so far
        self._told = self._shown = -math.inf
        self._bar = Bar(step, total) if Bar.fits() else None

    def step(self, step: int, epoch: float, values: Mapping[str, float], waited: float, told: bool) -> None:
        """Step `step` is done, with the metrics `values`, after `waited` seconds of waiting for data since the start;
        `told`: a log line has just said so."""
        now, marks = self._window.clock(), self._marks
        marks.append((self._window.worked(), step, waited))
        while len(marks) > 2 and marks[-1][0] - marks[1][0] >= LINE_SECONDS:
            marks.popleft()
        (since, first, waited_before), (until, _, _) = marks[0], marks[-1]
        seconds = max(until - since, 1e-9)
        speed = {
            "images_per_second": (step - first) * self._batch_size / seconds,
            "data_wait": min(1.0, (waited - waited_before) / seconds),
        }
        seconds_per_step = seconds / (step - first)
        if not told and now - self._told >= LINE_SECONDS:
            speed |= self._window.rates(speed["images_per_second"])
            line = progress_line(step, self._total, epoch, {**values, **speed}, seconds_per_step)
            (say_in_log if self._bar else say)(line)
            told = True
        self._told = now if told else self._told
        if self._bar and now - self._shown >= BAR_SECONDS:
            with suppress(OSError):  # a terminal that is gone is no reason to stop
                self._bar.show(step, speed_words(step, self._total, speed, seconds_per_step))
            self._shown = now

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            with suppress(OSError):
                self._bar.close()


def progress_line(step: int, total: int, epoch: float, values: Mapping[str, float], seconds_per_step: float) -> str:
    """`step 120/1875  epoch 0.77  loss 0.832  lr 1.2e-04  294 img/s  data 2%  eta 4:03`."""
    return (
        f"step {step}/{total}  epoch {epoch:.2f}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"{speed_words(step, total, values, seconds_per_step)}"
    )


def speed_words(step: int, total: int, values: Mapping[str, float], seconds_per_step: float) -> str:
    """`294 img/s  data 2%  eta 4:03`, with `3.7k tok/s  mfu 41%` or `3.7k tok/s  58 GFLOP/s` where they are known."""
    eta = int((total - step) * seconds_per_step)
    clock = f"{eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}" if eta >= 3600 else f"{eta // 60}:{eta % 60:02d}"
    work = ""
    if "tokens_per_second" in values:
        work += f"  {shortened(values['tokens_per_second'])} tok/s"
    if "mfu" in values:
        work += f"  mfu {values['mfu']:.0%}"
    elif "teraflops" in values:
        work += f"  {values['teraflops'] * 1000:.3g} GFLOP/s"
    return f"{values['images_per_second']:.0f} img/s{work}  data {values['data_wait']:.0%}  eta {clock}"


def shortened(number: float) -> str:
    """`870`, `3.7k`, `12M`."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{int(number < 10 * size)}f}{unit}"
    return f"{number:.0f}"


def memory_gb(device: torch.device) -> float:
    """The most memory this process has used: of the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
