"""Makes a store, or what is missing of it: part by part, by one process or by several that know nothing of each other.

A part is a block of samples that its number alone tells, and its file is there whole or not at all. So a store goes on
after whatever ended it, and process r of w makes every w-th part. Who finds all parts there says that it is complete.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.store.decode import array_bytes
from eval.store.description import MOST_NAMED, PARTS, Description
from eval.store.encoding import Batch, FrozenEncoder, unreadable
from eval.store.matrix import check_room
from eval.store.parts import Part, part_digests, part_rows, part_samples, write_part
from eval.store.precision import kept
from eval.store.progress import counting
from eval.store.same_images import check_same_images

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset

_log = logging.getLogger(__name__)


def embed_split(
    encoder: FrozenEncoder,
    dataset: Dataset,
    folder: Path,
    description: Description,
    *,
    batch_size: int = 256,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Description | None:
    """Make those parts of this rank's that `folder` lacks; the description of the complete store, or None where parts
    of other ranks are missing yet.

    Raises ValueError where the folder holds other features, where the disk has too little room, and where no sample of
    a complete store could be read.
    """
    start_store(folder, description)
    mine = range(rank, description.num_parts, world_size)
    missing = [number for number in mine if part_rows(description.path(folder, number), description.digest) is None]
    for number in sorted(set(mine) - set(missing))[:1]:  # what is kept is of the images that are there now
        path = description.path(folder, number)
        check_same_images(part_samples(path), part_digests(path), dataset, encoder.crops, encoder.encoder.patch, folder)
    if missing:
        if done := len(mine) - len(missing):
            say(f"{folder}: {done} of {len(mine)} parts are there already")
        samples = np.concatenate([np.asarray(description.part(number), dtype=np.int64) for number in missing])
        check_room(folder, array_bytes(description, len(samples)), f"{folder}")
        batches = encoder.batches(dataset, samples, batch_size)
        with counting(folder.name, len(samples), progress, lines=True) as advance:
            _write(_counted(batches, samples, advance), dataset, folder, description, missing)
    return finish_store(folder, description, dataset)


def start_store(folder: Path, description: Description) -> None:
    """Make a new store, or see to it that the one that is there is the same."""
    there = Description.read(folder)
    if there is None:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        description.write(folder)
        there = Description.read(folder)  # another process's, perhaps
        assert there is not None
    if differences := there.differences(description):
        raise ValueError(
            f"{folder} holds other features ({'; '.join(differences[:5])}); choose another --out, or remove that folder"
        )


def finish_store(folder: Path, description: Description, dataset: Dataset) -> Description | None:
    """Say in `store.json` that all parts are there, with what could not be read; None where some are missing."""
    rows = lost = 0
    named: list[str] = []
    for number in range(description.num_parts):
        path, block = description.path(folder, number), description.part(number)
        there = part_rows(path, description.digest)
        if there is None:
            return None
        rows += there
        lost += len(block) - there
        if there < len(block) and len(named) < MOST_NAMED:
            samples = np.setdiff1d(np.arange(block.start, block.stop), part_samples(path))
            named += [dataset.key(int(sample))[0] for sample in samples[:MOST_NAMED]]
    if not rows:
        raise ValueError(unreadable(dataset, description.identity["crops"]["channels"], description.num_samples))
    before = Description.read(folder) or description
    complete = before.completed(rows, lost, tuple(named))
    if complete != before:
        complete.write(folder)
    for litter in (folder / PARTS).glob(".part-*.tmp"):  # of processes that were killed, or write what is there already
        litter.unlink(missing_ok=True)
    return complete


def _counted(batches: Iterator[Batch], samples: np.ndarray, advance: Callable[[int], None]) -> Iterator[Batch]:
    """The batches; bad samples count as done, too."""
    done = 0
    for batch in batches:
        yield batch
        now = int(np.searchsorted(samples, batch.samples[-1], side="right"))
        advance(now - done)
        done = now
    advance(len(samples) - done)


def _write(
    batches: Iterator[Batch], dataset: Dataset, folder: Path, description: Description, missing: Sequence[int]
) -> None:
    """Write each part as soon as its last sample has come, in a thread, while the next one is computed."""
    block, waiting = _Block(description), list(missing)
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, "store-writer") as pool:

        def finish(number: int) -> None:
            nonlocal pending, block
            if pending is not None:
                pending.result()  # one part at most is written while another one grows
            pending = pool.submit(_write_part, block, dataset, folder, description, number)
            block = _Block(description)

        for batch in batches:
            numbers = batch.samples // description.rows_per_part
            for number in np.unique(numbers).tolist():
                while waiting[0] < number:
                    finish(waiting.pop(0))
                block.add(batch, numbers == number)
        for number in waiting:
            finish(number)
        if pending is not None:
            pending.result()


class _Block:
    """The rows of one part, as far as they have come, as they are kept."""

    def __init__(self, description: Description) -> None:
        self.identity = description.identity
        self.batches: list[Batch] = []

    def add(self, batch: Batch, which: np.ndarray) -> None:
        """Those images of a batch that belong here."""
        rows = kept(batch.rows[which], np.dtype(self.identity["features"]), "features")
        tokens, grids = None, None if batch.grids is None else batch.grids[which]
        if batch.tokens is not None:
            own = which if batch.grids is None else np.repeat(which, batch.grids.prod(axis=1))
            tokens = kept(batch.tokens[own], np.dtype(self.identity["tokens"]), "patch tokens")
        self.batches.append(Batch(rows, tokens, batch.labels[which], batch.samples[which], batch.digests[which], grids))

    def joined(self, layout_dim: int) -> Batch:
        """All of them, of none if there are none."""
        if not self.batches:
            none = np.empty(0, dtype=np.int64)
            tokens = grids = None
            if self.identity["tokens"] is not None:
                (high, wide), dim = self.identity["layout"]["grid"], self.identity["layout"]["token_dim"]
                native = self.identity["crops"].get("native")
                tokens = np.empty((0, dim) if native else (0, high * wide, dim), self.identity["tokens"])
                grids = np.empty((0, 2), np.int64) if native else None
            return Batch(np.empty((0, layout_dim), self.identity["features"]), tokens, none, none, none, grids)
        rows, tokens, labels, samples, digests, grids = zip(*self.batches, strict=True)
        joined, shapes = (None if part[0] is None else np.concatenate(part) for part in (tokens, grids))
        whole = (np.concatenate(part) for part in (labels, samples, digests))
        return Batch(np.concatenate(rows), joined, *whole)._replace(grids=shapes)


def _write_part(block: _Block, dataset: Dataset, folder: Path, description: Description, number: int) -> None:
    layout = description.layout
    batch = block.joined(layout.dim)
    samples = batch.samples.tolist()
    keys = [dataset.key(sample)[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace") for sample in samples]
    metadata = [_metadata(dataset, sample) for sample in samples]
    grids = None if batch.tokens is None else batch.grids
    part = Part(batch.rows, batch.tokens, batch.labels, batch.samples, batch.digests, keys, metadata, grids)
    path = description.path(folder, number)
    try:
        write_part(path, part, layout, description.digest)
    except FileNotFoundError:  # another process has made all parts meanwhile, and taken ours for litter
        if part_rows(path, description.digest) is None:
            raise


def _metadata(dataset: Dataset, sample: int) -> str | None:
    """The `.json` of a sample as one line; None where there is none, or one that is no JSON object."""
    if not dataset.index.has_json or not dataset.index.json_sizes[sample]:
        return None
    try:
        return json.dumps(dataset.read_metadata(sample))
    except ValueError as error:
        _log.warning("%s; it is left out", error)
        return None
