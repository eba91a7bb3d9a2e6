"""Files in the working directory that are named as ours, or as a library of ours, are never run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import python_module, safe_environment

HOSTILE = (
    "pretrain",
    "launch",
    "eval",
    "data_pipelines",
    "slurm",
    "torch",
    "yaml",
    "typer",
    "pydantic",
    "wandb",
    "json",
)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text("open('was_run', 'w').close()\nraise SystemExit('not meant')\n")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        [str(Path(sys.executable).with_name("selfsight")), "pretrain"],
        [str(Path(sys.executable).with_name("selfsight")), "launch", "--nproc", "2"],
        [str(Path(sys.executable).with_name("selfsight")), "preflight", "--nproc", "2"],
        python_module("launch", "pretrain"),
        python_module("pretrain"),
    ],
)
def test_the_working_directory_is_not_imported_from(hostile: Path, command: list[str]) -> None:
    if not Path(command[0]).is_file():
        pytest.skip("the console script is not installed beside this interpreter")
    given = ["mae_vit_cifar_cpu", "--data", "no_such_shards"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, cwd=hostile, check=False)
    assert "no_such_shards" in done.stdout + done.stderr
    assert not (hostile / "was_run").exists()


def test_what_our_processes_start_does_not_either(hostile: Path) -> None:
    code = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-m', 'json.tool', '--help']).returncode)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=hostile, env=safe_environment({}), capture_output=True, check=False
    )
    assert done.returncode == 0
    assert not (hostile / "was_run").exists()


@pytest.mark.parametrize("name", ["pretrain", "probe"])
def test_batch_scripts_say_so_before_they_start_python(name: str) -> None:
    text = (Path(__file__).parents[2] / "slurm" / f"{name}.sbatch").read_text()
    assert 0 < text.index("export PYTHONSAFEPATH=1") < text.index(" -m ")
