from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.ranks import Ranks, check_gpus, rank_environment, rank_of
from pretrain.config.load import ConfigError
from pretrain.engines.gpus import gpu_of

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


@pytest.fixture(autouse=True)
def _names_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])


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


def test_elements_of_an_array_and_restarts_have_ports_of_their_own() -> None:
    jobs = [
        {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restart}
        for job in range(4711, 4719)
        for restart in ("0", "1", "2")
        for step in ("0", "1")
    ]
    ports = {rank_environment(SRUN | job).master_port for job in jobs}
    assert len(ports) == len(jobs)


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


def test_a_name_that_does_not_resolve_is_replaced_by_slurms_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command == ["scontrol", "show", "node", "n7"]
        return subprocess.CompletedProcess(command, 0, stdout="NodeName=n7\n   NodeAddr=10.1.2.3 NodeHostName=n7\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert rank_environment(SRUN).master_addr == "n7"
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    assert rank_environment(SRUN).master_addr == "10.1.2.3"


def unknown_host(*_: object) -> None:
    raise socket.gaierror("unknown")


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


@pytest.mark.parametrize(
    ("gpus", "tasks", "told"),
    [("2", "2(x2)", None), ("8", "1(x2)", "8 GPUs but 1 tasks on node n7.*--ntasks-per-node=8"), ("2", "4", "2 GPUs")],
)
def test_as_many_tasks_as_gpus(gpus: str, tasks: str, told: str | None) -> None:
    step = SRUN | {"SLURM_GPUS_ON_NODE": gpus, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURMD_NODENAME": "n7"}
    ranks = rank_environment(step)
    if told is None:
        check_gpus(step, ranks)
    else:
        with pytest.raises(ValueError, match=told):
            check_gpus(step, ranks)
    check_gpus({"SLURM_GPUS_ON_NODE": "8"}, ALONE)  # a batch script's own shell, or an allocation without a step


def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees() -> None:
    assert [gpu_of(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_of(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match="has 2 GPUs and more ranks than that"):
        gpu_of(2, 2)


def test_the_rank_of_an_error_is_told_from_whatever_there_is() -> None:
    assert [rank_of(environ) for environ in ({}, SRUN, TORCHRUN, {"RANK": "many"})] == [0, 3, 5, 0]


REFUSED = """
import sys
from launch.ranks import after_the_first
after_the_first(int(sys.argv[1]), 2, float(sys.argv[2]))
print("told", flush=True)
sys.exit(2)
"""


@pytest.mark.parametrize(("rank", "asked", "told"), [(0, False, "told\n"), (1, True, ""), (1, False, "told\n")])
def test_an_error_of_all_ranks_is_told_once(rank: int, asked: bool, told: str) -> None:
    """Rank 0 tells it; the launcher then asks the others to end. One that nobody asks has an error of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", REFUSED, str(rank), "60" if asked else "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    if asked:
        while not _ends_on_term(process.pid):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == told
    assert process.returncode == 2


def _ends_on_term(pid: int) -> bool:
    caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
    return bool(caught & 1 << (signal.SIGTERM - 1))
