"""The cache that processes share: one fetches, the bound holds, and neither kills nor damage are seen by readers."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from serving import Server, serve

from data_pipelines.remote import cache as cache_module
from data_pipelines.remote import fetch as fetch_module
from data_pipelines.remote.cache import Cache, default_folder
from data_pipelines.remote.cache_folder import CacheFolder, CacheFullError
from data_pipelines.remote.fetch import FetchError, Patience
from data_pipelines.remote.remote_files import ChangedError, FileState, RemoteFile

QUICK = Patience(tries=4, timeout_seconds=5, backoff_seconds=0.001)
SIZE = 600_000
NUM_FILES = 8


def content(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(NUM_FILES):
        (folder / f"{number}.tar").write_bytes(content(number))
    with serve(folder) as running:
        yield running


def file_of(server: Server, number: int, known: bool = True) -> RemoteFile:
    url = f"{server.url}/{number}.tar"
    return RemoteFile(url, FileState(SIZE), hashlib.sha256(content(number)).hexdigest()) if known else RemoteFile(url)


def read(cache: Cache, file: RemoteFile) -> bytes:
    descriptor = cache.open(file)
    try:
        return os.pread(descriptor, 10 * SIZE, 0)
    finally:
        os.close(descriptor)


def stored(folder: Path) -> list[str]:
    """The entries that are whole."""
    return sorted(path.name for path in folder.iterdir() if "." not in path.name)


class _SilentSource:
    """Says nothing of its size; `meet` is waited for at the end of each file."""

    def __init__(self, content: bytes, meet: threading.Barrier | None = None) -> None:
        self._content, self._meet = content, meet

    def state(self) -> FileState:
        return FileState(None, "ETag 1")

    def stream(self, start: int, known: FileState) -> tuple[FileState, Iterator[tuple[int, bytes]]]:
        def body() -> Iterator[tuple[int, bytes]]:
            yield start, self._content[start:]
            if self._meet is not None:
                self._meet.wait()

        return self.state(), body()


def test_two_of_unknown_size_that_do_not_fit_together_do_not_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _SilentSource(bytes(600), threading.Barrier(2))
    monkeypatch.setattr(fetch_module, "source_of", lambda url, timeout: source)
    monkeypatch.setattr(CacheFolder, "_free", lambda folder: 10)  # no room for either a second time
    cache = Cache(tmp_path / "cache", max_bytes=1000, patience=QUICK)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(read, cache, RemoteFile(f"http://host/{name}")) for name in "ab"]
        assert [job.result(timeout=10) for job in jobs] == [bytes(600)] * 2
    assert len(stored(tmp_path / "cache")) >= 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_those_who_fetch_at_once_leave_each_other_their_room_on_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, disk, most = tmp_path / "cache", 5 * SIZE // 2, [0]
    cache = Cache(folder, patience=QUICK)
    write = Cache._write

    def used() -> int:
        total = 0
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # renamed meanwhile
                total += path.stat().st_size
        return total

    def noting(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        most.append(used())

    monkeypatch.setattr(Cache, "_write", noting)
    monkeypatch.setattr(CacheFolder, "_free", lambda folder: disk - used())
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda number: read(cache, file_of(server, number % NUM_FILES)), range(3 * NUM_FILES)))
    assert SIZE < max(most) <= disk
    monkeypatch.setattr(CacheFolder, "_free", lambda folder: 0)  # by others: no waiting helps
    shutil.rmtree(folder)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(cache.fetch, file_of(server, number)) for number in range(2)]
        assert all(isinstance(job.exception(timeout=10), CacheFullError) for job in jobs)


def test_more_bytes_than_are_known_of_are_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "source_of", lambda url, timeout: _SilentSource(bytes(700)))
    cache = Cache(tmp_path / "cache", patience=QUICK)
    with pytest.raises(ChangedError, match="more than 600 bytes"):
        read(cache, RemoteFile("http://host/a", FileState(600)))
    assert stored(tmp_path / "cache") == []


def test_files_of_others_in_the_folder_stay(server: Server, tmp_path: Path) -> None:
    folder, names = tmp_path / "cache", {"LICENSE", "train-000000.tar", "train-000000.json", "x.abc.part", ".a.tmp"}
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(bytes(SIZE))
        os.utime(folder / name, (0, 0))
    cache = Cache(folder, max_bytes=2 * SIZE, patience=QUICK)
    for number in range(3):
        read(cache, file_of(server, number))
    assert len(stored(folder)) == 2 + len({"LICENSE"})
    assert names <= {path.name for path in folder.iterdir()}


def test_to_note_a_use_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched ahead does so under its lock, which the consumer needs."""
    asked: list[str] = []
    monkeypatch.setattr(fetch_module, "source_of", lambda url, timeout: asked.append(url))
    Cache(tmp_path / "cache", patience=QUICK).touch(RemoteFile("http://host/a"))
    assert not asked


@pytest.mark.parametrize("known", [True, False])
def test_fetched_once(server: Server, tmp_path: Path, known: bool) -> None:
    for _ in range(2):  # the second is another process's, so to say
        cache = Cache(tmp_path / "cache", patience=QUICK)
        for number in (0, 1, 0):
            assert read(cache, file_of(server, number, known)) == content(number)
    assert cache.statistics.misses == 0
    assert cache.statistics.hits == 3
    asked = 0 if known else 4  # times for a byte
    assert 2 * SIZE <= server.sent["0.tar"] + server.sent["1.tar"] <= 2 * SIZE + asked


def test_of_one_name_and_another_place(server: Server, tmp_path: Path) -> None:
    (server.folder / "other").mkdir()
    (server.folder / "other/0.tar").write_bytes(content(5))
    cache = Cache(tmp_path / "cache", patience=QUICK)
    assert read(cache, RemoteFile(f"{server.url}/0.tar")) == content(0)
    assert read(cache, RemoteFile(f"{server.url}/other/0.tar")) == content(5)


def test_a_new_version_is_fetched_and_one_run_sees_one_version(server: Server, tmp_path: Path) -> None:
    first = Cache(tmp_path / "cache", patience=QUICK)
    assert read(first, file_of(server, 0, known=False)) == content(0)
    (server.folder / "0.tar").write_bytes(content(6))
    assert read(Cache(tmp_path / "cache", patience=QUICK), file_of(server, 0, known=False)) == content(6)
    assert read(first, file_of(server, 0, known=False)) == content(0)
    first.folder.remove(stored(tmp_path / "cache")[0])
    first.folder.remove(stored(tmp_path / "cache")[0])
    with pytest.raises(ChangedError, match="changed while it was read, or since"):
        read(first, file_of(server, 0, known=False))


def test_threads_share_one_fetch(server: Server, tmp_path: Path) -> None:
    caches = [Cache(tmp_path / "cache", patience=QUICK) for _ in range(2)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda place: read(caches[place % 2], file_of(server, place % 4)), range(64)))
    assert found == [content(place % 4) for place in range(64)]
    assert server.sent.total() == 4 * SIZE
    assert sum(cache.statistics.misses for cache in caches) == 4
    assert sum(cache.statistics.hits for cache in caches) == 60


def test_the_least_recently_used_goes(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=3 * SIZE, patience=QUICK)
    now = time.time()
    for number in range(3):
        cache.fetch(file_of(server, number))
        lock = tmp_path / "cache" / f"{file_of(server, number).sha256}.lock"
        os.utime(lock, (now - 100 + number,) * 2)
    cache.touch(file_of(server, 0))
    descriptor = cache.open(file_of(server, 1))
    os.utime(tmp_path / "cache" / f"{file_of(server, 1).sha256}.lock", (now - 99,) * 2)
    cache.fetch(file_of(server, 3))
    kept = {file_of(server, number).sha256 for number in (0, 2, 3)}
    assert set(stored(tmp_path / "cache")) == kept
    assert os.pread(descriptor, SIZE, 0) == content(1)  # open ones can be read to their end
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)
    assert not list((tmp_path / "cache").glob(f"{file_of(server, 1).sha256}*"))


def test_readers_under_pressure_never_see_anything_else_and_the_bound_holds(server: Server, tmp_path: Path) -> None:
    bound, stop, most = 3 * SIZE, threading.Event(), []

    def watch() -> None:
        folder = CacheFolder(tmp_path / "cache", bound)
        while not stop.is_set():
            files: dict[int, int] = {}  # by inode, as an entry may get its final name while we look
            with folder.locked("folder"):  # nothing is removed or begun meanwhile
                for path in folder.path.glob("*"):
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        if not path.name.endswith((".json", ".lock", ".tmp")):
                            files[status.st_ino] = status.st_size
            most.append(sum(files.values()))
            time.sleep(0.005)

    caches = [Cache(tmp_path / "cache", max_bytes=bound, patience=QUICK) for _ in range(3)]
    watcher = threading.Thread(target=watch)
    watcher.start()
    order = np.random.default_rng(1).integers(0, NUM_FILES, 60).tolist()
    with ThreadPoolExecutor(6) as pool:
        assert all(
            pool.map(lambda job: read(caches[job[0] % 3], file_of(server, job[1])) == content(job[1]), enumerate(order))
        )
    stop.set()
    watcher.join()
    assert SIZE < max(most) <= bound
    assert len(stored(tmp_path / "cache")) <= 3


def test_a_damaged_entry_is_fetched_again(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path / "cache", patience=QUICK)
    for damage in (b"xxxx", None, b"cut"):
        cache.fetch(file_of(server, 0))
        place = tmp_path / "cache" / stored(tmp_path / "cache")[0]
        if damage is None:
            place.with_name(f"{place.name}.json").write_text("{")
        elif damage == b"cut":
            os.truncate(place, 100)
        else:
            with place.open("r+b") as file:
                file.seek(1000)
                file.write(damage)
        assert read(cache, file_of(server, 0)) == content(0)
        assert "is damaged, and fetched again" in caplog.text
        caplog.clear()
    assert server.sent["0.tar"] == 4 * SIZE


def test_an_entry_of_an_earlier_boot_is_checked_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, hashed = Cache(tmp_path / "cache", patience=QUICK), []
    cache.fetch(file_of(server, 0))
    real = cache_module._sha256
    monkeypatch.setattr(cache_module, "boot_id", lambda: "another")
    monkeypatch.setattr(cache_module, "_sha256", lambda path: (hashed.append(path), real(path))[1])
    for _ in range(3):
        assert read(cache, file_of(server, 0)) == content(0)
    assert len(hashed) == 1
    assert server.sent["0.tar"] == SIZE


def test_other_bytes_than_published_are_refused(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", patience=QUICK)
    server.etags = False
    (server.folder / "0.tar").write_bytes(content(1))
    with pytest.raises(FetchError, match=r"0\.tar has other bytes than it was published with"):
        cache.open(file_of(server, 0))
    assert stored(tmp_path / "cache") == []
    (server.folder / "0.tar").write_bytes(content(0) + b"more")
    with pytest.raises(ChangedError, match="600004 bytes and not 600000"):
        cache.open(file_of(server, 0))


def test_larger_than_the_cache_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", max_bytes=SIZE - 1, patience=QUICK)
    with pytest.raises(ValueError, match=r"0\.tar has 600\.0 kB and the cache at most 600\.0 kB; raise data\.cache"):
        cache.open(file_of(server, 0))
    assert server.sent["0.tar"] == 0


def test_a_full_disk_makes_room_or_says_so(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, real = Cache(tmp_path / "cache", patience=QUICK), os.pwrite
    cache.fetch(file_of(server, 0))
    full = [True]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset > SIZE // 2 and full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert read(cache, file_of(server, 1)) == content(1)
    assert stored(tmp_path / "cache") == [file_of(server, 1).sha256]
    full.extend([True] * 3)
    with pytest.raises(CacheFullError, match="the disk or quota is full"):
        read(cache, file_of(server, 2))
    assert full == [True]
    monkeypatch.setattr(CacheFolder, "_free", lambda self: 1000)
    with pytest.raises(CacheFullError, match=r"1\.0 kB free"):
        read(cache, file_of(server, 3))
    assert server.sent["3.tar"] == 0


FILL = """
import sys
from pathlib import Path
from data_pipelines.remote.cache import Cache
from data_pipelines.remote.fetch import Patience
from data_pipelines.remote.remote_files import FileState, RemoteFile
folder, url, size, sha256 = sys.argv[1:]
cache = Cache(Path(folder), patience=Patience(timeout_seconds=30))
print("begin", flush=True)
cache.fetch(RemoteFile(url, FileState(int(size)), sha256 or None))
print(cache.statistics.fetched_bytes, flush=True)
"""


def fill(server: Server, folder: Path, number: int) -> subprocess.Popen[str]:
    file = file_of(server, number)
    return subprocess.Popen(
        [sys.executable, "-c", FILL, str(folder), file.url, str(SIZE), file.sha256 or ""],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(cache_module.__file__).parents[3])},
    )


def test_killed_while_it_writes_another_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.faults["0.tar"].extend(["stall"])
    folder = tmp_path / "cache"
    with fill(server, folder, 0) as first:
        while not any(path.stat().st_size for path in folder.glob("*.part")):
            time.sleep(0.01)
        with fill(server, folder, 0) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "begin\n"
            time.sleep(0.3)
            assert second.poll() is None  # it waits for the first
            have = next(folder.glob("*.part")).stat().st_size
            first.send_signal(signal.SIGKILL)
            assert int(second.stdout.readline()) == SIZE - have
        assert second.returncode == 0
    assert stored(folder) == [file_of(server, 0).sha256]
    assert not list(folder.glob("*.part"))
    assert read(Cache(folder, patience=QUICK), file_of(server, 0)) == content(0)
    assert server.sent["0.tar"] == SIZE
    assert server.num_requests("0.tar") == 2


def test_a_part_of_an_earlier_boot_or_with_wrong_bytes_is_not_continued(server: Server, tmp_path: Path) -> None:
    cache, file = Cache(tmp_path / "cache", patience=QUICK), file_of(server, 0)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{file.sha256}.{SIZE}.before.part").write_bytes(bytes(SIZE // 2))
    assert read(cache, file) == content(0)
    assert server.sent["0.tar"] == SIZE
    cache.folder.part(str(file_of(server, 1).sha256), SIZE).write_bytes(bytes(1000))
    assert read(cache, file_of(server, 1)) == content(1)
    assert server.sent["1.tar"] == 2 * SIZE - 1000
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_folder_is_staged_the_same_way(tmp_path: Path) -> None:
    place = tmp_path / "slow.tar"
    place.write_bytes(content(0))
    cache = Cache(tmp_path / "cache", patience=QUICK)
    assert read(cache, RemoteFile(str(place))) == content(0)
    place.write_bytes(content(1))
    assert read(Cache(tmp_path / "cache"), RemoteFile(str(place))) == content(1)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_folder() == default_folder(stage=True) == Path(os.environ["SELFSIGHT_CACHE"]) / "shards"
    monkeypatch.delenv("SELFSIGHT_CACHE")
    assert default_folder() == Path.home() / ".cache/selfsight/shards"
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert default_folder(stage=True) == tmp_path / f"selfsight-{os.getuid()}" / "shards"
