"""Processes that make batches: as threads would, and gone when they should be."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawing import dies, heavy
from loading import assert_same, copied, is_running, loader_of, wait_for
from making import sample_files, write_tar

from data_pipelines.children.parent import ChildDiedError, ChildTraceError
from data_pipelines.children.wire import Channel, raised, told
from data_pipelines.datasets.bad_samples import BadSampleLog, TooManyBadSamplesError
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.rng import NamedDraw
from data_pipelines.shards.shard import ShardChangedError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("workers", [1, 3])
def test_they_make_what_threads_make(dataset: Dataset, workers: int) -> None:
    with loader_of(dataset, 0) as threads, loader_of(dataset, workers) as children:
        assert_same(copied(children.steps(), 8), copied(threads.steps(), 8))
        assert_same(copied(children.steps(5), 2), copied(threads.steps(5), 2))  # another iterator, the same children
        assert torch.equal(children.rows(3, range(4, 6))["ids"], threads.rows(3, range(4, 6))["ids"])


def test_they_import_no_torch(dataset: Dataset) -> None:
    with loader_of(dataset, draw=heavy) as loader:
        assert not next(loader.steps())[0]["heavy"].any()


def test_one_that_is_killed_is_replaced_and_the_bytes_stay(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with loader_of(dataset, 0) as threads, loader_of(dataset, 2) as children:
        expected, steps = copied(threads.steps(), 9), children.steps()
        found = copied(steps, 3)
        before = children.child_processes
        os.kill(before[0], signal.SIGKILL)
        found += copied(steps, 6)
        assert_same(found, expected)
        assert children.child_processes[0] != before[0]
        assert children.child_processes[1] == before[1]
    lines = [record.getMessage() for record in caplog.records if "another takes its place" in record.getMessage()]
    assert len(lines) == 1
    assert "SIGKILL" in lines[0]


def test_one_that_dies_again_and_again_ends_the_run(dataset: Dataset) -> None:
    with loader_of(dataset, draw=dies) as loader:
        steps = loader.steps()
        next(steps), next(steps)
        with pytest.raises(ChildDiedError, match=r"4 times in a row while it made step 2.*SIGKILL.*data.workers=0"):
            next(steps)
        with pytest.raises(StopIteration):
            next(steps)
        assert next(loader.steps(3)) is not None  # another iterator starts it anew


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"workers": 2, "threads": 1}, "2 processes x 1 thread"),
        ({"workers": 40, "threads": 3}, "10 processes x 3 threads (40 for 10 rows)"),
        ({"workers": 0, "threads": 1}, "1 thread"),
    ],
)
def test_how_many_there_are_is_told(dataset: Dataset, options: dict[str, int], told: str) -> None:
    with loader_of(dataset, **options) as loader:
        assert loader.makers == told


def test_signals_to_the_whole_group_are_not_for_them(dataset: Dataset) -> None:
    with loader_of(dataset) as loader:
        steps = loader.steps()
        next(steps)
        before = loader.child_processes
        for pid in before:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(pid, number)
        copied(steps, 5)
        assert loader.child_processes == before
        assert len(before) == 2


def test_none_is_left_when_the_loader_closes(dataset: Dataset) -> None:
    loader = loader_of(dataset)
    steps = loader.steps()
    next(steps)
    pids = loader.child_processes
    assert len(pids) == 2
    loader.close()
    assert not any(map(is_running, pids))
    with pytest.raises(RuntimeError, match="the loader is closed"):
        list(itertools.islice(steps, 5))


def test_none_outlives_its_parent(shards: Path) -> None:
    code = (
        "import sys, time\n"
        "from data_pipelines.children.nursery import nursery\n"
        "from data_pipelines.datasets.dataset import open_dataset\n"
        "from loading import loader_of\n"
        "loader = loader_of(open_dataset(sys.argv[1]))\n"
        "steps = loader.steps()\n"
        "next(steps)\n"
        "print(nursery()._process.pid, *loader.child_processes, flush=True)\n"
        "time.sleep(60)\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, here, here.parent)))}
    files = set(Path("/dev/shm").iterdir())
    with subprocess.Popen(
        [sys.executable, "-c", code, str(shards)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_running, pids))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(map(is_running, pids)))
    assert not [file for file in set(Path("/dev/shm").iterdir()) - files if "selfsight" in file.name]


def test_on_older_systems_they_look_for_their_parent(tmp_path: Path) -> None:
    """Its end of the socket stays open here, so that nothing but its death tells of it."""
    ours, theirs = socket.socketpair()
    nursery = (
        f"import os\ndel os.pidfd_open\nfrom data_pipelines.children.nursery import main; main({theirs.fileno()}, 0)"
    )
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {nursery!r}], pass_fds=[{theirs.fileno()}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (
        ours,
        theirs,
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            pass_fds=[theirs.fileno()],
        ) as process,
    ):
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        channel = Channel(ours)
        channel.send({"ended": 1})
        assert next(iter(channel.receive())) == {"ended": 1, "status": None}
        process.kill()
        wait_for(lambda: not is_running(pid))


def test_on_older_systems_memory_has_no_name_either(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with loader_of(dataset, 0) as threads, loader_of(dataset, 2) as children:
        expected, steps = copied(threads.steps(), 3), children.steps()
        found = copied(steps, 3)
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
        assert any(line.endswith("(deleted)") for line in mapped)
    assert_same(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_from_their_memory_without_a_wait(dataset: Dataset) -> None:
    with loader_of(dataset, 0) as threads, loader_of(dataset, 2, pin_memory=True) as children:
        expected, found = copied(threads.steps(), 8), []
        for (batch,) in itertools.islice(children.steps(), 8):
            assert batch["global_crops"].is_pinned()
            found.append({name: part.to("cuda", non_blocking=True) for name, part in batch.items()})
        torch.cuda.synchronize()
    assert_same([{name: part.cpu() for name, part in batch.items()} for batch in found], expected)


@pytest.mark.parametrize(("what", "words"), [("mask", "step 2 cannot be made: the mask is gone"), ("disk", "shards")])
def test_an_error_comes_where_its_step_does(dataset: Dataset, what: str, words: str) -> None:
    with loader_of(dataset, draw=NamedDraw("drawing:Failing", {"what": what})) as loader:
        steps = loader.steps()
        next(steps), next(steps)
        with pytest.raises(OSError, match=words) as caught:
            next(steps)
        assert caught.value.errno == (5 if what == "disk" else None)
        assert isinstance(caught.value.__cause__, ChildTraceError)
        with pytest.raises(StopIteration):
            next(steps)


def test_errors_keep_their_type_and_their_words() -> None:
    for error in (
        ShardChangedError(Path("a.tar"), "has shrunk"),
        TooManyBadSamplesError("too many"),
        FileNotFoundError(2, "No such file", "a.tar"),
        KeyError("name"),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"a", 0, 1, "why"),
    ):
        found = raised(told(error))
        assert str(error) in str(found) or type(error) is UnicodeDecodeError
        assert type(found) is type(error) or type(error) is UnicodeDecodeError
    other = raised({**told(ValueError("x")), "kind": "os:system"})
    assert type(other) is RuntimeError


def bad_shards(folder: Path, bad: set[int]) -> Path:
    files = sample_files(range(40))
    write_tar(
        folder / "train-000000.tar", [(n, c[:60] if n.endswith("png") and int(n[:6]) in bad else c) for n, c in files]
    )
    return folder


def test_bad_samples_have_one_account(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logs = [BadSampleLog(tmp_path / f"{name}.jsonl") for name in ("threads", "children")]
    with open_dataset(bad_shards(tmp_path, {7, 8, 39})) as dataset:
        for workers, log in zip((0, 3), logs, strict=True):
            caplog.clear()
            with loader_of(dataset, workers, batch_size=40, max_bad_share=0.5, bad_samples=log, prefetch=1) as loader:
                steps = loader.steps()
                copied(steps, 3)
                wait_for(lambda: loader.ready)
                assert loader.num_bad == 16  # 4 reads a pass, one pass ahead
                steps.close()
            assert sum("000007" in record.getMessage() for record in caplog.records) == 1
    lines = [sorted(log.path.read_text().splitlines()) for log in logs]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    told_by = []
    for workers in (0, 2):
        with (
            open_dataset(bad_shards(tmp_path, {1, 5, 9, 13})) as dataset,
            loader_of(dataset, workers, batch_size=40, max_bad_share=0.05) as loader,
            pytest.raises(TooManyBadSamplesError, match=r"(?s)share of 0.05.*0000.*selfsight verify") as caught,
        ):
            next(loader.steps())
        told_by.append(str(caught.value).splitlines()[-1])
    assert told_by[0] == told_by[1]


def test_a_shard_that_shrank_is_told_by_name(tmp_path: Path) -> None:
    with open_dataset(bad_shards(tmp_path, set())) as dataset:
        shard = tmp_path / "train-000000.tar"
        os.truncate(shard, shard.stat().st_size // 2)
        with loader_of(dataset, batch_size=40) as loader, pytest.raises(ShardChangedError, match="has shrunk since"):
            next(loader.steps())


def test_what_they_fetch_is_counted(shards: Path) -> None:
    with open_dataset(shards, stage=True) as dataset, loader_of(dataset) as loader:
        copied(loader.steps(), 4)
        found = loader.fetch_metrics()
        assert found["fetch/gigabytes"] > 0
        assert found["fetch/hits"] + found["fetch/misses"] > 0


def test_ready_says_whether_the_next_step_is_there(dataset: Dataset, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with loader_of(dataset, draw=NamedDraw("drawing:Gated", str(gate))) as loader:
        assert not loader.ready
        steps = loader.steps()
        next(steps)
        assert not loader.ready
        gate.touch()
        wait_for(lambda: loader.ready)


def test_what_only_this_process_knows_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="this process only"):
        loader_of(dataset, draw=lambda *place: {})


def test_there_are_no_more_of_them_than_rows(dataset: Dataset) -> None:
    with loader_of(dataset, 5, batch_size=2) as loader, loader_of(dataset, 0, batch_size=2) as threads:
        assert_same(copied(loader.steps(), 3), copied(threads.steps(), 3))
        assert len(loader.child_processes) == 2


def test_their_warnings_reach_the_log_of_the_parent(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), loader_of(dataset, draw=NamedDraw("drawing:Warning", None)) as loader:
        copied(loader.steps(), 2)
    assert sum("mind the gap" in record.getMessage() for record in caplog.records) == 1
