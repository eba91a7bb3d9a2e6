"""How torch's threads wait for each other in our processes. What that is worth beside other work is measured in
`tests/bench/busy_machine.py`: a stranger on the same cores must not fail a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from data_pipelines.cores import WAITING

FROM_THE_COMMAND = """
import sys
from launch.cli import main
try:
    main(["--version"])
except SystemExit:
    assert "torch" not in sys.modules
import torch
"""


def environment(**given: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")} | given


@pytest.mark.parametrize(("own", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_command_tells_openmp_before_it_is_loaded(own: Mapping[str, str], policy: str) -> None:
    environ = environment(OMP_DISPLAY_ENV="TRUE", **own)
    done = subprocess.run([sys.executable, "-c", FROM_THE_COMMAND], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    if "OPENMP DISPLAY ENVIRONMENT BEGIN" not in done.stderr:
        pytest.skip("this torch's OpenMP does not tell its settings")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
