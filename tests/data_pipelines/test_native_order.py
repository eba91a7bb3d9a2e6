"""The order contract with crops of their own shape: sizes, crops, and what is drawn of patches, whoever makes them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from drawing import draw_patches
from making import encode, picture, write_tar

from data_pipelines.balance import BalancedRows, patches_of
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.loader import Batch, Loader
from data_pipelines.packed_batch import rows_and_columns
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, LocalCrops, Views

NATIVE = {"shape": "native", "patch": 4}
VIEWS = Views(
    global_crops=(Crop(**NATIVE, max_tokens=24, scale=(0.4, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), blur=0.5),) * 2,
    local_crops=LocalCrops(**NATIVE, max_tokens=8, count=2, scale=(0.05, 0.4)),
)
STEPS, BATCH = 9, 12


@dataclass(frozen=True)
class Part:
    stop: int
    ranks: int = 1
    threads: int = 1
    accum: int = 1
    workers: int = 0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    folder = tmp_path_factory.mktemp("shapes")
    for shard in range(3):
        names = range(16 * shard, 16 * shard + 16)
        shapes = [(12 + 7 * (n % 5), 12 + 11 * (n % 7)) for n in names]
        files = [(f"{n:06d}.png", encode(picture(n, *shape))) for n, shape in zip(names, shapes, strict=True)]
        write_tar(folder / f"train-{shard:06d}.tar", files)
    with open_dataset(folder) as opened:
        yield opened


def steps(dataset: Dataset, part: Part, start: int = 0, repeats: int = 1) -> Iterator[list[list[Batch]]]:
    """Micro-batches of each rank, step by step."""
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(
                Loader(
                    Sampler((dataset,), seed=7, batch_size=BATCH, window=16, repeats=repeats), VIEWS, rank=rank,
                    world_size=part.ranks, grad_accum_steps=part.accum, workers=part.workers, threads=part.threads,
                    draw=draw_patches,
                )
            )
            for rank in range(part.ranks)
        ]  # fmt: skip
        made = zip(*(loader.steps(start) for loader in loaders), strict=True)
        yield from (list(ranks) for ranks in itertools.islice(made, part.stop - start))


def images(batch: Batch, kind: str) -> list[list[bytes]]:
    """Of each row the pixels, shape and drawn numbers of each of its views."""
    lengths = batch[f"{kind}_lengths"].tolist()
    rows = len(batch["rows"])
    parts = [batch[f"{kind}_patches"], batch[f"{kind}_positions"], *([batch["drawn"]] if kind == "global" else [])]
    cut = [part.split(lengths) for part in parts]
    told = [b"".join(part[number].numpy().tobytes() for part in cut) for number in range(len(lengths))]
    return [told[row::rows] for row in range(rows)]


def digest(ranks: list[list[Batch]]) -> str:
    hashed = hashlib.sha256()
    for batch in itertools.chain(*ranks):
        for row, shown in enumerate(zip(images(batch, "global"), images(batch, "local"), strict=True)):
            hashed.update(batch["ids"][row].numpy().tobytes() + batch["rows"][row].numpy().tobytes())
            hashed.update(b"".join(itertools.chain(*shown)))
    return hashed.hexdigest()


@pytest.fixture(scope="module")
def reference(dataset: Dataset) -> list[str]:
    return [digest(ranks) for ranks in steps(dataset, Part(STEPS))]


@pytest.mark.parametrize(
    "parts",
    [
        [Part(STEPS, ranks=2, threads=3, accum=3)],
        [Part(STEPS, ranks=3, accum=4)],
        [Part(STEPS, workers=2, threads=2)],
        [Part(3, ranks=2, workers=1), Part(5, ranks=4, threads=2), Part(STEPS, ranks=6)],
    ],
    ids=["2 ranks", "3 ranks", "2 processes", "resumed"],
)
def test_the_same_crops_whoever_makes_them(dataset: Dataset, reference: list[str], parts: list[Part]) -> None:
    found: list[str] = []
    for part in parts:
        found += [digest(ranks) for ranks in steps(dataset, part, len(found))]
    assert found == reference


def test_batches_hold_what_they_say(dataset: Dataset) -> None:
    sampler = Sampler((dataset,), seed=7, batch_size=BATCH, window=16)
    for step, ((batch,),) in enumerate(steps(dataset, Part(2))):
        rows = BalancedRows(sampler, VIEWS).rows(step, range(BATCH))
        assert [row.sample for row in rows] == batch["ids"][:, 1].tolist()
        total = 0
        for kind, views, most in (("global", 2, 24), ("local", 2, 8)):
            lengths, positions = batch[f"{kind}_lengths"], batch[f"{kind}_positions"]
            assert len(lengths) == views * BATCH
            assert len(batch[f"{kind}_patches"]) == len(positions) == int(lengths.sum())
            assert batch[f"{kind}_patches"].shape[1] == 4 * 4 * 3
            assert int(lengths.max()) <= most
            ends = lengths.cumsum(0) - 1
            grids = positions[ends] + 1
            assert torch.equal(grids.prod(dim=1), lengths)
            assert np.array_equal(rows_and_columns(grids.numpy()), positions.numpy())
            total += int(lengths.sum())
        assert batch["drawn"].shape == (int(batch["global_lengths"].sum()),)
        allowed = int(patches_of(VIEWS, 7, rows).sum())
        assert 0.75 * allowed < total <= allowed


def test_parts_of_a_batch_have_like_work(dataset: Dataset) -> None:
    for ranks in itertools.islice(steps(dataset, Part(3, ranks=2)), 3):
        patches = [len(batch["global_patches"]) + len(batch["local_patches"]) for (batch,) in ranks]
        assert max(patches) < 1.15 * np.mean(patches)


def test_repeats_stay_together_and_differ(dataset: Dataset) -> None:
    (((batch,),),) = steps(dataset, Part(1), repeats=2)
    ids = batch["ids"][:, 1].tolist()
    assert ids[::2] == ids[1::2]
    shown = images(batch, "global")
    assert all(one != other for one, other in zip(shown[::2], shown[1::2], strict=True))


def test_what_needs_one_size_is_refused(dataset: Dataset) -> None:
    sampler = Sampler((dataset,), seed=7, batch_size=BATCH, window=16)
    for settings, message in (({"masks": True}, "holds masks"), ({"backend": "device"}, "colours to the device")):
        with pytest.raises(ValueError, match=message):
            Loader(sampler, VIEWS, **settings)
