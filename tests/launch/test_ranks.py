from __future__ import annotations

import subprocess

import pytest

from launch.ranks import Ranks, rank_environment

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "n7",
}
ALONE = Ranks(rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=None)


def test_torchrun() -> None:
    assert rank_environment(TORCHRUN) == Ranks(5, 1, 8, "node7", 29500)


def test_torchrun_wins_inside_a_slurm_job() -> None:
    assert rank_environment(SRUN | TORCHRUN).world_size == 8


def test_srun() -> None:
    ranks = rank_environment(SRUN)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.master_addr) == (3, 1, 4, "n7")


def test_all_tasks_of_a_step_agree_on_a_port_and_steps_differ() -> None:
    ports = [
        rank_environment(SRUN | {"SLURM_PROCID": rank, "SLURM_STEP_ID": step, "SLURM_JOB_ID": job}).master_port
        for rank, step, job in [("0", "0", "1"), ("3", "0", "1"), ("0", "1", "1"), ("0", "0", "2")]
    ]
    assert ports[0] == ports[1]
    assert len(set(ports)) == 3
    assert all(10_000 <= port < 30_000 for port in ports if port is not None)


def test_the_steps_own_tasks_count_not_the_jobs() -> None:
    step = SRUN | {"SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n9"}
    assert rank_environment(step).world_size == 4
    assert rank_environment(step).master_addr == "n9"


@pytest.mark.parametrize(
    ("tasks", "node", "ours"), [("4(x2),3", "0", 4), ("4(x2),3", "1", 4), ("4(x2),3", "2", 3), ("8", "0", 8)]
)
def test_the_ranks_on_this_node_are_counted(tasks: str, node: str, ours: int) -> None:
    step = SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    environ: dict[str, str] = {}
    rank_environment(step).export(environ)
    assert environ["LOCAL_WORLD_SIZE"] == str(ours)


def test_the_deepspeed_launchers_count_is_read_too() -> None:
    assert rank_environment(TORCHRUN | {"LOCAL_SIZE": "4"}).local_world_size == 4
    assert rank_environment(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}).local_world_size == 8


def test_a_given_master_is_kept() -> None:
    ranks = rank_environment(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (ranks.master_addr, ranks.master_port) == ("10.0.0.1", 1234)


def test_node_lists_are_expanded_by_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="gpu03\ngpu04\ngpu09\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert rank_environment(SRUN | {"SLURM_JOB_NODELIST": "gpu[03-04,09]"}).master_addr == "gpu03"
    assert asked == [["scontrol", "show", "hostnames", "gpu[03-04,09]"]]


def test_without_scontrol_the_user_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise FileNotFoundError("scontrol")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match=r"gpu\[03-04\].*set MASTER_ADDR"):
        rank_environment(SRUN | {"SLURM_JOB_NODELIST": "gpu[03-04]"})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # in a batch script, without srun
        SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
    ],
    ids=["nothing", "batch script", "srun of one task", "one rank"],
)
def test_a_process_by_itself(environ: dict[str, str]) -> None:
    assert rank_environment(environ) == ALONE


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"])
def test_part_of_a_group_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        rank_environment({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"RANK": "8"}, "rank 8 is not in a group of 8"), ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'")],
)
def test_impossible_values_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_environment(TORCHRUN | change)


def test_export_sets_what_torch_reads() -> None:
    environ = {"PATH": "/bin"}
    rank_environment(TORCHRUN).export(environ)
    assert environ == TORCHRUN | {"PATH": "/bin", "LOCAL_WORLD_SIZE": "1"}
    ALONE.export(alone := {})
    assert "MASTER_PORT" not in alone  # the process takes a port that is free when it needs one
