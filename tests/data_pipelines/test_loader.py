"""The loader: the same batches however many ranks, threads and restarts made them."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import encode, picture, sample_files, write_tar

from data_pipelines.buffers import map_batch
from data_pipelines.datasets.bad_samples import Decoder, TooManyBadSamplesError
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.loader import Batch, Loader
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends import native
from data_pipelines.transforms.backends.device import finish
from data_pipelines.transforms.config import BackendName, Crop, LocalCrops, TargetCrop, TeacherCrops, Views

COLOUR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
DINO = Views(
    global_crops=(Crop(size=16, blur=1.0, **COLOUR), Crop(size=16, blur=0.1, solarise=0.2, **COLOUR)),
    local_crops=LocalCrops(size=8, count=3, scale=(0.05, 0.4), blur=0.5, **COLOUR),
    target_crop=TargetCrop(size=8),
)
FLIP = Views(global_crops=(Crop(size=16),))
STEPS, BATCH = 200, 12


def draw(*place: int) -> dict[str, np.ndarray]:
    return {"drop_mask": np.random.default_rng(place).random((4, 4)) < 0.5}


def digest(parts: list[Batch]) -> str:
    """A hash of what the model sees of a step; `parts` are its micro-batches in the order of rows."""
    hashed = hashlib.sha256()
    names = ("rows", "ids", "labels", "global_crops", "local_crops", "target_crops", "drop_mask")
    for name in (*names, *(name for name in ("global_colours", "local_colours") if name in parts[0])):
        hashed.update(torch.cat([part[name] for part in parts]).numpy().tobytes())
    return hashed.hexdigest()


def digests(
    dataset: Dataset,
    *,
    ranks: int = 1,
    threads: int = 1,
    grad_accum_steps: int = 1,
    start: int = 0,
    stop: int = STEPS,
    repeats: int = 1,
    **options: Any,
) -> list[str]:
    loaders = [
        Loader(
            Sampler((dataset,), seed=7, batch_size=BATCH, repeats=repeats),
            DINO,
            rank=rank,
            world_size=ranks,
            grad_accum_steps=grad_accum_steps,
            threads=threads,
            draw=draw,
            **options,
        )
        for rank in range(ranks)
    ]
    steps = zip(*(loader.steps(start) for loader in loaders), strict=True)
    found = [digest(list(itertools.chain(*parts))) for parts in itertools.islice(steps, stop - start)]
    for loader in loaders:
        loader.close()
    return found


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """24 JPEGs large enough to be decoded in part and at half the size."""
    folder = tmp_path_factory.mktemp("photos")
    kinds = ({}, {"subsampling": "4:4:4"}, {"progressive": True})
    files = [
        (f"{number:06d}.jpg", encode(picture(number, 90 + number, 130 - number), "JPEG", **kinds[number % 3]))
        for number in range(24)
    ]
    write_tar(folder / "train-000000.tar", files)
    with open_dataset(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(shards: Path) -> list[str]:
    with open_dataset(shards) as dataset:
        return digests(dataset)


@pytest.mark.parametrize(("ranks", "threads", "grad_accum_steps"), [(2, 3, 1), (4, 2, 1), (1, 2, 3), (2, 1, 2)])
def test_batches_do_not_depend_on_who_makes_them(
    dataset: Dataset, reference: list[str], ranks: int, threads: int, grad_accum_steps: int
) -> None:
    stop = STEPS if ranks < 4 else 100
    assert (
        digests(dataset, ranks=ranks, threads=threads, grad_accum_steps=grad_accum_steps, stop=stop) == reference[:stop]
    )


def test_resumed_on_other_ranks_the_batches_go_on(dataset: Dataset, reference: list[str]) -> None:
    before = digests(dataset, ranks=2, threads=2, stop=77)
    assert before + digests(dataset, start=77) == reference


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "opencv"},
        {"backend": "device"},
        {"repeats": 3},
        {"repeats": 2, "backend": "device", "partial_decode": False},
        {"dct_scaling": False},
    ],
)
def test_every_way_of_making_them_gives_each_rank_its_own(photos: Dataset, options: dict[str, Any]) -> None:
    expected = digests(photos, stop=9, **options)
    assert digests(photos, ranks=2, threads=3, stop=5, **options) == expected[:5]
    assert digests(photos, ranks=4, threads=5, start=3, stop=9, **options) == expected[3:]
    assert digests(photos, threads=2, grad_accum_steps=3, start=5, stop=9, **options) == expected[5:]


@pytest.mark.parametrize("backend", ["auto", "opencv", "device"])
def test_a_part_decoded_gives_the_crops_of_the_whole(photos: Dataset, backend: BackendName) -> None:
    for dct_scaling in (True, False):
        options: dict[str, Any] = {"backend": backend, "dct_scaling": dct_scaling, "stop": 8}
        assert digests(photos, **options) == digests(photos, **options, partial_decode=False)


def test_scaled_decoding_shows_the_same_picture(photos: Dataset) -> None:
    views = Views(global_crops=(Crop(size=16, scale=(0.6, 1.0)),))
    batches = []
    for dct_scaling in (True, False):
        sampler = Sampler((photos,), seed=3, batch_size=24)
        with Loader(sampler, views, dct_scaling=dct_scaling) as loader:
            batches.append(next(loader.steps())[0]["global_crops"].clone().double())
    scaled, full = batches
    errors = (scaled - full).square().flatten(1).mean(dim=1)
    assert (errors > 0).all()  # scaled they were
    assert (10 * torch.log10(255**2 / errors)).min() > 38


def test_repeated_rows_show_one_sample_differently(photos: Dataset) -> None:
    once = Sampler((photos,), seed=7, batch_size=4)
    thrice = Sampler((photos,), seed=7, batch_size=12, repeats=3)
    assert thrice.steps_per_epoch == 24 / 12  # rows as many as samples
    full: dict[str, Any] = {"dct_scaling": False}  # how small an image is decoded depends on all of its rows
    with (
        Loader(once, DINO, **full) as loader,
        Loader(thrice, DINO, rank=1, world_size=2, **full) as part,
        Loader(thrice, DINO, **full) as whole,
    ):
        (alone,), (half,), (batch,) = (next(steps) for steps in (loader.steps(), part.steps(), whole.steps()))
    ids = alone["ids"][:, 1].repeat_interleave(3)
    assert batch["ids"][:, 1].tolist() == ids.tolist()
    assert torch.equal(batch["global_crops"][::3], alone["global_crops"])  # the first showing draws as an only one
    assert torch.equal(batch["local_crops"][6:], half["local_crops"])
    crops = batch["global_crops"].flatten(1)
    assert len(torch.unique(crops, dim=0)) == 12
    assert [row.repeat for row in thrice.rows(0, range(2, 8))] == [2, 0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="10 rows"):
        Sampler((photos,), seed=7, batch_size=10, repeats=3)


def test_a_repeated_sample_is_decoded_once(photos: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = Decoder.read

    def counted(decoder: Decoder, sample: int, *arguments: Any) -> Any:
        reads.append(sample)
        return read(decoder, sample, *arguments)

    monkeypatch.setattr(Decoder, "read", counted)
    for threads in (1, 2):
        reads.clear()
        with Loader(Sampler((photos,), seed=0, batch_size=24, repeats=4), FLIP, threads=threads, prefetch=1) as loader:
            steps = loader.steps()
            next(steps)
            steps.close()
        assert len(reads) <= 2 * 6


def test_colours_left_to_the_device_come_out_alike(photos: Dataset) -> None:
    views = Views(global_crops=(Crop(size=32, blur=0.5, solarise=0.3, **COLOUR),), local_crops=DINO.local_crops)
    for backend in ("opencv", "native") if native.BUILT else ("opencv",):
        batches: list[Batch] = []
        for name in (backend, "device"):
            if backend == "opencv" and native.BUILT and name == "device":
                continue  # it would cut with the native backend
            with Loader(Sampler((photos,), seed=3, batch_size=24), views, backend=name) as loader:
                (batch,) = next(loader.steps())
                batches.append(map_batch(batch, torch.clone))
        if len(batches) == 2:
            ready, drawn = batches
            assert not torch.equal(ready["global_crops"], drawn["global_crops"])
            finished = finish(drawn, drawn)
            assert "global_colours" not in finished
            for name in ("global_crops", "local_crops"):
                errors = (finished[name].double() - ready[name].double()).square().flatten(1).mean(dim=1)
                assert (10 * torch.log10(255**2 / errors.clamp(min=1e-9))).min() > 39  # dB


def test_ready_says_whether_the_next_step_is_there(dataset: Dataset) -> None:
    open_gate = threading.Event()

    def gated(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        if step == 1:
            open_gate.wait(30)
        return {"token_mask": np.zeros((2, 2), dtype=bool)}

    with Loader(Sampler((dataset,), seed=0, batch_size=10), FLIP, draw=gated) as loader:
        assert not loader.ready
        steps = loader.steps()
        next(steps)
        assert not loader.ready
        open_gate.set()
        deadline = time.monotonic() + 30
        while not loader.ready:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_an_error_in_a_thread_reaches_the_consumer(dataset: Dataset) -> None:
    def broken(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        if step == 2 and row == 5:
            raise OSError("the mask is gone")
        return {}

    before = threading.active_count()
    with Loader(Sampler((dataset,), seed=0, batch_size=10), FLIP, threads=3, draw=broken) as loader:
        steps = loader.steps()
        next(steps), next(steps)
        with pytest.raises(OSError, match="the mask is gone"):
            next(steps)
        with pytest.raises(StopIteration):
            next(steps)
    assert threading.active_count() == before


def test_threads_make_no_more_than_there_are_buffers_for(dataset: Dataset) -> None:
    made: set[int] = set()

    def count(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        made.add(step)
        return {}

    with Loader(Sampler((dataset,), seed=0, batch_size=10), FLIP, threads=2, prefetch=2, draw=count) as loader:
        steps = loader.steps()
        next(steps)
        time.sleep(0.3)
        assert max(made) <= 2
        steps.close()


def test_shapes_types_and_values(dataset: Dataset) -> None:
    sampler = Sampler((dataset,), seed=0, batch_size=8)
    with Loader(sampler, DINO, world_size=2, rank=1, grad_accum_steps=2, draw=draw) as loader:
        first, second = next(loader.steps())
    assert first["global_crops"].shape == (2, 2, 3, 16, 16)
    assert first["local_crops"].shape == (2, 3, 3, 8, 8)
    assert first["target_crops"].shape == (2, 3, 8, 8)
    assert first["global_crops"].dtype == first["local_crops"].dtype == torch.uint8
    assert first["drop_mask"].shape == (2, 4, 4)
    assert first["drop_mask"].dtype == torch.bool
    assert "token_mask" not in first
    assert first["rows"].tolist() + second["rows"].tolist() == [4, 5, 6, 7]
    assert first["labels"].tolist() == [sample % 10 for _, sample in first["ids"].tolist()]
    assert sampler.steps_per_epoch == 50 // 8


@pytest.mark.parametrize("backend", ["native", "opencv", "device"])
def test_a_teacher_sees_the_same_region_with_colours_or_without(backend: BackendName, dataset: Dataset) -> None:
    if backend == "native" and not native.BUILT:
        pytest.skip("the kernel is not built")
    seen = {}
    plain = tuple(Crop(size=16, scale=crop.scale) for crop in DINO.global_crops)
    for name, crops, teacher in (
        ("coloured", DINO.global_crops, TeacherCrops(size=16, colours=True)),
        ("large", DINO.global_crops, TeacherCrops(size=32)),
        ("plain", plain, TeacherCrops(size=16)),
    ):
        with Loader(
            Sampler((dataset,), seed=0, batch_size=8), Views(global_crops=crops, teacher_crops=teacher), backend=backend
        ) as loader:
            (batch,) = next(loader.steps())
            seen[name] = finish(batch, batch) if backend == "device" else batch
            seen[name] = {key: value.clone() for key, value in seen[name].items()}
    for name in ("coloured", "plain"):
        assert torch.equal(seen[name]["teacher_crops"], seen[name]["global_crops"])
    assert not torch.equal(seen["coloured"]["global_crops"], seen["plain"]["global_crops"])
    large = seen["large"]["teacher_crops"].float().unflatten(-1, (16, 2)).unflatten(-3, (16, 2)).mean(dim=(-1, -3))
    assert (large - seen["plain"]["global_crops"]).abs().mean() < 12 < (large - large.roll(1, dims=0)).abs().mean()


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
    with Loader(Sampler((dataset,), seed=0, batch_size=50), FLIP, draw=draw) as loader:
        passes = [
            (batch["ids"][:, 1].clone(), batch["global_crops"].clone(), batch["drop_mask"].clone())
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
        Loader(Sampler((dataset,), seed=0, batch_size=8), FLIP, world_size=2, grad_accum_steps=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Loader(Sampler((dataset,), seed=0, batch_size=8), FLIP, world_size=2, rank=2)


def test_no_label_is_minus_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [(f"{i}.png", encode(picture(i))) for i in range(4)])
    with open_dataset(tmp_path) as dataset, Loader(Sampler((dataset,), seed=0, batch_size=4), FLIP) as loader:
        assert next(loader.steps())[0]["labels"].tolist() == [-1] * 4


@pytest.mark.parametrize("prefetch", [1, 3])
def test_the_kernel_is_told_of_the_steps_to_come(
    dataset: Dataset, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images of the steps begun, so that a slow disk is asked for them at once, whatever threads there are."""
    told: list[tuple[str, int, int]] = []

    def advise(descriptor: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        told.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), offset, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    sampler = Sampler((dataset,), seed=0, batch_size=10)
    expected = []
    for step in range(prefetch + 1):
        places = []
        for row in sampler.rows(step, range(10)):
            shard = int(dataset.shards_of([row.sample])[0])
            first = sum(dataset.shard_sizes[:shard])
            entry = dataset.index.entry(shard, row.sample - first)
            places.append((os.path.realpath(str(dataset.shards[shard])), entry.image_offset, entry.image_size))
        expected += sorted(places)
    with Loader(sampler, FLIP, prefetch=prefetch) as loader:
        steps = loader.steps()
        next(steps)
        deadline = time.monotonic() + 30
        while len(told) < len(expected) and time.monotonic() < deadline:
            time.sleep(0.005)
        steps.close()
    assert told == expected
