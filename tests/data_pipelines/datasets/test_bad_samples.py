"""What takes a bad sample's place, how it is told, and when a run ends; file systems that fail for a moment."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from making import encode, picture, tiff, write_tar

from data_pipelines import retry
from data_pipelines.datasets import account
from data_pipelines.datasets.bad_samples import BadSampleLog, Decoder, TooManyBadSamplesError, check_losses
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.shards.shard import ShardChangedError

GOOD = encode(picture(0))


def make(folder: Path, *shards: str) -> Dataset:
    """A shard a string: `.` a good sample, `x` a bad one; the keys are numbered through."""
    number = 0
    folder.mkdir(exist_ok=True)
    for place, letters in enumerate(shards):
        files = []
        for letter in letters:
            files.append((f"{number:04d}.png", GOOD if letter == "." else b""))
            number += 1
        write_tar(folder / f"train-{place:06d}.tar", files)
    return open_dataset(folder)


def slow_neighbours(sizes: list[int], sample: int) -> list[int]:
    """The sample's shard read around from it, then all later shards, then all earlier ones; the first 16."""
    shards, first = [], 0
    for size in sizes:
        shards.append(list(range(first, first + size)))
        first += size
    own = next(place for place, shard in enumerate(shards) if sample in shard)
    place = shards[own].index(sample)
    order = shards[own][place:] + shards[own][:place]
    for other in shards[own + 1 :] + shards[:own]:
        order += other
    return order[:16]


@pytest.mark.parametrize("sizes", [[1], [5], [3, 1, 4], [20, 2, 30], [16, 16], [1] * 20])
def test_neighbours_stay_in_the_shard_as_long_as_they_can(tmp_path: Path, sizes: list[int]) -> None:
    with make(tmp_path, *("." * size for size in sizes)) as dataset:
        decoder = Decoder(dataset)
        for sample in range(sum(sizes)):
            assert list(decoder.neighbours(sample)) == slow_neighbours(sizes, sample)


def test_the_same_neighbour_whoever_asks_and_how_often(tmp_path: Path) -> None:
    with make(tmp_path, "x.xx", "xx", ".") as dataset:
        for _ in range(2):
            decoder = Decoder(dataset, max_bad_share=1.0)
            assert [decoder.read(sample).sample for sample in range(7)] == [1, 1, 1, 1, 6, 6, 6]


def test_a_row_of_bad_ones_ends_the_run_with_their_names(tmp_path: Path) -> None:
    with make(tmp_path / "some", "x" * 16 + "." * 4) as dataset:
        decoder = Decoder(dataset, max_bad_share=1.0)
        assert decoder.read(1).sample == 16
        with pytest.raises(TooManyBadSamplesError, match=r"(?s)16 samples in a row.*0000 of.*0004 of.*and 11 more"):
            decoder.read(0)
    with (
        make(tmp_path / "all", "xx", "x") as dataset,
        pytest.raises(TooManyBadSamplesError, match="3 samples in a row"),
    ):
        Decoder(dataset, max_bad_share=1.0).read(1)


def test_the_file_names_each_once_over_all_starts(tmp_path: Path) -> None:
    log = tmp_path / "run" / "bad_samples" / "rank-00000.jsonl"
    with make(tmp_path / "data", "x.x.") as dataset:
        for start in range(3):
            decoder = Decoder(dataset, max_bad_share=1.0, log=BadSampleLog(log))
            assert log.exists() == (start > 0), "made with the first bad sample"
            for _ in range(2):
                assert [decoder.read(sample).sample for sample in range(4)] == [1, 1, 3, 3]
            assert (decoder.num_bad, decoder.num_reads) == (4, 12)
            if start == 0:  # killed while it wrote
                log.write_text(log.read_text()[:-10])
    shard = str(tmp_path / "data" / "train-000000.tar")
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    entries = [json.loads(line) for line in (lines[0], lines[2])]
    assert entries == [
        {"key": key, "shard": shard, "case": "empty_image", "reason": "a file of no bytes", "instead": instead}
        for key, instead in (("0000", "0001"), ("0002", "0003"))
    ]


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with make(tmp_path, "x.") as dataset:
        decoder = Decoder(dataset, max_bad_share=1.0, log=BadSampleLog(tmp_path / "file" / "log.jsonl"))
        assert decoder.read(0).sample == 1
    assert "cannot be written" in caplog.text


def test_however_many_there_are_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(account, "_MAX_NAMED", 3)
    log = tmp_path / "log.jsonl"
    with make(tmp_path, "x." * 10) as dataset:
        decoder = Decoder(dataset, max_bad_share=1.0, log=BadSampleLog(log))
        for sample in range(20):
            decoder.read(sample)
        assert decoder.num_bad == 10
    assert len(log.read_text().splitlines()) == 3
    assert len(caplog.records) == 4
    assert caplog.records[-1].getMessage().endswith("further ones are counted only")


def test_what_is_logged_holds_no_control_letters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "train-000000.tar", [("\x1b[31m\n.png", b""), ("\x1b[0m.png", GOOD)])
    log = BadSampleLog(tmp_path / "log.jsonl")
    with open_dataset(tmp_path) as dataset:
        assert Decoder(dataset, max_bad_share=1.0, log=log).read(0).sample == 1
        with pytest.raises(TooManyBadSamplesError) as raised:
            Decoder(dataset, max_bad_share=0.1).read(0)
    told = str(raised.value) + caplog.text + log.path.read_text()
    assert all(letter.isprintable() for letter in told.replace("\n", ""))
    assert r"\x1b[31m\n" in told


def test_what_is_used_otherwise_than_meant_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    infrared = tiff(np.full((9, 9, 4), 100, np.uint8), photometric="rgb")
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.tif", infrared) for n in range(3)])
    with open_dataset(tmp_path) as dataset:
        decoder = Decoder(dataset)
        for _ in range(2):
            assert [decoder.read(sample).sample for sample in range(3)] == [0, 1, 2]
        (told,) = [record.getMessage() for record in caplog.records]
        assert told.startswith(f"sample 0 of {tmp_path}/train-000000.tar: an opacity that is neither nothing nor full")
        caplog.clear()
        Decoder(dataset, channels=4).read(0)
        assert not caplog.records


class FailingReads:
    """`os.pread` that fails some times before it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, times: int) -> None:
        self.real, self.number, self.times, self.descriptors = os.pread, number, times, set[int]()
        self.pauses: list[float] = []
        monkeypatch.setattr(os, "pread", self)
        monkeypatch.setattr(retry.time, "sleep", self.pauses.append)

    def __call__(self, descriptor: int, size: int, offset: int) -> bytes:
        if self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.real(descriptor, size, offset)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_file_system_that_fails_for_a_moment_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with make(tmp_path, "...") as dataset:
        reads = FailingReads(monkeypatch, number, 3)
        decoder = Decoder(dataset)
        assert decoder.read(1).sample == 1
        assert (decoder.num_bad, reads.pauses) == (0, [0.1, 1.0, 5.0])
        assert caplog.text.count("trying again") == 3


def test_a_file_system_that_goes_on_failing_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path, "...") as dataset:
        reads = FailingReads(monkeypatch, errno.EIO, 5)
        decoder = Decoder(dataset)
        with pytest.raises(OSError, match=r"tried 5 times.*train-000000\.tar"):
            decoder.read(1)
        assert decoder.num_bad == 0
        reads.times, reads.number = 1, errno.EACCES
        with pytest.raises(PermissionError, match=r"train-000000\.tar"):
            decoder.read(1)
        assert len(reads.pauses) == 4


def test_a_shard_that_changes_under_a_run_is_told_as_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), make(tmp_path, "....") as dataset:
        decoder = Decoder(dataset)
        shard = tmp_path / "train-000000.tar"
        content = shard.read_bytes()
        assert decoder.read(3).sample == 3
        with shard.open("r+b") as file:  # in place: the same file, written to
            file.truncate(3000)
        with pytest.raises(ShardChangedError, match=r"train-000000\.tar has shrunk since it was indexed"):
            decoder.read(3)
        with shard.open("r+b") as file:
            file.write(bytes(len(content)))
        with pytest.raises(ShardChangedError, match="has changed"):
            decoder.read(3)
        assert decoder.num_bad == 0
        assert not caplog.records


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    with make(tmp_path, "..") as dataset:
        (tmp_path / "train-000000.tar").unlink()
        with pytest.raises(FileNotFoundError, match=r"train-000000\.tar"):
            Decoder(dataset).read(0)


def test_damaged_shards_that_lost_too_much_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "." * 10, "." * 10, "." * 10).close()
    (tmp_path / "train-000001.tar").write_bytes(b"<html>404 not found</html>")
    with open_dataset(tmp_path) as dataset:
        check_losses(dataset, 0.34)
        with pytest.raises(
            TooManyBadSamplesError, match=r"1 of 3 shards are damaged .* about 10 of 30 samples.*train-000001\.tar"
        ):
            check_losses(dataset, 0.3)
    last = tmp_path / "train-000002.tar"
    last.write_bytes(last.read_bytes()[:2000])
    with open_dataset(tmp_path) as dataset:  # of the cut one nobody knows what it held
        check_losses(dataset, 0.5)
    entries = [{"name": f"train-00000{number}.tar", "samples": 10} for number in range(3)]
    (tmp_path / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": entries}}}))
    with open_dataset(tmp_path) as dataset, pytest.raises(TooManyBadSamplesError, match="about 19 of 30 samples"):
        check_losses(dataset, 0.5)
