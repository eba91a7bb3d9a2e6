from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster.logs import lines_of
from pretrain.survival.failures import gather_errors, noted
from pretrain.survival.history import record
from pretrain.survival.rank_log import log_of_rank, write_apart

JOB = {"SLURM_JOB_ID": "7"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of job 7, whose log has five lines."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    log = tmp_path / "job 7.out"
    log.write_text("".join(f"line {number}\n" for number in range(5)))
    folder = tmp_path / "runs" / "photos"
    record(folder, "submitted", jobs=["7"], log=str(log))
    (folder / "config.yaml").write_text("name: photos\n")
    return folder


def test_the_end_of_the_job_s_log(run: Path) -> None:
    assert list(lines_of(run, last=2))[1:] == ["line 3", "line 4"]
    assert list(lines_of(run, rank=0, last=1))[1:] == ["line 4"]


def test_the_rank_that_failed_first_of_the_last_failure(run: Path) -> None:
    assert "no rank" in next(iter(lines_of(run, first_error=True)))
    for number, message in enumerate(("older", "disk on fire")):
        with pytest.raises(RuntimeError), noted(run, 3 + number, {"step": 5}):
            raise RuntimeError(message)
        gather_errors(run, "7-0-0", f"failure {number}")
    said = "\n".join(lines_of(run, first_error=True))
    assert "failure 1" in said
    assert "failure 0" not in said
    assert "rank 3" in said
    assert "Traceback" in said
    assert "1 more in" in said


def test_a_rank_s_own_log(run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="all of its ranks write to the job's log"):
        list(lines_of(run, rank=2))
    path = log_of_rank(run, "7-0-0", 2)
    path.parent.mkdir(parents=True)
    path.write_text("hello\n")
    assert list(lines_of(run, rank=2))[1:] == ["hello"]
    with pytest.raises(FileNotFoundError, match=r"ranks with a log are 2 \.\. 2"):
        list(lines_of(run, rank=9))


def test_several_runs_are_refused(run: Path) -> None:
    record(run.with_name("other"), "submitted", jobs=["8"])
    (run.with_name("other") / "config.yaml").write_text("name: other\n")
    with pytest.raises(ValueError, match="holds 2 runs"):
        list(lines_of(run.parent))


def test_of_many_ranks_all_but_the_first_write_apart_code_in_c_too(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom pretrain.survival.rank_log import write_apart\n"
        "print('before', flush=True)\nprint(write_apart(Path(sys.argv[1]), 2, 9))\n"
        "sys.stdout.flush(); os.write(2, b'from below\\n'); raise SystemExit('the end')"
    )
    environ = {**os.environ, **JOB}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environ, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("before\n", "")
    path = log_of_rank(tmp_path, "7-0-0", 2)
    assert path.read_text() == f"{path}\nfrom below\nthe end\n"


@pytest.mark.parametrize(
    ("rank", "world_size", "environ"),
    [(0, 64, JOB), (1, 8, JOB), (1, 64, {}), (1, 64, JOB | {"SELFSIGHT_RANK_LOGS": "0"})],
)
def test_few_ranks_and_the_first_share_the_job_s_log(
    tmp_path: Path, rank: int, world_size: int, environ: dict[str, str]
) -> None:
    assert write_apart(tmp_path, rank, world_size, environ) is None
    assert list(tmp_path.iterdir()) == []
