"""What nvidia-smi prints, here printed by a program of the test's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.cluster.checks import gpu_troubles
from launch.cluster.gpus import Gpu, SmiError, visible_gpus

SMI = """#!/bin/sh
case "$1" in
*query-gpu*) printf '%s\\n' \\
  '0, GPU-aaa, NVIDIA H100 80GB HBM3, 81559, 4, 0' \\
  '1, GPU-bbb, NVIDIA H100 80GB HBM3, 81559, 4, [N/A]' \\
  '2, GPU-ccc, NVIDIA H100 80GB HBM3, 81559, 70000, 3' ;;
*) echo 'GPU-ccc, 4711' ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


@pytest.mark.usefixtures("smi")
@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-bbb", [1]), ("", []), ("0,7,1", [0])],
)
def test_visible_gpus(visible: str | None, indices: list[int]) -> None:
    gpus = visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert gpus is not None
    assert [gpu.index for gpu in gpus] == indices


@pytest.mark.usefixtures("smi")
def test_troubles_of_gpus() -> None:
    gpus = visible_gpus({})
    assert gpus is not None
    assert gpus[1].errors is None
    assert list(gpu_troubles(gpus, 4)) == [
        ("bad", "3 GPUs are visible to 4 tasks; ask for --gpus-per-node=4"),
        ("sick", "GPU 2 has 3 uncorrected memory errors (ECC)"),
        ("sick", "GPU 2 is in use by process 4711: 70000 MiB are taken"),
    ]
    assert list(gpu_troubles(gpus[:2], 1)) == [("warn", "1 of 2 GPUs stay idle: one task a GPU, and there are 1")]
    other = Gpu(3, "GPU-ddd", "NVIDIA A100", 40960, 0, 0)
    assert [level for level, _ in gpu_troubles([gpus[0], other], 2)] == ["warn"]


def test_a_driver_that_fails_says_so(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU 0000:3B:00.0'\nexit 15\n")
    with pytest.raises(SmiError, match=r"exit code 15: Unable to determine the device handle"):
        visible_gpus({})
    smi.unlink()
    monkeypatch.setenv("PATH", str(smi.parent))
    assert visible_gpus({}) is None
