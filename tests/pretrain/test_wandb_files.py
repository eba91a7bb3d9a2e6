"""The reader of wandb's files, against wandb's own printing of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tracked import tracked_run

from pretrain.tracking.wandb_files import BLOCK, WandbFileError, mend, read_wandb_file, wandb_files, what_wandb_has


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 rows, some of them larger than a block."""
    import wandb

    folder = tmp_path_factory.mktemp("wandb-files")
    run: Any = wandb.init(
        dir=str(folder), mode="offline", id="abc", project="photos", name="first", group="all", job_type="sweep",
        tags=["a", "b"], notes="why", config={"lr": 0.1, "data": {"train": "shards"}},
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")
    for step in range(1, 61):
        run.log({"step": step, "loss": 1 / step, "text": "é" * (BLOCK if step % 20 == 0 else step)})
    run.summary["best"] = 3
    run.finish()
    wandb.teardown()  # which waits until all is written
    return folder


def test_reads_what_was_logged(folder: Path) -> None:
    (path,) = wandb_files(folder)
    read = read_wandb_file(path)
    assert (read.id, read.project, read.name, read.group, read.job_type) == ("abc", "photos", "first", "all", "sweep")
    assert (read.tags, read.notes, read.offline, read.synced, read.ended) == (["a", "b"], "why", True, False, True)
    assert read.config["lr"] == 0.1
    assert read.config["data"] == {"train": "shards"}
    assert [row["loss"] for row in read.history] == [1 / step for step in range(1, 61)]
    assert read.history[39]["text"] == "é" * BLOCK
    assert read.summary["best"] == 3
    assert read.summary["step"] == 60
    assert {"glob": "*", "step_metric": "step"} in read.metrics
    had = what_wandb_has(folder, "abc", "photos")
    assert had.offline == {("metrics", step) for step in range(1, 61)}
    assert had.summary["loss"] == 1 / 60
    assert what_wandb_has(folder, "abc", "elsewhere").offline == set()


def test_finds_what_wandbs_own_command_prints(folder: Path) -> None:
    (path,) = wandb_files(folder)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    records = [json.loads(line) for line in printed]
    losses = [record["history"]["item"]["loss"] for record in records if record["type"] == "history"]
    assert losses == [row["loss"] for row in read_wandb_file(path).history]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_torn_file_is_read_up_to_where_it_ends(folder: Path, tmp_path: Path, share: float) -> None:
    (path,) = wandb_files(folder)
    torn = tmp_path / "run-abc.wandb"
    torn.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    rows, whole = read_wandb_file(torn).history, read_wandb_file(path).history
    assert 0 < len(rows) < len(whole)
    assert rows == whole[: len(rows)]
    assert mend(torn) > 0
    assert mend(torn) == 0
    assert read_wandb_file(torn).history == rows


def test_other_files_are_refused_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    (tmp_path / "other").write_text(json.dumps({"no": "wandb"}))
    with pytest.raises(WandbFileError, match=r"no \.wandb file"):
        read_wandb_file(tmp_path / "other")
    (tmp_path / "empty").touch()
    assert read_wandb_file(tmp_path / "empty").history == []


def test_column_refuses_a_step_that_is_there_twice(folder: Path) -> None:
    tracked = tracked_run(folder)
    assert tracked.ids == {"abc"}
    assert list(tracked.column("loss")) == list(range(1, 61))
    assert {"step", "loss", "text"} <= tracked.names()
    tracked.files[0].history.append({"step": 60, "loss": 0.0})
    with pytest.raises(AssertionError, match="twice"):
        tracked.column("loss")
