"""The cache of features: one computation, within its bound, whatever happens to what it holds."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.datasets.dataset import open_dataset
from eval.sources import FeatureSource
from eval.store.cache import FeatureCache, NoRoomError, limit_of
from eval.store.decode import MAPPED
from eval.store.growing import JOURNAL, write_arrays
from eval.store.layout import Layout, Piece
from eval.store.mapped import GrowingArray
from eval.store.matrix import write_complete
from eval.store.precision import Precision
from eval.target import open_target

LAYOUT = Layout((Piece("mean", 0, 4),), {"mean": (0, 4)}, "mean", None, 4)
BYTES = 10 * (16 + 24) + 1000  # of an entry


class Counted:
    """A maker of entries that counts how often it was asked."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, folder: Path, digest: str) -> None:
        self.made.append(digest)
        arrays = {"features": ((4,), np.float32), **dict.fromkeys(("samples", "labels", "digests"), ((), np.int64))}
        for name, (tail, dtype) in arrays.items():
            array = GrowingArray(folder / f"{name}.npy", tail, dtype)
            array.append(np.full((10, *tail), len(self.made), dtype))
            array.keep()
            array.close()
        write_complete(folder, digest, 10, False)


@pytest.fixture
def make() -> Counted:
    return Counted()


def entries(cache: FeatureCache) -> int:
    return sum(place.is_dir() for place in cache.folder.iterdir())


def test_computed_once_a_key(tmp_path, make):
    cache = FeatureCache(tmp_path, 10**6)
    for key in ({"encoder": 1}, {"encoder": 2}, {"encoder": 1}):
        found = cache.open(key, LAYOUT, BYTES, make)
        assert found.features.tolist() == [[float(key["encoder"])] * 4] * 10
    assert len(make.made) == 2


@pytest.mark.parametrize("damage", ["short", "gone", "other"])
def test_a_damaged_entry_is_made_anew(tmp_path, make, damage):
    cache = FeatureCache(tmp_path, 10**6)
    cache.open({}, LAYOUT, BYTES, make)
    (folder,) = (place for place in tmp_path.iterdir() if place.is_dir())
    if damage == "short":
        (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-3])
    elif damage == "gone":
        (folder / "labels.npy").unlink()
    else:
        (folder / "complete.json").write_text("[]")
    assert cache.open({}, LAYOUT, BYTES, make).features[0, 0] == 2
    assert len(make.made) == 2


def test_the_least_recently_used_goes_but_none_that_is_open(tmp_path, make):
    cache = FeatureCache(tmp_path, 3 * BYTES)
    held = cache.open({"number": 0}, LAYOUT, BYTES, make).feature_set()
    for number in range(1, 5):
        cache.open({"number": number}, LAYOUT, BYTES, make)
        for lock in tmp_path.glob("*.lock"):
            if lock.name != "folder.lock":  # each use a second after the one before
                os.utime(lock, (lock.stat().st_atime, lock.stat().st_mtime - 1))
        assert entries(cache) <= 3
    cache.open({"number": 0}, LAYOUT, BYTES, make)
    assert len(make.made) == 5, "what is open was not removed, old as it is"
    assert held.inputs["mean"][0, 0] == 1
    cache.open({"number": 1}, LAYOUT, BYTES, make)
    assert len(make.made) == 6
    del held
    cache.open({"number": 7}, LAYOUT, 3 * BYTES, make)  # all others have to go
    assert entries(cache) == 1


def test_no_room_is_told_in_bytes(tmp_path, make, monkeypatch):
    with pytest.raises(NoRoomError, match=r"5\.0 GB \(5,000,000,000 bytes\), and SELFSIGHT_FEATURE_CACHE_GB allows"):
        FeatureCache(tmp_path, 10**6).open({}, LAYOUT, 5 * 10**9, make)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(NoRoomError, match="10 bytes free"):
        FeatureCache(tmp_path, 10**6).open({}, LAYOUT, BYTES, make)
    (tmp_path / "file").touch()
    with pytest.raises(NoRoomError, match="can't be used"):
        FeatureCache(tmp_path / "file", 10**6).open({}, LAYOUT, BYTES, make)
    assert not make.made
    assert limit_of(None) == 20 * 10**9
    assert limit_of("0.5") == 5 * 10**8
    for wrong in ("much", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match="bound of the cache of features in GB"):
            limit_of(wrong)


def test_whoever_comes_second_waits_for_the_first(tmp_path, make, monkeypatch):
    cache = FeatureCache(tmp_path, 10**6)
    cache.open({}, LAYOUT, BYTES, make)
    (lock,) = tmp_path.glob(f"{'?' * 32}.lock")
    other = os.open(lock, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)  # as a process that makes it
    told: list[str] = []
    monkeypatch.setattr("eval.store.cache.pause", lambda seconds: os.close(other))
    cache.open({}, LAYOUT, BYTES, make, told.append)
    assert told == ["waiting for another process, which makes the same features"]
    assert len(make.made) == 1


def source(whose, folder, **changes) -> FeatureSource:
    fp32 = Precision("fp32", "float32", "")
    found = FeatureSource(open_target(str(whose)), fp32, "cpu", 32, 4, False, False, lambda line: None)
    found.cache = FeatureCache(folder, 10**8)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_the_key_tells_encoders_data_crops_and_precision_apart(target, data, tmp_path):
    made = []
    dataset, samples = open_dataset(data), np.arange(40)
    first = source(target, tmp_path / "cache")
    known = first.features(first.target.encoder, dataset, samples)
    plain = type(first.cache)._make

    def noted(*arguments):
        made.append(arguments)
        plain(*arguments)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(FeatureCache, "_make", noted)
    again = first.features(first.target.encoder, dataset, samples)
    assert not made
    assert torch.equal(again.inputs["class"], known.inputs["class"])
    for other in (
        (first.target.untrained(0), dataset, samples),
        (first.target.encoder, open_dataset(data, "val"), samples[:8]),
        (first.target.encoder, dataset, samples[1:]),
    ):
        before = len(made)
        first.features(*other)
        assert len(made) == before + 1
    for changes in (
        {"last_blocks": 2},
        {"tokens": True},
        {"precision": Precision("bf16", "float16", "")},
        {"target": open_target(str(target), 8)},
    ):
        before, changed = len(made), source(target, tmp_path / "cache", **changes)
        changed.features(changed.target.encoder, dataset, samples)
        assert len(made) == before + 1, changes
    monkeypatch.undo()


def test_what_was_killed_goes_on(target, data, tmp_path, monkeypatch):
    """Each batch is kept at once; the second process finds 96 of 150 samples done."""
    monkeypatch.setattr("eval.store.growing.KEEP_SECONDS", -1)
    first = source(target, tmp_path / "cache")
    dataset, samples = open_dataset(data), np.arange(150)
    plain, asked = first.target.encoder.forward, []

    def forward(images, *more, **kwargs):
        asked.append(len(images))
        if sum(asked) > 100:
            raise KeyboardInterrupt
        return plain(images, *more, **kwargs)

    first.target.encoder.forward = forward
    with pytest.raises(KeyboardInterrupt):
        first.features(first.target.encoder, dataset, samples)
    (part,) = (tmp_path / "cache").glob("*.part")
    features = part / "features.npy"
    features.write_bytes(features.read_bytes() + b"half a row")
    asked.clear()
    asked.append(-1000)
    found = first.features(first.target.encoder, dataset, samples)
    assert asked[2:] == [32, 22]  # after the one that the layout is found on
    del first.target.encoder.forward
    whole = source(target, tmp_path / "other").features(first.target.encoder, dataset, samples)
    assert torch.equal(found.inputs["class of last 4 + mean"], whole.inputs["class of last 4 + mean"])
    assert torch.equal(found.ids, whole.ids)


def test_where_nothing_can_be_kept_features_are_held_in_memory_or_refused(target, data, tmp_path, monkeypatch):
    told: list[str] = []
    first = source(target, tmp_path / "cache", say=told.append)
    first.cache.max_bytes = 1000
    dataset, samples = open_dataset(data), np.arange(40)
    known = source(target, tmp_path / "other").features(first.target.encoder, dataset, samples)
    found = first.features(first.target.encoder, dataset, samples)
    assert torch.equal(found.inputs["class"], known.inputs["class"])
    assert len(told) == 1
    assert told[0].startswith(
        "features are held in memory (9.6 kB) and not kept: they would take 76.1 kB (76,096 bytes)"
    )
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100}))
    with pytest.raises(ValueError, match=r"In memory they would take 9\.6 kB, and 100 bytes is free; write a store"):
        first.features(first.target.encoder, dataset, samples)
    first.tokens = True
    with pytest.raises(ValueError, match="patch tokens can't be kept"):
        first.features(first.target.encoder, dataset, samples)


def test_a_store_is_read_in_their_place(target, data, tmp_path, monkeypatch):
    from eval.embed import embed
    from tests.eval.store.conftest import save

    embed(str(target), str(data), tmp_path / "store", progress=False, say=lambda line: None)
    first = source(target, tmp_path / "cache")
    datasets = {"train": open_dataset(data), "val": open_dataset(data, "val")}
    known = first.features(first.target.encoder, datasets["train"], np.arange(3, 50))
    first.read_store(tmp_path / "store", datasets)
    assert (tmp_path / "store" / "val" / MAPPED).is_dir()
    first.cache = None
    found = first.features(first.target.encoder, datasets["train"], np.arange(3, 50))
    torch.testing.assert_close(found.inputs["class"], known.inputs["class"])
    assert torch.equal(found.digests, known.digests)

    with pytest.raises(ValueError, match=r"encoder: .* there, .* asked"):
        source(save(tmp_path / "another", seed=9), tmp_path / "cache").read_store(tmp_path / "store", datasets)
    with pytest.raises(ValueError, match=r"crops\.size: 16 there, 8 asked"):
        source(target, tmp_path / "cache", target=open_target(str(target), 8)).read_store(tmp_path / "store", datasets)
    part = open_dataset(data / "train-000000.tar")
    with pytest.raises(ValueError, match="holds no features of val"):
        source(target, tmp_path / "cache").read_store(tmp_path / "store", {"val": part})
    with pytest.raises(ValueError, match="holds no patch tokens"):
        source(target, tmp_path / "cache", tokens=True).read_store(tmp_path / "store", datasets)


def test_the_journal_is_gone_when_all_is_there(target, data, tmp_path):
    first = source(target, tmp_path / "cache")
    first.features(first.target.encoder, open_dataset(data), np.arange(40))
    assert not list((tmp_path / "cache").rglob(JOURNAL))
    assert write_arrays.__doc__
