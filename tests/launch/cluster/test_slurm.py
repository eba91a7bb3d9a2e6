from __future__ import annotations

import re

import pytest

from launch.cluster.resources import Resources, _problem
from launch.cluster.slurm import Node, Partition, gpus_of, sbatch_environment, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 600),
        (10, 600),
        ("10:30", 630),
        ("24:00:00", 86_400),
        ("1-0", 86_400),
        ("2-3:30", 2 * 86_400 + 3 * 3600 + 1800),
        ("7-00:00:00", 7 * 86_400),
        ("UNLIMITED", None),
    ],
)
def test_times_as_slurm_writes_them(text: str | int, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-", "1-2:3:4:5", "0", "0:30", "1.5"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        seconds_of(text)


def test_gpus() -> None:
    assert gpus_of(None) == (None, 0)
    assert gpus_of(4) == gpus_of("4") == (None, 4)
    assert gpus_of("a100:4") == ("a100", 4)
    for text in ("a100", "4:a100", "a100:4:2x", ""):
        with pytest.raises(ValueError, match="TYPE:NUMBER"):
            gpus_of(text)


def test_sbatch_takes_no_options_from_variables() -> None:
    environ = {"PATH": "/bin", "SBATCH_TIMELIMIT": "1", "SLURM_NTASKS": "9", "SLURM_CONF": "/c", "SRUN_X": "1"}
    assert sbatch_environment(environ) == {"PATH": "/bin", "SLURM_CONF": "/c"}


GPU = Partition(
    name="gpu", default=True, up=True, max_seconds=86_400, max_nodes=3, allowed={"AllowAccounts": ("ours",)},
    nodes=tuple(Node(f"n{number}", 64, {"a100": 4} if number < 3 else {"v100": 8}) for number in range(5)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"time": "2-0"}, "--time 2-0 is beyond what partition gpu allows, 1-00:00:00"),
        ({"time": "UNLIMITED"}, "is beyond"),
        ({"nodes": 4}, "--nodes 4: a job of partition gpu may have 3"),
        ({"gpus_per_node": "16"}, "0 nodes of partition gpu have so many, and 1 are asked for; .*a100:4 or v100:8"),
        ({"gpus_per_node": "v100:4", "nodes": 3}, "2 nodes of partition gpu have so many, and 3"),
        ({"gpus_per_node": "h100:4"}, "GPUs of its nodes: a100:4 or v100:8"),
        ({"tasks_per_node": 4, "cpus_per_task": 17}, "17 x 4 tasks a node are 68.*at most 16"),
        ({"account": "theirs"}, "does not take --account theirs; allowed: ours"),
        ({"account": None}, None),  # the user's default may be one of those
        ({"nodes": 3, "gpus_per_node": "a100:4", "time": "1-0", "tasks_per_node": 4, "cpus_per_task": 16}, None),
    ],
)
def test_what_a_partition_has_not_is_refused(asked: dict[str, object], message: str | None) -> None:
    problem = _problem(Resources(**{"account": "ours", **asked}), GPU)  # type: ignore[arg-type]
    if message is None:
        assert problem is None
    else:
        assert problem is not None
        assert re.search(message, problem), problem
