"""Which frames of a stack are shown: a function of their number and of a draw."""

from __future__ import annotations

import itertools
from typing import Annotated, NamedTuple

from pydantic import Field, PositiveInt

from data_pipelines.rng import Purpose, Stream
from data_pipelines.transforms.params import Uniform


class Frames(NamedTuple):
    """How many frames of a stack are shown, and how far apart.

    count: 1: images are no stacks, and of those that are the first frame is shown.
    stride: from one frame to the next, the first of which is drawn; None: they are spread over the stack, one from each
        of `count` parts of it, equal to one frame. A stack too short for the stride takes the largest that fits, and
        one of fewer frames than `count` shows some of them several times, evenly.
    """

    count: Annotated[int, Field(ge=1, le=4096)] = 1  # type: ignore[assignment]  # tuples' own `count` is not used
    stride: PositiveInt | None = None

    def chosen(self, available: int, rng: Uniform | None = None) -> list[int]:
        """The numbers of the frames, rising, of a stack of `available`: drawn, or without a draw its middle ones."""
        draw = (lambda: 0.5) if rng is None else rng.random
        count, stride = self.count, self.stride
        if available < count:
            return [(2 * part + 1) * available // (2 * count) for part in range(count)]
        if stride is None:
            ends = [part * available // count for part in range(count + 1)]
            return [begin + int(draw() * (end - begin)) for begin, end in itertools.pairwise(ends)]
        stride = min(stride, (available - 1) // (count - 1)) if count > 1 else 1
        first = int(draw() * (available - (count - 1) * stride))
        return [first + number * stride for number in range(count)]

    def drawn(self, identity: tuple[int, ...], available: int) -> list[int]:
        """Those of one showing, which (seed, data set, epoch, sample) name: all of its crops show the same frames."""
        seed, *showing = identity
        return self.chosen(available, Stream(seed, Purpose.FRAMES, *showing))
