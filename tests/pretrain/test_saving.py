"""Saving while training goes on, and what happens when it is killed, the disk is full or the file system fails."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prefork import OF_THIS_CHECKOUT, run_ranks
from saving import POINTS, Engine, begin, save_step
from tiny import config_data

from data_pipelines import retry
from pretrain.checkpoints import folder as folders
from pretrain.checkpoints.folder import CheckpointFolder, Written, damage, read_state
from pretrain.checkpoints.pieces import HostCopy, Pieces
from pretrain.checkpoints.saving import BUSY, FAILED, FINISHED, WRITTEN, NotSavedError
from pretrain.config import CheckpointConfig
from pretrain.config.load import parse_config
from pretrain.survival.history import read_history
from pretrain.survival.stopping import EXIT_NOT_SAVED

HERE = Path(__file__).parent


def weight_of(path: Path) -> torch.Tensor:
    with Pieces(path.glob("piece-*")) as pieces:
        return pieces.whole("weight")


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def test_a_save_holds_the_step_it_was_asked_for_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = HostCopy.write
    monkeypatch.setattr(HostCopy, "write", lambda self, path: go_on.wait(60) and write(self, path))
    saver, engine = begin(tmp_path), Engine()
    save_step(saver, engine, wait=False)
    then = engine.module.weight.detach().clone()
    assert saver.status == BUSY
    saver.hear([saver.status])
    engine.step()
    assert saver.last is None
    assert not saver.folder.all()
    go_on.set()
    saver.settle()
    assert saver.last == saver.folder.path(1)
    assert damage(saver.last, contents=True) is None
    assert not torch.equal(then, engine.module.weight)
    assert torch.equal(weight_of(saver.last), then)
    exported = (saver.last / "encoder" / "model.safetensors").read_bytes()
    assert then.numpy().tobytes() in exported
    other = Engine()
    saver.restore(other, saver.last, read_state(saver.last))
    other.step()
    assert torch.equal(other.module.weight, engine.module.weight)


def test_a_second_save_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver, engine = begin(tmp_path), Engine()
    for _ in range(3):
        save_step(saver, engine, wait=False)
    saver.settle()
    assert [path.name for path in saver.folder.all()] == ["step-00000002", "step-00000003"]
    assert "waiting for the checkpoint of step 2" in capsys.readouterr().out
    assert (saver.folder.folder / "latest").read_text() == "step-00000003\n"


def test_a_blocking_save_is_there_when_it_returns(tmp_path: Path) -> None:
    saver = begin(tmp_path, asynchronous=False)
    save_step(saver, Engine(), wait=False)
    assert saver.last == saver.folder.path(1)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_saving_nothing_is_lost(tmp_path: Path, point: str) -> None:
    """The third save is killed: the second is there, or the third; the next start tidies up and saves on."""
    killed = run_ranks("saving.py", [str(tmp_path), point], [{}], [tmp_path / "log"])
    assert killed == [-signal.SIGKILL]
    saver, engine = begin(tmp_path), Engine()
    last, passed_over = saver.folder.last()
    assert last is not None
    assert not passed_over
    assert read_state(last).step == (3 if point in ("before old ones go", "while they go") else 2)
    saver.folder.tidy()
    assert not [name for name in names(saver.folder) if name.startswith(".")]
    saver.restore(engine, last, read_state(last))
    reference = Engine()
    for _ in range(read_state(last).step):
        reference.step()
    assert torch.equal(engine.module.weight, reference.module.weight)
    save_step(saver, engine)
    assert [path.name for path in saver.folder.all()][-1] == f"step-{engine.global_steps:08d}"
    assert len(saver.folder.all()) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB: two checkpoints and an export fit, three do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_leaves_the_checkpoints_before(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver, engine = begin(small_disk), Engine()
    for _ in range(2):
        save_step(saver, engine)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 16384))
    save_step(saver, engine)
    assert names(saver.folder) == ["latest", "step-00000001", "step-00000002"]
    assert saver.last == saver.folder.path(2)
    assert damage(saver.last, contents=True) is None
    told = capsys.readouterr().out
    assert "CHECKPOINT NOT SAVED: step 3: [Errno 28] No space left on device" in told
    assert f"stays: {saver.last}" in told
    (event,) = read_history(small_disk)
    assert (event["event"], event["step"], event["ranks"]) == ("saved_not", 3, [0])
    ballast.unlink()
    save_step(saver, engine)
    assert saver.last == saver.folder.path(4)


def test_a_rank_that_fails_is_heard_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of one process; the second one's disk is full."""
    savers = [begin(tmp_path, on_failure=choice) for choice in ("continue", "stop")]
    write = HostCopy.write

    def full_for_the_second(self: HostCopy, path: Path) -> Written:
        if path.name.startswith("piece-00001") and "1.tmp" in path.parent.name:
            path.write_bytes(b"half")
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return write(self, path)

    monkeypatch.setattr(HostCopy, "write", full_for_the_second)
    for rank, saver in enumerate(savers):
        saver.rank, saver.world_size = rank, 2
        save_step(saver, Engine(), wait=False)
    for saver in savers:
        saver._thread.join()
    statuses = [saver.status for saver in savers]
    assert statuses == [WRITTEN, FAILED]
    savers[0].hear([WRITTEN, BUSY])  # not before all have ended
    assert names(savers[0].folder) == [".step-00000001.tmp"]
    savers[0].hear(statuses)
    with pytest.raises(NotSavedError, match="step 1 could not be written; there is no checkpoint before it"):
        savers[1].hear(statuses)
    assert names(savers[0].folder) == []
    assert [event["ranks"] for event in read_history(tmp_path)] == [[1]]
    engine = Engine()
    engine.step()
    for saver in savers:
        save_step(saver, engine, wait=False)
        engine.global_steps = 1
    for saver in savers:
        saver._thread.join()
    for saver in savers:
        saver.hear([WRITTEN, WRITTEN])
    savers[0]._thread.join()
    assert savers[0].status == FINISHED
    for saver in savers:
        saver.hear([FINISHED, WRITTEN])
        assert saver.last == saver.folder.path(2)
    assert set(json.loads((savers[0].folder.path(2) / "state.json").read_text())["files"]) == {
        "piece-00000-of-00002.safetensors", "piece-00001-of-00002.safetensors", "encoder/model.safetensors"
    }  # fmt: skip


def test_a_file_system_that_fails_for_a_moment_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    fsync, failures = os.fsync, [errno.EIO, errno.ESTALE]

    def failing(descriptor: int) -> None:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    saver = begin(tmp_path)
    save_step(saver, Engine())
    assert pauses == [0.1, 1.0]
    assert saver.last is not None
    assert damage(saver.last, contents=True) is None
    failures += [errno.EIO] * 5
    engine = Engine()
    engine.step()
    save_step(saver, engine)
    assert saver.last == saver.folder.path(1)
    assert "tried 5 times" in read_history(tmp_path)[0]["reason"]


def test_an_error_that_is_not_the_disk_s_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostCopy, "write", lambda self, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_step(begin(tmp_path), Engine())


@pytest.mark.parametrize("harm", ["a missing piece", "a cut piece", "a flipped bit", "no state"])
def test_what_is_damaged_is_passed_over_for_the_one_before(tmp_path: Path, harm: str) -> None:
    saver, engine = begin(tmp_path), Engine()
    for _ in range(2):
        save_step(saver, engine)
    file = next(saver.folder.path(2).glob("piece-*"))
    content = bytearray(file.read_bytes())
    if harm == "a missing piece":
        file.unlink()
    elif harm == "a cut piece":
        file.write_bytes(content[:-100])
    elif harm == "a flipped bit":
        content[-100] ^= 4
        file.write_bytes(content)
    else:
        (saver.folder.path(2) / "state.json").unlink()
    last, (line,) = saver.folder.last()
    assert last == saver.folder.path(1)
    assert f"{saver.folder.path(2)} is damaged (" in line


def test_too_little_room_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = begin(tmp_path)
    saver.check_room(Engine())
    assert not capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 40_000})())
    saver.check_room(Engine())
    assert "WARNING: a checkpoint takes about 0.00 GB" in capsys.readouterr().out


def test_a_run_that_is_to_stop_ends_with_88(shards: Path, tmp_path: Path) -> None:
    """No file may grow beyond 100 KB: a checkpoint of this run is larger."""
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 500})
    data["checkpoint"] = {"every_steps": 2, "on_failure": "stop"}
    (tmp_path / "preset.yaml").write_text(json.dumps(data))
    ended = subprocess.run(
        [sys.executable, "-m", "pretrain", str(tmp_path / "preset.yaml")],
        env=OF_THIS_CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert ended.returncode == EXIT_NOT_SAVED, ended.stdout
    assert "CHECKPOINT NOT SAVED: step 2: [Errno 27] File too large" in ended.stdout
    assert "saved_not" in [event["event"] for event in read_history(tmp_path / "mae-vit")]
    assert not CheckpointFolder(tmp_path / "mae-vit", CheckpointConfig()).all()


@pytest.mark.parametrize(
    ("deepspeed", "told"),
    [
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "taken of what lies in memory"),
        ({"zero_optimization": {"mics_shard_size": 2}}, "in a way that checkpoints do not know"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer=false"),
    ],
)
def test_what_no_checkpoint_can_be_taken_of_is_refused(
    mae_data: dict[str, Any], deepspeed: dict[str, Any], told: str
) -> None:
    mae_data["engine"]["deepspeed"] = deepspeed
    with pytest.raises(ValueError, match=told):
        parse_config(mae_data)


def failing_once(monkeypatch: pytest.MonkeyPatch, name: str, number: int = errno.EIO, times: int = 1) -> None:
    """The file system fails at reading the text of a file whose path ends so, this often."""
    read_text, left = Path.read_text, [number] * times

    def read(self: Path, *given: Any, **named: Any) -> str:
        if str(self).endswith(name) and left:
            raise OSError(left[0], os.strerror(left.pop()), str(self))
        return read_text(self, *given, **named)

    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "read_text", read)


@pytest.mark.parametrize(("times", "kept"), [(1, 1), (5, 2)])
def test_a_checkpoint_that_can_t_be_read_for_a_moment_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, kept: int
) -> None:
    """It is neither removed nor passed over; one that stays unreadable is left alone."""
    saver, engine = begin(tmp_path, keep_last=2), Engine()
    for _ in range(2):
        save_step(saver, engine)
    failing_once(monkeypatch, "step-00000002/state.json", times=times)
    save_step(saver, engine)
    assert [path.name for path in saver.folder.all()][-2:] == ["step-00000002", "step-00000003"]
    assert len(saver.folder.all()) == 1 + kept  # one that does not count does not push another out
    failing_once(monkeypatch, "step-00000003/state.json", errno.ESTALE)
    assert saver.folder.last() == (saver.folder.path(3), [])


def test_what_another_rank_wrote_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's file system it may be seen late, or in part: when it is saved, and when a run goes on from it."""
    saver, engine = begin(tmp_path), Engine()
    read_text, cut = Path.read_text, ["", '{"bytes": 1']

    def late(self: Path, *given: Any, **named: Any) -> str:
        return cut.pop() if self.name.startswith("piece-") and cut else read_text(self, *given, **named)

    pauses: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    monkeypatch.setattr(Path, "read_text", late)
    save_step(saver, engine)
    assert saver.last == saver.folder.path(1)
    assert len(pauses) == 2
    piece = next(saver.last.glob("piece-*"))
    piece.rename(tmp_path / "unseen")
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: (tmp_path / "unseen").rename(piece))
    other = Engine()
    saver.restore(other, saver.last, read_state(saver.last))
    assert torch.equal(other.module.weight, engine.module.weight)


def test_a_piece_of_an_earlier_start_does_not_come_in(tmp_path: Path) -> None:
    saver, engine = begin(tmp_path), Engine()
    stale = saver.folder.temporary(1)
    stale.mkdir(parents=True)
    (stale / "piece-00000-of-00000.safetensors").write_bytes(b"another start's")
    save_step(saver, engine)
    assert saver.last is not None
    assert {path.name for path in saver.last.iterdir()} == {
        "state.json", "encoder", "piece-00000-of-00001.safetensors"
    }  # fmt: skip
    (saver.last / "piece-00000-of-00000.safetensors").write_bytes(b"another start's")
    saver.restore(Engine(), saver.last, read_state(saver.last))


def test_latest_names_a_checkpoint_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the old ones can't be removed, or there is no room for the name before they are."""
    saver, engine = begin(tmp_path, keep_last=1), Engine()
    save_step(saver, engine)
    remove = folders._remove
    monkeypatch.setattr(folders, "_remove", lambda path: (remove(path), Path("/no/such/file").stat()))
    save_step(saver, engine)
    assert (saver.folder.folder / "latest").read_text() == "step-00000002\n"
    monkeypatch.setattr(folders, "_remove", remove)
    write_text, full = folders.write_text, [errno.ENOSPC]

    def write(path: Path, text: str) -> None:
        if full:
            raise OSError(full[0], os.strerror(full.pop()))
        write_text(path, text)

    monkeypatch.setattr(folders, "write_text", write)
    save_step(saver, engine)
    assert (saver.folder.folder / "latest").read_text() == "step-00000003\n"
    assert [path.name for path in saver.folder.all()] == ["step-00000003"]
