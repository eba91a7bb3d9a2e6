"""The cluster of the tests itself: it is SLURM, it runs our interpreter, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from minicluster import MiniCluster
from workplace import ROOT, Workplace


def test_a_job_runs_on_three_nodes_with_our_interpreter_and_checkout(workplace: Workplace) -> None:
    script = workplace.folder / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        'srun "$SELFSIGHT_PYTHON" -c \'import os, launch; print(os.environ["SLURMD_NODENAME"], launch.__file__)\'\n'
    )
    job = workplace.sbatch("--nodes=3", "--ntasks-per-node=1", "--output=out.txt", script)
    workplace.cluster.wait(job, "COMPLETED")
    printed = sorted((workplace.folder / "out.txt").read_text().splitlines())
    assert printed == [f"n{number} {ROOT}/launch/__init__.py" for number in (1, 2, 3)]
    assert len(workplace.cluster.ends(job)) == 1
    assert workplace.cluster.processes_of(job) == []


def test_nodes_have_gpus_to_ask_for(workplace: Workplace) -> None:
    done = workplace.cluster.run("srun", "--gpus-per-node=2", "printenv", "SLURM_GPUS_ON_NODE")
    assert done.stdout.strip() == "2"


def test_a_cluster_whose_owner_is_killed_is_stopped_with_all_its_jobs(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from minicluster import MiniCluster\n"
        "c = MiniCluster(nodes=1).start()\n"
        "print(c.folder, c.run('sbatch', '--parsable', '--wrap=srun sleep 1000').stdout.strip(), flush=True)\n"
        "time.sleep(1000)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        folder, job = owner.stdout.readline().split()
        left = MiniCluster(Path(folder), nodes=1)
        left.wait(job, "RUNNING", timeout=30)
        left.until(lambda: 0 in left.ranks(job), 30, "the task to run")
        assert sorted({name for _, name, _ in left.processes()} & {"munged", "slurmctld", "slurmd"})
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate()
    end = time.monotonic() + 60
    while (Path(folder).exists() or list(left.processes())) and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(folder).exists()
    assert list(left.processes()) == []
