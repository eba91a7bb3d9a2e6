"""The loader: the same batches however many ranks, threads and restarts made them."""

from __future__ import annotations

import hashlib
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from making import encode, picture, sample_files, write_tar

from data_pipelines.bad_samples import TooManyBadSamplesError
from data_pipelines.index import Dataset, open_dataset
from data_pipelines.loader import Batch, Loader
from data_pipelines.sampler import Sampler
from data_pipelines.views import Crop, LocalCrops, TargetCrop, Views

COLOUR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grey": 0.2}
DINO = Views(
    global_crops=(Crop(size=16, blur=1.0, **COLOUR), Crop(size=16, blur=0.1, solarise=0.2, **COLOUR)),
    local_crops=LocalCrops(size=8, count=3, scale=(0.05, 0.4), blur=0.5, **COLOUR),
    target_crop=TargetCrop(size=8),
)
FLIP = Views(global_crops=(Crop(size=16),))
STEPS, BATCH = 200, 12


def draw_mask(rng: np.random.Generator, step: int, row: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    return rng.random((4, 4)) < 0.5, None


def digest(parts: list[Batch]) -> str:
    """A hash of what the model sees of a step; `parts` are its micro-batches in the order of rows."""
    hashed = hashlib.sha256()
    for name in ("rows", "ids", "labels", "global_crops", "local_crops", "target_crops", "dropped"):
        hashed.update(torch.cat([part[name] for part in parts]).numpy().tobytes())
    return hashed.hexdigest()


def digests(
    dataset: Dataset, *, ranks: int = 1, threads: int = 1, accumulation: int = 1, start: int = 0, stop: int = STEPS
) -> list[str]:
    loaders = [
        Loader(
            Sampler((dataset,), seed=7, batch_size=BATCH),
            DINO,
            rank=rank,
            world_size=ranks,
            accumulation=accumulation,
            threads=threads,
            draw_mask=draw_mask,
        )
        for rank in range(ranks)
    ]
    steps = zip(*(loader.steps(start) for loader in loaders), strict=True)
    found = [digest(list(itertools.chain(*parts))) for parts in itertools.islice(steps, stop - start)]
    for loader in loaders:
        loader.close()
    return found


@pytest.fixture(scope="module")
def reference(shards: Path) -> list[str]:
    with open_dataset(shards) as dataset:
        return digests(dataset)


@pytest.mark.parametrize(("ranks", "threads", "accumulation"), [(2, 3, 1), (4, 2, 1), (1, 2, 3), (2, 1, 2)])
def test_batches_do_not_depend_on_who_makes_them(
    dataset: Dataset, reference: list[str], ranks: int, threads: int, accumulation: int
) -> None:
    stop = STEPS if ranks < 4 else 100
    assert digests(dataset, ranks=ranks, threads=threads, accumulation=accumulation, stop=stop) == reference[:stop]


def test_resumed_on_other_ranks_the_batches_go_on(dataset: Dataset, reference: list[str]) -> None:
    before = digests(dataset, ranks=2, threads=2, stop=77)
    assert before + digests(dataset, start=77) == reference


def test_shapes_types_and_values(dataset: Dataset) -> None:
    sampler = Sampler((dataset,), seed=0, batch_size=8)
    with Loader(sampler, DINO, world_size=2, rank=1, accumulation=2, draw_mask=draw_mask) as loader:
        first, second = next(loader.steps())
    assert first["global_crops"].shape == (2, 2, 3, 16, 16)
    assert first["local_crops"].shape == (2, 3, 3, 8, 8)
    assert first["target_crops"].shape == (2, 3, 8, 8)
    assert first["global_crops"].dtype == first["local_crops"].dtype == torch.uint8
    assert first["dropped"].shape == (2, 4, 4)
    assert first["dropped"].dtype == torch.bool
    assert first["replaced"] is None
    assert first["rows"].tolist() + second["rows"].tolist() == [4, 5, 6, 7]
    assert first["labels"].tolist() == [sample % 10 for _, sample in first["ids"].tolist()]
    assert sampler.steps_per_epoch == 50 // 8


def test_an_item_holds_until_the_next_and_buffers_are_reused(dataset: Dataset) -> None:
    with Loader(Sampler((dataset,), seed=0, batch_size=10), FLIP, threads=2, prefetch=2) as loader:
        places, items = set(), loader.steps()
        for _ in range(12):
            (batch,) = next(items)
            before = batch["global_crops"].clone()
            threading.Event().wait(0.01)  # the threads are at work on later steps meanwhile
            assert torch.equal(before, batch["global_crops"])
            places.add(batch["global_crops"].data_ptr())
        items.close()
    assert len(places) == 3


def test_crops_differ_between_passes_and_masks_between_rows(dataset: Dataset) -> None:
    with Loader(Sampler((dataset,), seed=0, batch_size=50), FLIP, draw_mask=draw_mask) as loader:
        passes = [
            (batch["ids"][:, 1].clone(), batch["global_crops"].clone(), batch["dropped"].clone())
            for (batch,) in itertools.islice(loader.steps(), 2)
        ]
    (ids, crops, masks), (next_ids, next_crops, next_masks) = passes
    same = (crops[ids.argsort()] == next_crops[next_ids.argsort()]).flatten(1).all(1)
    assert same.sum() <= 2  # a crop of nearly the whole may come twice
    assert len(torch.unique(torch.cat([masks, next_masks]).flatten(1), dim=0)) > 95


def test_no_thread_is_left(dataset: Dataset) -> None:
    before = threading.active_count()
    loader = Loader(Sampler((dataset,), seed=0, batch_size=10), FLIP, threads=3)
    items = loader.steps()
    next(items)
    items.close()
    loader.close()
    assert threading.active_count() == before


def test_the_wait_is_counted(dataset: Dataset) -> None:
    with Loader(Sampler((dataset,), seed=0, batch_size=10), FLIP) as loader:
        list(itertools.islice(loader.steps(), 3))
        assert 0 < loader.wait_seconds < 10


def with_bad(folder: Path, bad: set[int], count: int = 40) -> Path:
    files = sample_files(range(count))
    write_tar(
        folder / "train-000000.tar", [(n, c[:60] if n.endswith("png") and int(n[:6]) in bad else c) for n, c in files]
    )
    return folder


@pytest.mark.parametrize("threads", [1, 3])
def test_a_bad_sample_shows_its_neighbour(tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture) -> None:
    with open_dataset(with_bad(tmp_path, {7, 8, 39})) as dataset:
        loader = Loader(Sampler((dataset,), seed=0, batch_size=40), FLIP, threads=threads, max_bad_share=0.5)
        with loader:
            for (batch,) in itertools.islice(loader.steps(), 3):
                counts = np.bincount(batch["ids"][:, 1], minlength=40)
                assert counts[[7, 8, 39]].tolist() == [0, 0, 0]
                assert counts[[9, 0]].tolist() == [3, 2]
                assert batch["labels"].tolist() == [sample % 10 for _, sample in batch["ids"].tolist()]
        assert loader.num_bad >= 12  # 4 reads a pass: 7, 8, 8 again, 39
    assert sum("000007" in record.message for record in caplog.records) == 1


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    with (
        open_dataset(with_bad(tmp_path, {1, 5, 9, 13})) as dataset,
        Loader(Sampler((dataset,), seed=0, batch_size=40), FLIP, max_bad_share=0.05) as loader,
        pytest.raises(TooManyBadSamplesError, match=r"(?s)share of 0.05.*0000.*selfsight verify"),
    ):
        next(loader.steps())


def test_greyscale(dataset: Dataset) -> None:
    with Loader(Sampler((dataset,), seed=0, batch_size=8), FLIP, channels=1) as loader:
        assert next(loader.steps())[0]["global_crops"].shape == (8, 1, 1, 16, 16)
    with Loader(Sampler((dataset,), seed=0, batch_size=8), DINO, channels=1) as loader:  # grey has no saturation
        assert next(loader.steps())[0]["local_crops"].shape == (8, 3, 1, 8, 8)


def test_refusals_say_what_to_do(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="multiple of 6"):
        Loader(Sampler((dataset,), seed=0, batch_size=8), FLIP, world_size=2, accumulation=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Loader(Sampler((dataset,), seed=0, batch_size=8), FLIP, world_size=2, rank=2)


def test_no_label_is_minus_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [(f"{i}.png", encode(picture(i))) for i in range(4)])
    with open_dataset(tmp_path) as dataset, Loader(Sampler((dataset,), seed=0, batch_size=4), FLIP) as loader:
        assert next(loader.steps())[0]["labels"].tolist() == [-1] * 4
