"""Lines of libraries that nobody can act on are left out, and others are not."""

from __future__ import annotations

import os
import subprocess
import sys
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
from prefork import OF_THIS_CHECKOUT

from pretrain import quiet

PROFILED = """
import os
from pretrain.quiet import quiet_profiler

quiet_profiler(os.environ)
import torch

with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
    torch.ones(8, 8) @ torch.ones(8, 8)
profiler.export_chrome_trace(os.devnull)
"""


@pytest.mark.skipif(any(Path(driver).exists() for driver in quiet._DRIVERS), reason="on a GPU it keeps its errors")
def test_a_trace_on_a_cpu_says_nothing_of_gpus() -> None:
    environment = {name: value for name, value in OF_THIS_CHECKOUT.items() if name != "KINETO_LOG_LEVEL"}
    ended = subprocess.run(
        [sys.executable, "-c", PROFILED], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert ended.stdout + ended.stderr == ""


def test_errors_of_a_gpu_and_levels_of_the_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    monkeypatch.setattr(quiet, "_DRIVERS", (os.devnull,))
    quiet.quiet_profiler(environ)
    assert not environ
    monkeypatch.setattr(quiet, "_DRIVERS", (str(tmp_path / "none"),))
    environ["KINETO_LOG_LEVEL"] = "0"
    quiet.quiet_profiler(environ)
    assert environ == {"KINETO_LOG_LEVEL": "0"}


def test_deepspeed_says_nothing_of_our_optimizer_and_all_else() -> None:
    from deepspeed.utils import logger

    quiet.quiet_deepspeed()
    quiet.quiet_deepspeed()
    assert logger.filters.count(quiet._tells_more) == 1
    handler = BufferingHandler(10)
    logger.addHandler(handler)
    try:
        logger.warning("**** You are using ZeRO with an untested optimizer, proceed with caution *****")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer] == ["something else"]
