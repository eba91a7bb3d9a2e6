"""Shards at a misbehaving server, and on a slow disk: the very batches of local ones."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from making import sample_files, write_tar
from serving import Server, describe, serve

from data_pipelines.buffers import Batch
from data_pipelines.checks.verify import verify
from data_pipelines.datasets import local_view
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.dataset_index import write_index
from data_pipelines.datasets.local_view import LocalView
from data_pipelines.datasets.prefetch import Need, ShardPrefetcher, in_order
from data_pipelines.eval_loader import center_crops
from data_pipelines.loader import Loader
from data_pipelines.remote.cache import Cache
from data_pipelines.remote.fetch import FetchError, Patience
from data_pipelines.remote.remote_files import RemoteFile
from data_pipelines.sampler import Sampler
from data_pipelines.transforms.config import Crop, Views

QUICK = Patience(tries=4, timeout_seconds=0.5, backoff_seconds=0.001)
VIEWS = Views(global_crops=(Crop(size=16, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8),))
NUM_SHARDS, BATCH, STEPS = 6, 12, 30


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "set"
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        write_tar(folder / f"train-{shard:06d}.tar", sample_files(range(20 * shard, 20 * shard + 15 + shard)))
    return folder


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    """A copy of one's own."""
    return shutil.copytree(packed, tmp_path / "served" / "set", ignore=shutil.ignore_patterns("*.index"))


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder.parent) as running:
        yield running


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[list[bytes]]:
    with open_dataset(packed) as dataset:
        return batches(dataset)


def spec_of(server: Server) -> str:
    return f"{server.url}/set/train-{{000000..{NUM_SHARDS - 1:06d}}}.tar"


def contents(parts: list[Batch]) -> list[bytes]:
    return [part[name].numpy().tobytes() for part in parts for name in ("ids", "labels", "global_crops")]


def batches(dataset: Dataset, start: int = 0, stop: int = STEPS, ranks: int = 1, threads: int = 2) -> list[list[bytes]]:
    """What each step holds, by rank."""
    sampler = Sampler((dataset,), seed=7, batch_size=BATCH, lanes=3, window=8)
    loaders = [Loader(sampler, VIEWS, rank=rank, world_size=ranks, threads=threads) for rank in range(ranks)]
    try:
        steps = zip(*(loader.steps(start) for loader in loaders), strict=True)
        return [[b"".join(contents(parts)) for parts in step] for step in itertools.islice(steps, stop - start)]
    finally:
        for loader in loaders:
            loader.close()


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


@pytest.mark.parametrize("ranges", [True, False])
def test_the_batches_are_those_of_local_shards_whatever_the_server_does(
    server: Server, expected: list[list[bytes]], ranges: bool
) -> None:
    server.ranges = ranges
    server.every = ["500", "drop", "reset", "long"]
    server.faults["set/train-000001.tar"].extend(["stall", "503", "page"])
    server.faults["set/train-000003.tar"].extend(["drop", "hang"])
    with open_dataset(spec_of(server), cache=Cache(patience=QUICK)) as dataset:
        assert batches(dataset, stop=13) + batches(dataset, start=13) == expected


def test_other_ranks_see_the_same_rows(server: Server, packed: Path) -> None:
    describe(server.folder / "set")
    with (
        open_dataset(packed) as local,
        open_dataset(f"{server.url}/set", cache=Cache(patience=QUICK)) as dataset,
    ):
        assert batches(dataset, ranks=2, threads=3) == batches(local, ranks=2)
        assert dataset.checksum == local.checksum
    assert server.sent.total() < 1.5 * shard_bytes(packed)  # two ranks, one cache


def test_a_cache_too_small_for_a_batch_is_slow_and_right(
    server: Server, expected: list[list[bytes]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    describe(server.folder / "set")
    largest = max(path.stat().st_size for path in server.folder.glob("set/*.tar"))
    cache = Cache(tmp_path / "cache", max_bytes=int(1.5 * largest), patience=QUICK)
    with open_dataset(f"{server.url}/set", cache=cache) as dataset:
        assert batches(dataset, stop=4) == expected[:4]
        assert cache.statistics.misses > NUM_SHARDS
    warned = [record.message for record in caplog.records if "fetched again and again" in record.message]
    assert len(warned) == 1
    assert "data.cache.max_bytes" in warned[0]


def test_a_published_index_is_fetched_and_no_shard(server: Server, packed: Path) -> None:
    describe(server.folder / "set")
    write_index(server.folder / "set", "train")
    with open_dataset(f"{server.url}/set", cache=Cache(patience=QUICK)) as dataset, open_dataset(packed) as local:
        assert dataset.checksum == local.checksum
        assert not [path for path, _ in server.requests if path.endswith(".tar")]
        assert len(server.requests) <= 4  # however many shards there are
        assert dataset.read(3).image == local.read(3).image


@pytest.mark.parametrize("described", [True, False])
def test_shards_own_indexes_are_fetched(server: Server, packed: Path, described: bool) -> None:
    with open_dataset(server.folder / "set"):
        pass  # leaves an index beside every shard
    assert len(list(server.folder.glob("set/*.tar.index"))) == NUM_SHARDS
    if described:
        describe(server.folder / "set")
    with open_dataset(spec_of(server), cache=Cache(patience=QUICK)) as dataset, open_dataset(packed) as local:
        assert dataset.checksum == local.checksum
    assert not [path for path, _ in server.requests if path.endswith(".tar")]


def test_without_an_index_it_is_built_once_and_said_so(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with open_dataset(spec_of(server), cache=Cache(patience=QUICK)):
            pass
    warned = [record.message for record in caplog.records if "no index is published" in record.message]
    assert len(warned) == 1
    assert "6 shards" in warned[0]
    assert all(server.sent[f"train-{number:06d}.tar"] > 1000 for number in range(NUM_SHARDS))
    shutil.rmtree(Path(os.environ["SELFSIGHT_CACHE"]) / "shards")
    server.sent.clear()
    with open_dataset(spec_of(server), cache=Cache(patience=QUICK)):
        assert server.sent.total() < 1000  # the indexes are kept apart from the shards


def test_a_published_index_of_other_shards_is_not_used(
    server: Server, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_index(server.folder / "set", "train")
    write_tar(server.folder / "set/train-000002.tar", sample_files(range(300, 330)))
    describe(server.folder / "set")
    with (
        open_dataset(f"{server.url}/set", cache=Cache(patience=QUICK)) as dataset,
        open_dataset(server.folder / "set") as local,
    ):
        assert dataset.checksum == local.checksum
    assert "train-000002.tar has other bytes than its published index says" in caplog.text


def test_what_cannot_be_fetched_ends_with_step_and_shard(server: Server, folder: Path) -> None:
    write_index(folder, "train")
    describe(folder)
    server.faults["set/train-000004.tar"].extend(["500"] * 1000)
    with open_dataset(f"{server.url}/set", cache=Cache(patience=QUICK)) as dataset:
        began = time.monotonic()
        with pytest.raises(FetchError, match=r"step \d+ cannot be made: http://.*train-000004\.tar .* 4 tries"):
            batches(dataset)
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("fault", ["500", "hang", "stall"])
def test_closing_does_not_wait_for_a_fetch(server: Server, folder: Path, fault: str) -> None:
    write_index(folder, "train")
    describe(folder)
    for number in range(NUM_SHARDS):
        server.faults[f"set/train-{number:06d}.tar"].extend([fault] * 1000)
    patience = Patience(tries=1000, timeout_seconds=60, backoff_seconds=30)
    before = threading.active_count()
    with open_dataset(f"{server.url}/set", cache=Cache(patience=patience)) as dataset:
        sampler = Sampler((dataset,), seed=7, batch_size=BATCH, lanes=3)
        loader = Loader(sampler, VIEWS, threads=2)
        steps = loader.steps()

        def read() -> None:
            with suppress(Exception):
                next(steps)

        thread = threading.Thread(target=read)
        thread.start()
        while len(server.requests) < 5:
            time.sleep(0.01)
        began = time.monotonic()
        loader.close()
        thread.join()
        assert time.monotonic() - began < 3
    assert threading.active_count() <= before + 8  # of the server
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("fetch", "loader"))]


def test_staged_shards(folder: Path, expected: list[list[bytes]], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "scratch", patience=QUICK)
    with open_dataset(folder, cache=cache, stage=True) as dataset:
        assert batches(dataset) == expected
        assert cache.statistics.fetched_bytes == shard_bytes(folder)
    assert len([path for path in (tmp_path / "scratch").iterdir() if "." not in path.name]) == NUM_SHARDS


def test_images_in_order_are_fetched_ahead(server: Server, packed: Path) -> None:
    write_index(server.folder / "set", "train")
    describe(server.folder / "set")
    cache = Cache(patience=QUICK)
    with open_dataset(f"{server.url}/set", cache=cache) as dataset, open_dataset(packed) as local:
        ours, theirs = (list(center_crops(data, 16, batch_size=7)) for data in (dataset, local))
    for own, other in zip(ours, theirs, strict=True):
        assert all((mine == its).all() for mine, its in zip(own, other, strict=True))
    assert cache.statistics.fetched_bytes >= shard_bytes(packed)


def remote(server: Server, cache: Cache) -> Dataset:
    write_index(server.folder / "set", "train")
    describe(server.folder / "set")
    return open_dataset(f"{server.url}/set", cache=cache)


def wait_until(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ahead_within_horizon_and_room(server: Server, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(server.folder.glob("set/*.tar"))]
    cache = Cache(tmp_path / "cache", max_bytes=sum(sizes[:3]) + 100, patience=QUICK)
    dataset = remote(server, cache)

    def fetched() -> set[int]:
        return {number for number in range(NUM_SHARDS) if server.num_requests(f"train-{number:06d}.tar")}

    prefetcher = ShardPrefetcher([dataset], ([Need(dataset, shard)] for shard in range(NUM_SHARDS)), horizon=2)
    wait_until(lambda: fetched() == {0, 1})
    prefetcher.advance()
    wait_until(lambda: fetched() == {0, 1, 2})
    prefetcher.close()
    prefetcher = ShardPrefetcher([dataset], ([Need(dataset, shard)] for shard in range(NUM_SHARDS)), horizon=100)
    time.sleep(0.3)
    assert fetched() == {0, 1, 2}  # there is no room for more before the first is done with
    for _ in range(NUM_SHARDS):
        prefetcher.advance()
    wait_until(lambda: fetched() == set(range(NUM_SHARDS)))
    prefetcher.close()
    assert [list(needs) for needs in in_order(dataset, 14, 40, 10)] == [
        [Need(dataset, 0), Need(dataset, 1)],
        [Need(dataset, 1), Need(dataset, 2)],
        [Need(dataset, 2)],
    ]


def test_a_failure_ahead_of_its_time_is_told_and_ends_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    dataset = remote(server, Cache(patience=QUICK))
    server.faults["set/train-000001.tar"].extend(["500"] * 4)
    prefetcher = ShardPrefetcher([dataset], ([Need(dataset, shard)] for shard in range(3)), horizon=5, first=100)
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: "for step 101" in caplog.text)
    prefetcher.close()
    assert "train-000001.tar could not be fetched" in caplog.text
    assert dataset.read(20).key == "000025"


LOAD = """
import hashlib, sys
sys.path[:0] = sys.argv[4:]
import test_remote
from pathlib import Path
from data_pipelines.remote.cache import Cache
from data_pipelines.datasets.dataset import open_dataset
with open_dataset(sys.argv[1], cache=Cache(Path(sys.argv[2]), patience=test_remote.QUICK)) as dataset:
    for step in test_remote.batches(dataset, stop=int(sys.argv[3])):
        print(hashlib.sha256(step[0]).hexdigest(), flush=True)
"""


def test_a_rank_killed_while_it_fills_the_cache_changes_nothing(
    server: Server, expected: list[list[bytes]], tmp_path: Path
) -> None:
    write_index(server.folder / "set", "train")
    describe(server.folder / "set")
    server.faults["set/train-000002.tar"].append("stall")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", LOAD, f"{server.url}/set", str(cache), "6", str(Path(__file__).parent), *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as first:
        wait_until(lambda: first.poll() is not None or any(p.stat().st_size for p in cache.glob("*.part")), seconds=60)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    assert out.split() == [hashlib.sha256(step[0]).hexdigest() for step in expected[:6]]
    assert not list(cache.glob("*.part"))
    kept = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in cache.glob("*") if "." not in path.name
    }
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in server.folder.glob("set/*.tar")}
    assert shards & set(kept.values()) == shards & set(kept)  # nothing half written


def test_verify_reads_every_shard_once(server: Server, tmp_path: Path) -> None:
    write_index(server.folder / "set", "train")
    describe(server.folder / "set")
    found = verify(f"{server.url}/set", report=tmp_path / "report.json", progress=False)
    assert (found["ok"], found["shards"], found["samples"]) == (True, NUM_SHARDS, 105)
    assert found["problems"] == []
    assert server.sent.total() < 1.1 * shard_bytes(server.folder / "set") + 100_000
    assert list((Path(os.environ["SELFSIGHT_CACHE"]) / "views").iterdir()) == []
    (server.folder / "set/train-000001.tar").unlink()
    write_tar(server.folder / "set/train-000002.tar", [*sample_files(range(5)), ("9.png", b"none")])
    shutil.rmtree(Path(os.environ["SELFSIGHT_CACHE"]) / "shards")
    found = verify(spec_of(server), report=tmp_path / "report.json", progress=False)
    assert not found["ok"]
    assert "unreadable (2): the first, train-000001.tar: http://" in "\n".join(found["problems"])
    assert "missing_shard (1)" in "\n".join(found["problems"])


def test_verify_and_the_trash_of_a_killed_one(server: Server, tmp_path: Path) -> None:
    left = Path(os.environ["SELFSIGHT_CACHE"]) / "views" / "left"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "x.tar").write_bytes(bytes(1000))
    found = verify(spec_of(server).replace("000005", "000002"), progress=False)  # nothing is published beside them
    assert (found["ok"], found["shards"], found["samples"]) == (True, 3, 48)
    assert not left.exists()


def test_a_view_that_another_process_takes_for_left_behind(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of its lock and the holding of it."""
    real = local_view.lock
    meddled: list[Path] = []

    def meddling(file: BinaryIO) -> bool:
        if not meddled:
            meddled.append(Path(file.name).parent)
            local_view._remove_left(meddled[0].parent)
        return real(file)

    monkeypatch.setattr(local_view, "lock", meddling)
    shard = RemoteFile(f"{server.url}/set/train-000000.tar")
    with LocalView([shard], Cache(tmp_path / "cache", patience=QUICK), whole=True) as view:
        assert not meddled[0].exists()
        view.bring(view.paths[0])
        assert view.paths[0].read_bytes() == (server.folder / "set/train-000000.tar").read_bytes()
