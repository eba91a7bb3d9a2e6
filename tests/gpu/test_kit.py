"""The kit runs to its end where there is no GPU, and a part that fails costs no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PARTS_THAT_GO_WRONG = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kit, parts

def leave_a_child(_):
    os.fork() or time.sleep(600)
    time.sleep(600)

def fail(_):
    print("half way")
    raise ValueError("it is too wide")

kit.PARTS = (
    parts.Part("dies", 20, lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    parts.Part("fails", 20, fail),
    parts.Part("hangs", 0.5, leave_a_child),
    parts.Part("speed well", 20, lambda _: {"images_per_second": 1234.0, "mfu": 0.5}),
)
sys.argv = ["kit", "--rehearse", "--out", sys.argv[2]]
sys.exit(kit.main())
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_the_kit_rehearses_to_its_end(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "kit.py"), "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    whole = json.loads((tmp_path / "results.json").read_text())
    parts = whole["parts"]
    assert {part["status"] for part in parts.values()} == {"ok"}, done.stdout
    assert done.returncode == 0, done.stderr
    assert set(parts["sync"]["found"].values()) == {"nothing waits"}
    speeds = [part["found"] for name, part in parts.items() if name.startswith("speed ")]
    assert len(speeds) >= 6
    assert all(found["images_per_second"] > 0 for found in speeds)
    assert 0 < parts["curves MAE ViT-B/16"]["found"]["bf16: largest gap"] < 0.05
    assert all("failed" not in told for told in parts["export"]["found"].values())
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("# A rehearsal on the CPU")
    assert all(f"| {name} | ok |" in table for name in parts)


@pytest.mark.slow
def test_a_part_that_fails_hangs_or_dies_costs_no_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARTS_THAT_GO_WRONG, str(HERE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1, done.stderr
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "dies": "failed",
        "fails": "failed",
        "hangs": "timeout",
        "speed well": "ok",
    }
    assert parts["dies"]["why"] == "it ended with code -9"
    assert parts["fails"]["why"] == "ValueError: it is too wide"
    assert "half way" in parts["fails"]["log"]
    table = (tmp_path / "table.md").read_text()
    assert "| fails | failed | 0 | ValueError: it is too wide |" in table
    assert "| well |  | 1,234 | 50.0% |" in table


@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "kit.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "--rehearse" in done.stderr
