"""The order contract: what the model sees of 200 steps depends on seed, data, weights, batch size and step alone.

Ids, labels, crops and masks are hashed step by step and compared with one rank of one thread. A new way to get at the
same samples (another kind of source, another backend of equal bytes) is one more entry of `CASES` or `sources`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from drawing import draw
from making import sample_files, write_tar
from serving import serve

from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.loader import Batch, Loader
from data_pipelines.remote.cache import Cache
from data_pipelines.remote.fetch import Patience
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, LocalCrops, TargetCrop, TeacherCrops, Views

COLOUR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
VIEWS = Views(
    global_crops=(Crop(size=16, blur=1.0, **COLOUR), Crop(size=16, blur=0.1, solarise=0.2, **COLOUR)),
    local_crops=LocalCrops(size=8, count=2, scale=(0.05, 0.4), blur=0.5, **COLOUR),
    target_crop=TargetCrop(size=8),
    teacher_crops=TeacherCrops(size=24, colours=True),
)
STEPS, BATCH, WEIGHTS = 200, 12, (2, 1)
CROPS = ("global_crops", "local_crops", "target_crops", "teacher_crops")
HASHED = ("rows", "ids", "labels", *CROPS, "drop_mask", "token_mask")


@dataclass(frozen=True)
class Part:
    """Some of the 200 steps, and who makes them."""

    stop: int
    ranks: int = 1
    threads: int = 1
    grad_accum_steps: int = 1
    prefetch: int = 2
    workers: int = 0


CASES = {
    "2 ranks, 3 threads": [Part(STEPS, ranks=2, threads=3)],
    "4 ranks, 2 threads": [Part(STEPS, ranks=4, threads=2, prefetch=1)],
    "5 threads, 3 micro-batches": [Part(STEPS, threads=5, grad_accum_steps=3, prefetch=4)],
    "3 ranks, 4 threads, 2 micro-batches": [Part(STEPS, ranks=3, threads=4, grad_accum_steps=2)],
    "1 process": [Part(STEPS, workers=1)],
    "2 processes": [Part(STEPS, workers=2, threads=2, prefetch=4)],
    "3 processes, 2 ranks, 3 micro-batches": [Part(STEPS, ranks=2, grad_accum_steps=3, workers=3)],
    "resumed by processes": [Part(77, workers=2), Part(131, ranks=2, workers=1), Part(STEPS, threads=2)],
    "resumed": [Part(77, ranks=2, threads=2), Part(113, ranks=4), Part(131, ranks=3), Part(STEPS, threads=2)],
}


def write_two_sets(folder: Path) -> list[Path]:
    """50 and 31 samples in ragged shards; one in the middle of each set is cut short."""
    sets = {"one": (range(20), range(20, 23), range(23, 50)), "two": (range(100, 119), range(119, 131))}
    for name, shards in sets.items():
        (folder / name).mkdir()
        for number, samples in enumerate(shards):
            files = [
                (key, content[:60] if key in ("000021.png", "000113.png") else content)
                for key, content in sample_files(samples)
            ]
            write_tar(folder / name / f"train-{number:06d}.tar", files)
    return [folder / name for name in sets]


def digests(opened: Sequence[Dataset], parts: Sequence[Part]) -> list[str]:
    """A hash of each step, made by one part of the run after the other; each starts anew, as after a kill."""
    found: list[str] = []
    for part in parts:
        found += _digests(opened, part, len(found))
    return found


def _digests(opened: Sequence[Dataset], part: Part, start: int) -> Iterator[str]:
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(
                Loader(
                    Sampler(opened, seed=7, batch_size=BATCH, weights=WEIGHTS, window=16),
                    VIEWS,
                    rank=rank,
                    world_size=part.ranks,
                    grad_accum_steps=part.grad_accum_steps,
                    workers=part.workers,
                    threads=part.threads,
                    prefetch=part.prefetch,
                    draw=draw,
                    max_bad_share=0.5,
                )
            )
            for rank in range(part.ranks)
        ]
        steps = zip(*(loader.steps(start) for loader in loaders), strict=True)
        for micro_batches in itertools.islice(steps, part.stop - start):
            yield _digest(list(itertools.chain(*micro_batches)))


def _digest(parts: list[Batch]) -> str:
    hashed = hashlib.sha256()
    for name in HASHED:
        hashed.update(torch.cat([part[name] for part in parts]).numpy().tobytes())
    return hashed.hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_two_sets(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="module")
def reference(folders: list[Path]) -> list[str]:
    with ExitStack() as stack:
        return digests([stack.enter_context(open_dataset(folder)) for folder in folders], [Part(STEPS)])


def local(folder: Path, stack: ExitStack) -> Dataset:
    return stack.enter_context(open_dataset(folder))


def moved(folder: Path, stack: ExitStack) -> Dataset:
    """The same shards under other paths, by a list of names."""
    return stack.enter_context(open_dataset(f"{folder.parent}/../{folder.parent.name}/{folder.name}/train-*.tar"))


def staged(folder: Path, stack: ExitStack) -> Dataset:
    """Copied to this machine's disk as they are read."""
    return stack.enter_context(open_dataset(folder, stage=True))


def remote(folder: Path, stack: ExitStack) -> Dataset:
    """At a server that drops, truncates, stalls and returns 500; there is no index."""
    server = stack.enter_context(serve(folder.parent))
    server.every = ["500", "drop", "stall", "long"]
    names = ",".join(path.name for path in sorted(folder.glob("*.tar")))
    patience = Patience(tries=5, timeout_seconds=0.5, backoff_seconds=0.001)
    cache = Cache(patience=patience)
    return stack.enter_context(open_dataset(f"{server.url}/{folder.name}/{{{names}}}", cache=cache))


SOURCES: dict[str, Callable[[Path, ExitStack], Dataset]] = {
    "local": local,
    "moved": moved,
    "staged": staged,
    "remote": remote,
}


@pytest.mark.parametrize("case", CASES)
def test_who_makes_the_batches_changes_nothing(folders: list[Path], reference: list[str], case: str) -> None:
    with ExitStack() as stack:
        assert digests([local(folder, stack) for folder in folders], CASES[case]) == reference


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "local"])
def test_where_the_shards_lie_changes_nothing(folders: list[Path], reference: list[str], source: str) -> None:
    with ExitStack() as stack:
        opened = [SOURCES[source](folder, stack) for folder in folders]
        parts = [Part(31, ranks=2, threads=3), Part(45, threads=2), Part(60, threads=2, workers=2)]
        assert digests(opened, parts) == reference[:60]


def test_every_step_is_another(reference: list[str]) -> None:
    assert len(set(reference)) == STEPS


def test_the_bad_samples_were_met_and_replaced(folders: list[Path]) -> None:
    with ExitStack() as stack:
        opened = [local(folder, stack) for folder in folders]
        sampler = Sampler(opened, seed=7, batch_size=BATCH, weights=WEIGHTS, window=16)
        asked = {row[:2] for step in range(STEPS) for row in sampler.rows(step, range(BATCH))}
        loader = stack.enter_context(Loader(sampler, VIEWS, threads=2, max_bad_share=0.5))
        shown = {tuple(ids) for (batch,) in itertools.islice(loader.steps(), 30) for ids in batch["ids"].tolist()}
        assert loader.num_bad > 0
    assert {(0, 21), (1, 13)} <= asked
    assert not {(0, 21), (1, 13)} & shown
