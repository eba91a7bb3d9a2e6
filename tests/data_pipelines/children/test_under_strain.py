"""Processes that make batches, where something around them is not as it mostly is."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
from pathlib import Path

import pytest
from loading import assert_same, copied, is_running, loader_of, wait_for

from data_pipelines.children.nursery import nursery
from data_pipelines.children.wire import Channel, raised, told
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.rng import NamedDraw


def test_a_long_environment_does_not_mix_up_what_they_are_given(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As modules of clusters leave it: a message is then sent in pieces, and the files of two messages come at once."""
    for number in range(3):
        monkeypatch.setenv(f"LONG_{number}", "x" * 60_000)
    with loader_of(dataset, 0) as threads, loader_of(dataset, 4) as children:
        assert_same(copied(children.steps(), 3), copied(threads.steps(), 3))


@pytest.mark.parametrize(("batch_size", "world_size", "repeats"), [(12, 2, 4), (8, 8, 4), (12, 4, 2)])
def test_rows_of_a_rank_that_hold_no_whole_number_of_repeats(
    dataset: Dataset, batch_size: int, world_size: int, repeats: int
) -> None:
    options = {"batch_size": batch_size, "repeats": repeats, "world_size": world_size}
    for rank in (0, world_size - 1):
        with (
            loader_of(dataset, 0, rank=rank, **options) as threads,
            loader_of(dataset, 2, rank=rank, **options) as children,
        ):
            assert_same(copied(children.steps(), 3), copied(threads.steps(), 3))


def test_a_working_folder_that_was_removed(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    nursery().close()  # so that another one has to start here
    with loader_of(dataset, 0) as threads, loader_of(dataset, 2) as children:
        assert_same(copied(children.steps(), 3), copied(threads.steps(), 3))


def test_their_nursery_may_be_killed_as_well(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with loader_of(dataset, 0) as threads, loader_of(dataset, 2) as children:
        expected, steps = copied(threads.steps(), 9), children.steps()
        found = copied(steps, 3)
        os.kill(nursery()._process.pid, signal.SIGKILL)
        os.kill(children.child_processes[0], signal.SIGKILL)
        found += copied(steps, 6)
        assert_same(found, expected)
        pids = children.child_processes
    (line,) = [record.getMessage() for record in caplog.records if "another takes its place" in record.getMessage()]
    assert line.startswith("a process that makes batches is gone, and so is the process that started it")
    wait_for(lambda: not any(map(is_running, pids)))


def test_memory_that_is_too_small_is_told_before_anyone_writes(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, num_bytes: int) -> None:
        assert os.fstat(descriptor).st_size == 0
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with loader_of(dataset) as loader, pytest.raises(OSError, match=r"no room for 0.0 MB.*data.workers=0"):
        next(loader.steps())


def test_where_none_can_take_the_place_of_a_dead_one_the_next_iterator_tries_again(dataset: Dataset) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with loader_of(dataset, 0) as threads, loader_of(dataset, 2) as children:
        expected, steps = copied(threads.steps(), 3), children.steps()
        next(steps)
        before = children.child_processes
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: not is_running(before[0]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                copied(steps, 5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert_same(copied(children.steps(), 3), expected)


def test_a_closed_loader_says_so(dataset: Dataset) -> None:
    with loader_of(dataset) as loader:
        pass
    with pytest.raises(RuntimeError, match="the loader is closed; make another one"):
        next(loader.steps())


def test_files_wait_until_those_of_others_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system passes a user no more at once than one process may have open; root is not held to that."""
    send, refused = socket.send_fds, [True, True]

    def crowded(*arguments: object) -> int:
        if refused:
            refused.pop()
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return send(*arguments)

    monkeypatch.setattr(socket, "send_fds", crowded)
    ours, theirs = socket.socketpair()
    with theirs, Path(os.devnull).open() as file:
        one, other = Channel(ours), Channel(theirs)
        one.send({"take": 1}, [file.fileno()])
        assert list(other.receive()) == [{"take": 1}]
        assert len(other.files) == 1
        one.close()
        other.close()


def test_a_group_of_exceptions_keeps_its_words() -> None:
    found = raised(told(ExceptionGroup("of two reads", [ValueError("one")])))
    assert type(found) is RuntimeError
    assert "of two reads" in str(found)


def test_a_line_for_the_log_that_cannot_be_formatted_ends_nobody(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        loader_of(dataset, draw=NamedDraw("drawing:WarningOfNothing", None)) as loader,
    ):
        copied(loader.steps(), 2)
    assert any("%d things ('none',)" in record.getMessage() for record in caplog.records)
