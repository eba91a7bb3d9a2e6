from __future__ import annotations

import gc
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pretrain.survival import startup
from pretrain.survival.history import read_history
from pretrain.survival.startup import StartUp, num_nodes, process_age, uncompiled


def test_phases_are_counted_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = StartUp(age=2.5)
    clock.mark("command")
    now[0] = 106.0
    clock.mark("imports")
    now[0] = 107.0
    clock.mark("command")
    clock.mark("nothing")
    assert clock.seconds == {"command": 3.5, "imports": 6.0, "nothing": 0.0}
    assert clock.line() == "first step after 9.5 s: imports 6.0, command 3.5"


def test_a_process_knows_its_age() -> None:
    code = "import time; time.sleep(0.5)\nfrom pretrain.survival.startup import process_age\nprint(process_age())"
    root = Path(__file__).parents[2]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert 0.4 < float(done.stdout) < time.monotonic() - began + 0.1
    assert process_age() > 0


@pytest.mark.parametrize(
    ("environ", "world_size", "nodes"),
    [
        ({"SLURM_STEP_NUM_NODES": "3", "LOCAL_WORLD_SIZE": "1"}, 4, 3),
        ({"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, 16, 2),
        ({"LOCAL_WORLD_SIZE": "8"}, 16, 2),
        ({}, 1, 1),
    ],
)
def test_machines_are_counted(environ: dict[str, str], world_size: int, nodes: int) -> None:
    assert num_nodes(environ, world_size) == nodes


def test_the_first_rank_remembers_a_start_and_collecting_garbage_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = StartUp(age=1.0, preset="demo")
    gc.disable()
    try:
        clock.done(tmp_path, 0, 2, step=7, zero_stage=1)
        assert gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
    clock.done(tmp_path, 1, 2, step=7, zero_stage=1)
    (started,) = read_history(tmp_path)
    told = [started[key] for key in ("event", "step", "ranks", "zero_stage", "preset")]
    assert told == ["started", 7, 2, 1, "demo"]
    assert {"python", "torch", "deepspeed"} <= started["versions"].keys()
    assert started["seconds"]["first step"] >= 1
    assert capsys.readouterr().out.startswith("first step after 1.")


def test_packages_without_bytecode_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "torch.py"))
    spec.cached = str(tmp_path / "torch.pyc")
    monkeypatch.setattr(startup, "find_spec", lambda _: spec)
    (line,) = uncompiled()
    assert "compileall" in line
    Path(spec.cached).touch()
    assert uncompiled() == []
