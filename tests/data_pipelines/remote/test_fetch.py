"""Fetching from a real server that drops, stalls, refuses and changes its mind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest
from serving import SECRET, Server, serve

from data_pipelines.remote import fetch as fetch_module
from data_pipelines.remote.fetch import (
    CancelledError,
    FetchError,
    Patience,
    cancel_on,
    pieces,
    read_bytes,
    source_of,
    state,
)
from data_pipelines.remote.remote_files import ChangedError, FileState

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
QUICK = Patience(tries=4, timeout_seconds=0.5, backoff_seconds=0.001)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x.tar").write_bytes(CONTENT)
    with serve(tmp_path) as running:
        yield running


def test_a_file_comes_as_it_is_in_one_request(server: Server) -> None:
    assert read_bytes(f"{server.url}/set/x.tar", QUICK) == CONTENT
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["drop", "stall", "hang", "reset", "500", "503", "429", "long", "page"])
@pytest.mark.parametrize("ranges", [True, False])
def test_faults_are_survived(server: Server, fault: str, ranges: bool) -> None:
    server.faults["set/x.tar"].extend([fault])
    server.ranges = ranges
    known = state(f"{server.url}/set/x.tar", QUICK)
    assert known.size == len(CONTENT)
    content = bytearray()
    for offset, piece in pieces(f"{server.url}/set/x.tar", QUICK, known=known):
        del content[offset:]
        content += piece
    assert content == CONTENT
    if fault in ("drop", "stall") and ranges:  # what had come was not asked for again
        assert server.requests[-1][1] == f"bytes={len(CONTENT) // 2}-"
        assert server.sent["x.tar"] == len(CONTENT) + 1


def test_many_cuts_are_survived_as_long_as_it_goes_on(server: Server) -> None:
    server.faults["set/x.tar"].extend(["drop"] * 12)
    assert read_bytes(f"{server.url}/set/x.tar", QUICK) == CONTENT


def test_without_ranges_the_same_cut_again_and_again_comes_to_an_end(server: Server) -> None:
    server.ranges = False
    server.faults["set/x.tar"].extend(["drop"] * 100)
    with pytest.raises(FetchError, match=r"set/x\.tar could not be fetched: 4 tries in a row failed"):
        read_bytes(f"{server.url}/set/x.tar", QUICK)
    assert len(server.requests) == 4


def test_the_end_names_place_tries_and_reason(server: Server) -> None:
    server.faults["set/x.tar"].extend(["500"] * 100)
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+/set/x\.tar .* 4 tries .* 500 Internal Server Error"):
        read_bytes(f"{server.url}/set/x.tar", QUICK)
    assert len(server.requests) == 4
    server.close()
    with pytest.raises(FetchError, match="Connection refused"):
        read_bytes(f"{server.url}/set/x.tar", QUICK)


def test_what_does_not_exist_or_may_not_be_read_ends_at_once(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.tar does not exist"):
        read_bytes(f"{server.url}/set/none.tar", QUICK)
    server.faults["set/x.tar"].append("403")
    with pytest.raises(PermissionError, match=r"x\.tar may not be read .*netrc"):
        read_bytes(f"{server.url}/set/x.tar", QUICK)
    assert len(server.requests) == 2


def test_a_file_that_changes_while_it_is_read_is_noticed(server: Server) -> None:
    server.faults["set/x.tar"].append("grow")
    with pytest.raises(ChangedError, match=r"x\.tar changed while it was read.*3000004 bytes"):
        read_bytes(f"{server.url}/set/x.tar", QUICK)
    (server.folder / "set/x.tar").write_bytes(CONTENT)
    known = state(f"{server.url}/set/x.tar", QUICK)
    (server.folder / "set/x.tar").write_bytes(CONTENT[::-1])  # of the same size
    with pytest.raises(ChangedError, match="its version is"):
        list(pieces(f"{server.url}/set/x.tar", QUICK, known=known, start=1000))
    (server.folder / "set/x.tar").write_bytes(CONTENT[:900])  # what is there already is more than all
    with pytest.raises(ChangedError, match="it has 900 bytes"):
        list(pieces(f"{server.url}/set/x.tar", QUICK, known=known, start=1000))


def test_redirects_and_empty_files(server: Server) -> None:
    assert read_bytes(f"{server.url}/moved/set/x.tar", QUICK) == CONTENT
    (server.folder / "set/empty").touch()
    assert state(f"{server.url}/set/empty", QUICK).size == 0
    assert read_bytes(f"{server.url}/set/empty", QUICK) == b""


def test_user_and_password_are_used_and_never_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.protected = True
    with pytest.raises(PermissionError):
        read_bytes(f"{server.url}/set/x.tar", QUICK)
    secret = server.url.replace("http://", f"http://user:{SECRET}@")
    assert read_bytes(f"{secret}/set/x.tar", QUICK) == CONTENT
    (tmp_path / ".netrc").write_text(f"machine 127.0.0.1 login user password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_bytes(f"{server.url}/set/x.tar", QUICK) == CONTENT
    with pytest.raises(FileNotFoundError) as found:
        read_bytes(f"{secret}/set/none.tar?token={SECRET}", QUICK)
    assert SECRET not in str(found.value)
    assert "***@127.0.0.1" in str(found.value)


def test_waits_grow_and_are_drawn(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(fetch_module, "pause", lambda seconds: waits.append(seconds) if seconds else None)
    server.faults["set/x.tar"].extend(["500"] * 100)
    with pytest.raises(FetchError):
        read_bytes(f"{server.url}/set/x.tar", Patience(tries=12, backoff_seconds=1))
    assert len(waits) == 11
    for number, wait in enumerate(waits):
        assert min(60, 2**number) / 2 <= wait <= min(60, 2**number)
    assert len(set(waits)) == 11


@pytest.mark.parametrize("fault", ["500", "hang", "stall"])
def test_cancelled_at_once(server: Server, fault: str) -> None:
    """Whatever it waits for: the next try, the head of an answer, or the rest of its body."""
    server.faults["set/x.tar"].extend([fault] * 100)
    event, ends = threading.Event(), []

    def run() -> None:
        cancel_on(event)
        try:
            read_bytes(f"{server.url}/set/x.tar", Patience(tries=100, timeout_seconds=60, backoff_seconds=50))
        except CancelledError:
            ends.append(time.monotonic())

    thread = threading.Thread(target=run)
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    time.sleep(0.2)
    began = time.monotonic()
    event.set()
    thread.join(10)
    assert ends[0] - began < 2


def test_a_file_system_that_hangs_is_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, over, event, ends = fsspec.filesystem("memory"), threading.Event(), threading.Event(), []
    asked = threading.Event()
    monkeypatch.setattr(type(memory), "info", lambda *args, **kwargs: asked.set() or over.wait(20))

    def run() -> None:
        cancel_on(event)
        with suppress(CancelledError):
            state("memory://set/x.tar", Patience(timeout_seconds=60))
        ends.append(time.monotonic())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert asked.wait(10)
        began = time.monotonic()
        event.set()
        thread.join(10)
        assert ends[0] - began < 2
    finally:
        over.set()


def test_other_file_systems() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/x.tar", CONTENT)
    try:
        found = state("memory://set/x.tar", QUICK)
        assert found.size == len(CONTENT)
        assert found.version
        assert read_bytes("memory://set/x.tar", QUICK) == CONTENT
        assert b"".join(piece for _, piece in pieces("memory://set/x.tar", QUICK, start=7)) == CONTENT[7:]
        with pytest.raises(FileNotFoundError, match=r"memory://set/none\.tar does not exist"):
            read_bytes("memory://set/none.tar", QUICK)
        memory.pipe_file("/set/x.tar", CONTENT[:-1])
        with pytest.raises(ChangedError):
            list(pieces("memory://set/x.tar", QUICK, known=found))
    finally:
        memory.rm("/set", recursive=True)
    with pytest.raises(ValueError, match="nowhere:// is no known kind of place"):
        source_of("nowhere://x", 1)


def test_a_file_system_that_stalls_or_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/x.tar", CONTENT)
    real, calls = type(memory)._open, []
    over = threading.Event()

    def open_(self: object, *args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 1:
            over.wait(10)
        if len(calls) == 2:
            raise TimeoutError("slow down")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(memory), "_open", open_)
    try:
        assert read_bytes("memory://set/x.tar", QUICK) == CONTENT
        assert len(calls) == 3
    finally:
        over.set()
        memory.rm("/set", recursive=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"s3://bucket/x\.tar: .* pip install '.\[s3\]'"):
        source_of("s3://bucket/x.tar", 1)


def test_a_local_file_is_copied_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(CONTENT)
    assert read_bytes(str(tmp_path / "x.tar"), QUICK) == CONTENT
    with pytest.raises(ChangedError):
        list(pieces(str(tmp_path / "x.tar"), QUICK, known=FileState(len(CONTENT) + 1)))
