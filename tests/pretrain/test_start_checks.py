"""What a run asks of its machine and of its own length, refused before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_data, write_shards

from pretrain.config import Config
from pretrain.config.load import ConfigError, parse_config
from pretrain.run import pretrain
from pretrain.start_checks import MOST_PER_CORE, check_compilers, check_cores, check_profile

GPU = torch.device("cuda")


def config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    return parse_config(config_data("mae", "vit", tmp_path, tmp_path / "runs", **sections))


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("engine", {"threads": 65}, r"engine\.threads is 65, and this machine has 4 cores: up to 64"),
        ("data", {"workers": 1000}, r"data\.workers is 1000, .* up to 64 are taken, 16 a core; leave it out"),
        ("data", {"threads": 100000}, r"data\.threads is 100000"),
        ("data", {"workers": 10, "threads": 10}, r"10 x 10 = 100 threads, and this machine has 4 cores: up to 64"),
    ],
)
def test_more_threads_than_cores_bear_are_refused(
    section: str, values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_cores(config(tmp_path, **{section: values}), 4)


def test_what_cores_bear_is_taken(tmp_path: Path) -> None:
    check_cores(config(tmp_path, engine={"threads": 2 * MOST_PER_CORE}, data={"workers": 4, "threads": 8}), 2)
    check_cores(config(tmp_path, data={"workers": "auto", "threads": 2 * MOST_PER_CORE}), 2)


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("engine", {"threads": 100000}, r"engine\.threads is 100000"),
        ("data", {"workers": 1000000}, r"data\.workers is 1000000"),
        ("tracking", {"profile_steps": [10, 12]}, r"ends with step 8; .* such as tracking\.profile_steps=\[6,8\]"),
        ("engine", {"compile": True}, r"CXX=/nonexistent/g\+\+ can't be run: install g\+\+.*engine\.compile=false"),
    ],
)
def test_a_run_is_refused_before_anything_is_written(
    section: str, values: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config as inductor

    write_shards(tmp_path, 40)
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    found = inductor.patch({"cpp.cxx": (None, "/nonexistent/g++")})  # torch has read CXX when it was imported
    with found, pytest.raises(ConfigError, match=says):
        pretrain(config(tmp_path, **{section: values}))
    assert not (tmp_path / "runs").exists()


def test_a_trace_within_the_run_is_taken(tmp_path: Path) -> None:
    for steps in ([8, 8], [8, 20]):
        check_profile(config(tmp_path, tracking={"profile_steps": steps}), 8)
    with pytest.raises(ConfigError, match=r"profile_steps=\[1,1\]"):
        check_profile(config(tmp_path, tracking={"profile_steps": [2, 5]}), 1)


def test_a_gpu_needs_triton_and_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        check_compilers(GPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("CC", "/nonexistent/gcc")
    with pytest.raises(ConfigError, match=r"CC=/nonexistent/gcc can't be run: install gcc.*unset CC"):
        check_compilers(GPU)
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="there is no C compiler, which Triton needs"):
        check_compilers(GPU)
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)  # whatever answers to --version
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nonexistent")
    with pytest.raises(ConfigError, match="Python's headers are not in /nonexistent: install them"):
        check_compilers(GPU)
