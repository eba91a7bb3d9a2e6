"""Where a user of a cluster stands: a folder, presets, and the commands they type there."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import yaml
from minicluster import ENDED, MiniCluster
from tiny import config_data

ROOT = Path(__file__).parents[2]


class Workplace:
    """Where a user would stand: a folder with `runs/` in it and presets of their own, and a cluster to submit to."""

    def __init__(self, cluster: MiniCluster, folder: Path, shards: Path) -> None:
        self.cluster, self.folder, self.shards, self.runs = cluster, folder, shards, folder / "runs"
        self.runs.mkdir()

    def preset(self, name: str, method: str = "mae", family: str = "vit", **sections: Any) -> Path:
        """Write the preset of a tiny run: 8 images a step, 1 thread; `sections` are merged in, as in `tiny`."""
        data = config_data(method, family, self.shards, self.runs, **sections) | {"name": name}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    def sbatch(self, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
        """Submit a batch script from here; the job's number."""
        return self.cluster.run("sbatch", "--parsable", *arguments, cwd=self.folder, env=env).stdout.strip()

    def pretrain(self, preset: Path, *options: str, overrides: tuple[str, ...] = (), **env: str) -> str:
        """Submit `slurm/pretrain.sbatch` with two whole nodes of one task, or as sbatch's `options` say.

        Not --exclusive, which brings the nodes' GPUs along.
        """
        script = ROOT / "slurm" / "pretrain.sbatch"
        shape = ("--nodes=2", "--ntasks-per-node=1", f"--cpus-per-task={self.cluster.cpus}")
        return self.sbatch(*shape, *options, script, preset, *overrides, env=env)

    def selfsight(self, *arguments: str | Path, check: bool = True, **env: str) -> Any:
        """Run the command here, as on a login node: its `returncode`, `stdout` and `stderr`."""
        argv = [sys.executable, "-m", "launch", *arguments]
        return self.cluster.run(*argv, check=check, timeout=300, cwd=self.folder, env=env)

    def submit(self, preset: Path, *options: str, **env: str) -> tuple[str, list[str]]:
        """`selfsight submit` with time limits that the cluster allows: the training job, and its probes."""
        return queued(self.selfsight("submit", preset, "--time=10", "--probe-time=10", *options, **env).stdout)

    def preempt(self, job: str) -> None:
        """Have a job of the preemptable partition driven from its nodes, and out of the queue's way for a moment.

        A rank that stands still is let go once its signal is on the way.
        """
        whole = ("--nodes=3", f"--cpus-per-task={self.cluster.cpus}")
        urgent = self.sbatch("--partition=main", *whole, "--wrap=sleep 1")
        self.cluster.until(lambda: self.cluster.job(job).get("PreemptTime", "None") != "None", 60, "the preemption")
        self.cluster.signal_step(job, signal.SIGCONT)
        self.cluster.wait(job, "PENDING", "COMPLETING", timeout=60)
        self.cluster.wait(urgent, "COMPLETED", timeout=60)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The rows of a run's metrics.jsonl; none where it has not begun."""
        return _rows(self.runs / name / "metrics.jsonl")

    def history(self, name: str) -> list[dict[str, Any]]:
        """The events of a run's history."""
        return _rows(self.runs / name / "history.jsonl")

    def requeued(self, name: str) -> list[dict[str, Any]]:
        """The events of a run's history that tell of a job that went back into the queue."""
        return [event for event in self.history(name) if event["event"] == "requeued"]

    def printed(self, job: str) -> str:
        """All that a job has printed."""
        return Path(self.cluster.job(job)["StdOut"]).read_text(errors="replace")

    def until_step(self, name: str, step: int, job: str, timeout: float = 180) -> None:
        """Wait until a run has reported a step; fails at once when its job has ended before."""

        def there() -> bool:
            over = self.cluster.state(job) in ENDED
            reported = any(row["step"] >= step for row in self.metrics(name))
            assert reported or not over, f"job {job} ended before step {step} of {name}\n{self.cluster.log(job)}"
            return reported

        self.cluster.until(
            there,
            timeout,
            f"step {step} of {name}",
            about=lambda: self.cluster.log(job),
        )


def queued(printed: str) -> tuple[str, list[str]]:
    """The training job, and the probe jobs, that `selfsight submit` says it has queued."""
    found = re.search(r"queued job (\d+):[^;]*?(?:, probes in ([\d, ]+))?;", printed)
    assert found is not None, printed
    return found[1], found[2].split(", ") if found[2] else []


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}"):  # the last one may be being written
            rows.append(json.loads(line))
    return rows
