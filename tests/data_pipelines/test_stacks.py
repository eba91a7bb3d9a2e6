"""Stacks: frames found in shards, decoded, drawn and cut alike, whoever makes the batches."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import bands, encode, npy, picture, tiff, write_tar

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.bad_samples import Decoder, TooManyBadSamplesError
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.eval_loader import center_crops, cropped
from data_pipelines.images.decode import BadSampleError, decode
from data_pipelines.images.sample import Sample
from data_pipelines.images.stacks import decode_stack
from data_pipelines.loader import Batch, Loader
from data_pipelines.rng import Stream
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.backends.base import CropJob
from data_pipelines.transforms.backends.select import backend
from data_pipelines.transforms.config import Crop, LocalCrops, Views
from data_pipelines.transforms.frames import Frames
from data_pipelines.transforms.params import draw

COLOUR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 1.0, "grayscale": 0.2, "blur": 0.5, "solarise": 0.2}
VIEWS = Views(
    global_crops=(Crop(size=16, **COLOUR), Crop(size=16, **COLOUR)),
    local_crops=LocalCrops(size=8, count=1, scale=(0.05, 0.4), **COLOUR),
)


def frame(stack: int, number: int, height: int = 30, width: int = 40) -> np.ndarray:
    """(h, w, 3) uint8: the frames of a stack differ."""
    return picture(100 * stack + number, height, width)


def members(stack: int, length: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    """Of one stack, in the order in which tar and shells put them: 10 before 2."""
    options = {"format": "JPEG", "quality": 95} if suffix == "jpg" else {}
    names = sorted(f"{stack:03d}.{number}.{suffix}" for number in range(length))
    files = [(name, encode(frame(stack, int(name.split(".")[1])), **options)) for name in names]
    return [*files, (f"{stack:03d}.cls", str(stack % 3).encode())]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Fourteen stacks of 4 to 12 frames."""
    for shard, numbers in enumerate((range(8), range(8, 14))):
        files = list(itertools.chain(*(members(n, 4 + n % 9, "jpg" if n % 2 else "png") for n in numbers)))
        write_tar(tmp_path / f"train-{shard:06d}.tar", files)
    return tmp_path


def test_numbered_members_are_the_frames_of_one_sample(clips: Path) -> None:
    with open_dataset(clips) as dataset:
        assert dataset.num_samples == 14
        assert dataset.index.problems == ()
        assert dataset.labels.tolist() == [n % 3 for n in range(14)]
        for number in range(14):
            stored = dataset.read(number)
            assert len(stored.frames) == 4 + number % 9
            assert stored.image == stored.frames[0]
            if number % 2 == 0:  # png: exact, in the order of the numbers and not of the names
                for place, found in enumerate(decode_stack(stored)):
                    assert np.array_equal(found.pixels, frame(number, place))
                assert np.array_equal(decode(stored), frame(number, 0))  # a run of single images


def test_what_is_a_stack_and_what_is_none(tmp_path: Path) -> None:
    image = encode(picture(0))
    files = [
        ("one.0.png", image), ("one.cls", b"3"),  # a single one is an image of a dotted name, as before
        ("a.jpg", image), ("a.0.png", image), ("a.1.png", image),  # beside a plain one, numbered ones count as before
        ("b.0.png", image), ("b.json", b"{}"), ("b.1.png", image),
        ("c.left.png", image), ("c.right.png", image),
        ("litter", b"x" * 2000), ("d.0.npy", npy(picture(0))), ("d.1.npy", npy(picture(1))),
        ("long" * 40 + ".0.png", image), ("long" * 40 + ".1.png", image),
    ]  # fmt: skip
    shard = write_tar(tmp_path / "train-000000.tar", files, format=1)  # GNU: long names have headers of their own
    with open_dataset(tmp_path) as dataset:
        found = {dataset.key(n)[0]: len(dataset.read(n).frames) for n in range(dataset.num_samples)}
        assert found == {"one": 0, "a": 0, "b": 2, "c": 0, "d": 2, "long" * 40: 2}
        assert dataset.read_metadata(2) == {}
        places = [dataset.index.entry(0, n) for n in range(dataset.num_samples)]
        assert all(place.image_offset + place.image_size <= shard.stat().st_size for place in places)


def test_a_tar_that_is_named_an_image_is_no_stack(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", members(7, 3)).read_bytes()
    write_tar(tmp_path / "train-000000.tar", [("000.jpg", inner), ("001.0.png", inner), ("001.1.png", inner)])
    with open_dataset(tmp_path) as dataset:
        assert dataset.read(0).frames == ()
        for number in (0, 1):
            with pytest.raises(BadSampleError, match="it is a tar"):
                decode_stack(dataset.read(number)) if number else decode(dataset.read(number))


@pytest.mark.parametrize("kind", ["npy thwc", "npy tchw", "npy thw", "tiff", "tiff rgb"])
def test_one_file_may_hold_a_stack(kind: str) -> None:
    deep = np.stack([bands(n, 3, 20, 24) for n in range(6)])
    channels, bits = 3, 16
    content = {
        "npy thwc": lambda: npy(deep),
        "npy tchw": lambda: npy(np.ascontiguousarray(deep.transpose(0, 3, 1, 2))),
        "npy thw": lambda: npy(deep[..., 0]),
        "tiff": lambda: tiff(deep[..., 0], photometric="minisblack"),
        "tiff rgb": lambda: tiff((deep >> 8).astype(np.uint8), photometric="rgb"),
    }[kind]()
    expected = deep
    if kind in ("npy thw", "tiff"):
        expected, channels = deep[..., :1], 1
    if kind == "tiff rgb":
        expected, bits = (deep >> 8).astype(np.uint8), 8
    found = decode_stack(Sample("k", Path("s"), content, None), lambda n: [1, n - 2, 1], channels, bits=bits)
    assert [np.array_equal(f.pixels, expected[n]) for f, n in zip(found, (1, 4, 1), strict=True)] == [True] * 3
    with pytest.raises(BadSampleError, match="asks for stacks of several"):
        decode_stack(Sample("k", Path("s"), encode(picture(0)), None))


def test_bad_frames_are_named(tmp_path: Path) -> None:
    small, damaged = encode(frame(0, 9, 8, 9)), encode(frame(0, 2))[:200]
    files = [*members(0, 3), *members(1, 3), *members(2, 4), ("003.png", encode(picture(0)))]
    files[1] = (files[1][0], small)
    files[6] = (files[6][0], damaged)
    write_tar(tmp_path / "train-000000.tar", files)
    with open_dataset(tmp_path) as dataset:
        with pytest.raises(BadSampleError, match="frame 1 has 9x8 px, and the stack's are 40x30"):
            decode_stack(dataset.read(0))
        with pytest.raises(BadSampleError, match=r"001 of .*frame 2 of 3: "):
            decode_stack(dataset.read(1))
        assert len(decode_stack(dataset.read(1), lambda n: [0, 1])) == 2  # what is not shown is not looked at
        found = Decoder(dataset, max_bad_share=1.0).read(0, frames=lambda n: range(n))
        assert (found.sample, 1 + len(found.further)) == (2, 4)  # the next good one, shown by its own number of frames
        with pytest.raises(TooManyBadSamplesError):
            Decoder(dataset, max_bad_share=0.0).read(0, frames=lambda n: range(n))
    report = verify(tmp_path, frames=4, progress=False)
    told = {bad["key"]: (bad["case"], bad["reason"]) for bad in report["bad"]}
    assert {key: case for key, (case, _) in told.items()} == {
        "000": "other_frames", "001": "damaged_image", "003": "other_frames"
    }  # fmt: skip
    assert told["001"][1].startswith("frame 2 of 3: ")
    assert report["samples"] == 4
    assert {bad["key"] for bad in verify(tmp_path, progress=False)["bad"]} == {"000", "001"}


class Never:
    def random(self) -> float:
        return 0.999999999


@pytest.mark.parametrize("available", [1, 2, 3, 7, 8, 9, 23, 100])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("stride", [None, 1, 2, 30])
def test_frames_are_chosen_in_order_and_within_the_stack(available: int, count: int, stride: int | None) -> None:
    frames = Frames(count, stride)
    for rng in (None, Never(), *(Stream(seed) for seed in range(8))):
        found = frames.chosen(available, rng)
        assert len(found) == count
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < available
        steps = set(np.diff(found).tolist())
        if available >= count and stride is not None and count > 1:
            assert steps == {min(stride, (available - 1) // (count - 1))}
        elif available <= count:
            assert set(found) == set(range(available)) or count < available
        if available >= count:
            assert len(set(found)) == count


def test_every_frame_is_shown_equally_often() -> None:
    for frames, available, each in ((Frames(4), 8, 500), (Frames(1), 5, 200)):
        counts = Counter(n for seed in range(1000) for n in frames.chosen(available, Stream(seed)))
        assert all(abs(counts[n] - each) < 90 for n in range(available)), counts
    starts = Counter(Frames(3, 2).chosen(9, Stream(seed))[0] for seed in range(1000))
    assert set(starts) == {0, 1, 2, 3, 4}
    assert Frames(4).chosen(4) == [0, 1, 2, 3]
    assert Frames(3).chosen(9) == [1, 4, 7]
    assert Frames(3, 2).chosen(9) == [2, 4, 6]


def batches(dataset: Dataset, steps: int = 3, start: int = 0, world_size: int = 1, **options: Any) -> list[Batch]:
    """The global batches of some steps."""
    options = {"threads": 1, "frames": 4, **options}
    sampler = Sampler((dataset,), seed=3, batch_size=8, repeats=options.pop("repeats", 1))
    parts = []
    for rank in range(world_size):
        with Loader(sampler, VIEWS, rank=rank, world_size=world_size, **options) as loader:
            found = itertools.islice(loader.steps(start), steps)
            parts.append([{name: torch.cat([b[name] for b in one]) for name in one[0]} for one in found])
    return [{name: torch.cat([part[step][name] for part in parts]) for name in parts[0][0]} for step in range(steps)]


def test_crops_are_those_of_each_frame_with_the_same_draws(clips: Path) -> None:
    """Against the slow form: every frame decoded whole, and rendered as an image of the same parameters."""
    render, frames = backend(), Frames(4)
    with open_dataset(clips) as dataset:
        sampler = Sampler((dataset,), seed=3, batch_size=8)
        for step, batch in enumerate(batches(dataset, dct_scaling=False)):
            assert batch["global_crops"].shape == (8, 2, 12, 16, 16)
            assert batch["local_crops"].shape == (8, 1, 12, 8, 8)
            for place, row in enumerate(sampler.rows(step, range(8))):
                stored = dataset.read(row.sample)
                numbers = frames.drawn((3, row.dataset, row.epoch, row.sample), len(stored.frames))
                for number, wanted in enumerate(numbers):
                    image = decode(stored._replace(image=stored.frames[wanted]))
                    drawn = draw(VIEWS, row.identity(3), image.shape[:2])
                    outs = [np.empty((3, size, size), np.uint8) for size in (16, 16, 8)]
                    render(image, [CropJob(p, "bicubic", out) for p, out in zip(drawn, outs, strict=True)])
                    own = slice(3 * number, 3 * number + 3)
                    for view in range(2):
                        assert np.array_equal(batch["global_crops"][place, view, own].numpy(), outs[view])
                    assert np.array_equal(batch["local_crops"][place, 0, own].numpy(), outs[2])


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 3},
        {"world_size": 2, "grad_accum_steps": 2},
        {"workers": 2},
        {"partial_decode": False, "dct_scaling": False},
    ],
    ids=["threads", "ranks", "processes", "whole images"],
)
def test_the_order_contract_holds(clips: Path, options: dict[str, Any]) -> None:
    with open_dataset(clips) as dataset:
        expected = batches(dataset, dct_scaling=False)
        assert len({batch["global_crops"].sum().item() for batch in expected}) == 3
        for one, other in zip(expected, batches(dataset, **{"dct_scaling": False, **options}), strict=True):
            assert all(torch.equal(part, other[name]) for name, part in one.items())
        assert torch.equal(batches(dataset, 1, start=2, dct_scaling=False)[0]["ids"], expected[2]["ids"])
        resumed = batches(dataset, 1, start=2, dct_scaling=False)[0]
        assert torch.equal(resumed["global_crops"], expected[2]["global_crops"])


def test_repeats_of_a_sample_show_the_same_frames_in_other_crops(clips: Path) -> None:
    with open_dataset(clips) as dataset:
        one = batches(dataset, repeats=2)
        other = batches(dataset, repeats=2, world_size=4)
        assert all(torch.equal(a["global_crops"], b["global_crops"]) for a, b in zip(one, other, strict=True))


def test_other_channels_and_depths(tmp_path: Path) -> None:
    stacks = [np.stack([bands(10 * n + t, 5) for t in range(6)]) for n in range(8)]
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.npy", npy(stack)) for n, stack in enumerate(stacks)])
    with open_dataset(tmp_path) as dataset:
        (batch,) = batches(dataset, 1, channels=5, bits=16, frame_stride=1)
        assert batch["global_crops"].shape == (8, 2, 20, 16, 16)
        assert batch["global_crops"].dtype == torch.uint16
        images, _, _ = next(center_crops(dataset, 16, channels=5, bits=16, frames=3))
        expected = np.concatenate([cropped(stacks[0][n], 16) for n in (1, 3, 5)])
        assert np.array_equal(images[0].numpy(), expected)


def test_probes_see_the_middle_frames(clips: Path) -> None:
    with open_dataset(clips) as dataset:
        images, labels, numbers = next(center_crops(dataset, 16, frames=2))
        assert images.shape == (14, 6, 16, 16)
        assert labels.tolist() == [n % 3 for n in range(14)]
        stored = dataset.read(4)  # of eight frames
        expected = [cropped(decode(stored._replace(image=stored.frames[n])), 16) for n in (2, 6)]
        assert np.array_equal(images[4].numpy(), np.concatenate(expected))
        assert numbers.tolist() == list(range(14))


def test_what_stacks_go_without_is_refused(clips: Path) -> None:
    with open_dataset(clips) as dataset:
        sampler = Sampler((dataset,), seed=0, batch_size=4)
        for options, words in (({"backend": "device"}, "colours of images"), ({"masks": True}, "masks are cut")):
            with pytest.raises(ValueError, match=f"{words}.*, and frames is 4"):
                Loader(sampler, VIEWS, frames=4, **options)  # type: ignore[arg-type]


def test_verify_reads_every_frame_of_a_sound_set(clips: Path) -> None:
    report = verify(clips, frames=4, progress=False)
    assert report["ok"], report["problems"]
    assert json.loads((clips / "verify.json").read_text())["width"] == [40, 40]
