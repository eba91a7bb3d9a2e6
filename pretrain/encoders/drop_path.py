"""Stochastic depth (Huang et al. 2016) that skips: a branch runs on the rows that keep it, as in DINOv2 (Oquab et al.
2024, section 5).

Which images drop which branch is a function of (seed, step, row of the global batch, crop, block, branch) alone: the
trainer enters `drawn` for each micro-batch, an encoder asks `paths_of` at the start of a pass and hands each block its
part as an input, so that a block computed again in the backward pass drops the same. The draws are made on the host,
which knows the rows, and go to the device without a wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.rng import Purpose, stream_keys, uniform_table
from pretrain.stream.from_host import from_host

#: Above this share of kept rows a branch runs on all rows, and what is dropped is multiplied by zero: to pick rows and
#: to add to them costs two passes over the states, which so few rows less don't pay (tests/bench/drop_path.py).
SKIP_BELOW = 0.95


class Branch(NamedTuple):
    """What goes through one branch: the images `rows` (k,) of the batch, all where None; and what each image's result
    is multiplied by, `weights` (k,) fp32: 1 over the probability to be kept, or 0."""

    rows: Tensor | None
    weights: Tensor


class Chosen(NamedTuple):
    """A `Branch` on the host."""

    rows: np.ndarray | None
    weights: np.ndarray


class Paths(NamedTuple):
    """Of the two branches of a block: attention and MLP."""

    attention: Branch
    mlp: Branch


class Draws:
    """The draws of one micro-batch: which crops were asked for is counted, by who asked."""

    def __init__(self, seed: int, step: int, rows: np.ndarray) -> None:
        self.seed, self.step, self.rows = seed, step, rows.astype(np.uint64)
        self.seen: Counter[tuple[Purpose, int]] = Counter()
        self.passes: Counter[Purpose] = Counter()

    def keys(self, purpose: Purpose, asker: int, images: int) -> np.ndarray:
        """(images,) uint64: a stream of `purpose` for each of the next images of `asker`, crop by crop of all rows.

        ValueError for images that are not so many crops of each row.
        """
        count = len(self.rows)
        if images % count:
            setting = purpose.name.lower()
            raise ValueError(
                f"an encoder with {setting.replace('_', ' ')} got {images} images in a micro-batch of {count} rows; it "
                f"takes whole crops, (v b) c h w, of all rows (or set encoder.{setting}=0)"
            )
        first = self.seen[purpose, asker]
        crops = np.arange(first, first + images // count, dtype=np.uint64)
        self.seen[purpose, asker] += len(crops)
        return stream_keys(self.seed, purpose, self.step, asker, crops[:, None], self.rows[None]).reshape(-1)

    def kept(self, asker: int, rates: Sequence[float], images: int) -> np.ndarray:
        """(images, branches) bool: whether the next images of `asker`, crop by crop of all rows, keep each branch."""
        return self.uniform(asker, images, len(rates)) >= np.asarray(rates)

    def uniform(self, asker: int, images: int, numbers: int) -> np.ndarray:
        """(images, numbers) in [0, 1) that belong to the next images of `asker`, likewise."""
        return uniform_table(self.keys(Purpose.DROP_PATH, asker, images), numbers)


_draws: ContextVar[Draws | None] = ContextVar("drop path's draws", default=None)

#: Who asks for numbers: an encoder for its paths, blocks that go on from its states, an encoder for tokens it drops.
ENCODER, FURTHER, TOKENS = 0, 1, 2


@contextmanager
def drawn(seed: int, step: int, rows: Tensor) -> Iterator[None]:
    """While it lasts, encoders in training drop the paths that belong to (seed, step, rows).

    Args:
        rows: (b,) int64 on the host, the micro-batch's rows of the global batch.
    """
    token = _draws.set(Draws(seed, step, rows.numpy()))
    try:
        yield
    finally:
        _draws.reset(token)


def current_draws() -> Draws | None:
    """Those of the micro-batch under way; None outside of `drawn`."""
    return _draws.get()


def noise_of(images: int, numbers: int) -> np.ndarray:
    """(images, numbers) in [0, 1) by which the tokens of images are dropped, which are all crops of a view, then of the
    next: they belong to (seed, step, row, crop) within `drawn`, and are torch's outside of it."""
    draws = _draws.get()
    return torch.rand(images, numbers).numpy() if draws is None else draws.uniform(TOKENS, images, numbers)


def paths_of(
    blocks: Sequence[nn.Module], images: int, device: torch.device, asker: int = ENCODER
) -> list[Paths | None]:
    """What each of the blocks drops in a pass over `images`, which are all crops of a view (b), then of the next.

    None for blocks that keep all. So outside of `drawn`: a block then drops by timm's own DropPath, at random.
    """
    chosen = choose_paths(blocks, images, asker)
    if chosen is None:
        return [None] * len(blocks)
    brought = to_device(chosen, device)
    pairs = zip(blocks, brought[::2], brought[1::2], strict=True)
    return [Paths(attention, mlp) if any(_rates(block)) else None for block, attention, mlp in pairs]


def choose_paths(blocks: Sequence[nn.Module], images: int, asker: int = ENCODER) -> list[Chosen] | None:
    """What `paths_of` gives, on the host and before it is paired: two for each block; None where all is kept."""
    draws = _draws.get()
    rates = [rate if block.training else 0.0 for block in blocks for rate in _rates(block)]
    if draws is None or not any(rates):
        return None
    return [_chosen(keeps, rate) for keeps, rate in zip(draws.kept(asker, rates, images).T, rates, strict=True)]


def weights_of(rates: Sequence[float], images: int, device: torch.device, asker: int = ENCODER) -> list[Tensor] | None:
    """What each image's result of each branch is multiplied by, (images,) fp32 a branch, for encoders that compute all.

    rates: of all branches, in the order in which they are numbered. None where all is kept, and outside of `drawn`.
    """
    draws = _draws.get()
    if draws is None or not any(rates):
        return None
    kept = draws.kept(asker, rates, images) / (1.0 - np.asarray(rates))
    return list(from_host(kept.T.astype(np.float32), device).unbind())


def _rates(block: nn.Module) -> tuple[float, float]:
    shared = getattr(block, "drop_path", None)
    both = (getattr(block, "drop_path1", shared), getattr(block, "drop_path2", shared))
    return tuple(getattr(drop, "drop_prob", 0.0) for drop in both)


def _chosen(keeps: np.ndarray, rate: float) -> Chosen:
    chosen = np.flatnonzero(keeps)
    if len(chosen) >= SKIP_BELOW * len(keeps):
        return Chosen(None, keeps / (1.0 - rate))
    if len(chosen):
        return Chosen(chosen, np.full(len(chosen), 1.0 / (1.0 - rate)))
    # one image runs for nothing, so that every parameter has a gradient on every rank
    return Chosen(np.zeros(1, np.int64), np.zeros(1))


def uniforms_of_the_step(purpose: Purpose, streams: int, count: int) -> np.ndarray | None:
    """(streams, count) uniform in [0, 1), the same for all rows of a step; None outside of `drawn`.

    A function of (seed, purpose, step, how often it was asked for in the micro-batch before).
    """
    draws = _draws.get()
    if draws is None:
        return None
    keys = stream_keys(draws.seed, purpose, draws.step, draws.passes[purpose], np.arange(streams, dtype=np.uint64))
    draws.passes[purpose] += 1
    return uniform_table(keys, count)


def to_device(branches: Sequence[Chosen], device: torch.device) -> list[Branch]:
    """Branches drawn on the host; all their numbers go to the device in two copies."""
    rows = [np.zeros(0, np.int64) if branch.rows is None else branch.rows for branch in branches]
    weights = [branch.weights for branch in branches]
    all_rows = from_host(np.concatenate(rows), device).split([len(part) for part in rows])
    all_weights = from_host(np.concatenate(weights).astype(np.float32), device).split([len(part) for part in weights])
    return [Branch(part if len(part) else None, w) for part, w in zip(all_rows, all_weights, strict=True)]


def unskipped(path: Branch | None, images: int) -> Branch | None:
    """The same path with all `images` going through it, and weights (images,) of zero for those that drop it.

    For branches that normalise over the batch: statistics of the kept rows alone would be others.
    """
    if path is None or path.rows is None:
        return path
    weights = torch.zeros(images, device=path.weights.device)
    return Branch(None, weights.index_add(0, path.rows, path.weights))


def add_branch(
    x: Tensor, branch: Callable[[Tensor, Tensor | None], Tensor], drop: nn.Module, path: Branch | None
) -> Tensor:
    """x (b, ...) plus what the branch makes of the rows that keep it.

    branch: from (part (k, ...) of x, its rows (k,) or None for all) to what is added. drop: what drops where no path
    was drawn.
    """
    if path is None:
        return x + drop(branch(x, None))
    if path.rows is None:
        return x + _weighted(branch(x, None), path.weights, x.dtype)
    added = branch(x.index_select(0, path.rows), path.rows)
    return x.index_add(0, path.rows, _weighted(added, path.weights, x.dtype))


def _weighted(added: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return (added * weights.view(-1, *[1] * (added.ndim - 1))).to(dtype)
