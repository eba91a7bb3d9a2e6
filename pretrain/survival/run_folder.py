"""The run folder `runs/NAME/`: which configuration it belongs to, and whether another may continue it."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.files import lock, write_text
from pretrain.config import Config
from pretrain.config.load import ConfigError, differences, dump_config, load_config

#: Keys that may change between two starts of a run: none of them changes what is learned. Of `data.train` the
#: checkpoint pins the index's checksum, so the shards may move but not change unless `data.adopt` says so.
FREE_KEYS = (
    "description",
    "runs",
    "data.train",
    "data.adopt",
    "data.stage",
    "data.workers",
    "data.threads",
    "data.prefetch",
    "data.max_bad_share",
)
#: What a run folder may hold before its run has begun: what is written by those who queue it and look after it,
#: and by ranks that start before the first one.
BEFORE_A_START = (
    "cancelled",
    "heartbeats",
    "history.jsonl",
    "jobs",
    "log.txt",
    "logs",
    "preflight",
    "stacks",
    "sweep.json",
)
_EARLIER_START_SECONDS = 300.0
FREE_PATHS = re.compile(r"data\.train\.\d+\.path")  # of each of several data sets
FREE_SECTIONS = ("checkpoint.", "tracking.", "diagnostics.", "data.cache.")
FREE_ENGINE_KEYS = (
    "engine.threads",
    "engine.zero_stage",
    "engine.expert_parallel",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.hang_seconds",
    "engine.hang_factor",
    "engine.hang_floor_seconds",
    "train.grad_accum_steps",
)


def check_run_folder(config: Config) -> Path:
    """The folder of `config`'s run; raises ConfigError when it holds a run of another configuration.

    Reads only. The caller writes the configuration once everything else has been checked.
    """
    folder = Path(config.runs) / config.name
    stored = folder / "config.yaml"
    # looked at first: of many ranks, the first one may begin the run at this moment, with config.yaml before all else
    occupied = folder.exists() and any(
        path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in BEFORE_A_START
    )
    if not stored.is_file():
        if occupied:
            raise ConfigError(
                f"{folder} exists, is not empty and holds no config.yaml, so it is not a run; "
                "choose another name=... or remove it"
            )
        return folder
    changed = [line for line in differences(_stored(stored), config) if not _may_change(line.partition(":")[0])]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{folder} holds a run with another configuration:\n  {listed}\n"
            "Use the same configuration to continue it, or name=... for a run of its own"
        )
    return folder


def begun_config(config: Config) -> Config | None:
    """The configuration that the run of this name was last started with; None where it has not begun."""
    stored = Path(config.runs) / config.name / "config.yaml"
    return _stored(stored) if stored.is_file() else None


def _stored(place: Path) -> Config:
    try:
        return load_config(place)
    except ConfigError as error:
        raise ConfigError(
            f"{place}, of the run that has begun, is none of this version's: {error}. Finish that run with the version "
            "of selfsight that began it, mend the file, or take a name=... of its own"
        ) from None


def write_config(folder: Path, config: Config) -> None:
    """Store the resolved configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.yaml", dump_config(config))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the run against a second start of it, which would write over its checkpoints; by rank 0 only.

    The kernel lets go when the process ends, however it does; the file system of a node that was lost, when its
    server has noticed. Raises ConfigError naming who holds it, or RuntimeError where that is this very job: its start
    before this one, on a node that was lost, of which nobody knows whether its processes are gone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / ".lock"
    with place.open("a+", encoding="utf-8") as file:
        end = time.monotonic() + _EARLIER_START_SECONDS
        while not lock(file):
            file.seek(0)
            holder = file.read().strip()
            if not _is_this_job(holder):
                raise ConfigError(
                    f"{folder} is being trained by another process ({holder or 'unknown'}); "
                    "wait for it, end it, or take a name=... of its own"
                )
            if time.monotonic() > end:
                raise RuntimeError(f"{folder} is still held by an earlier start of this job ({holder})")
            time.sleep(1.0)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether a process has the run for itself at this moment, as far as the locks of its file system tell."""
    try:
        with (folder / ".lock").open("a+", encoding="utf-8") as file:
            return not lock(file)
    except OSError:  # of a folder that can't be written to: nobody trains there
        return False


def _is_this_job(holder: str) -> bool:
    """Whether what is written in a lock is an earlier start of the job that this process belongs to."""
    try:
        job = json.loads(holder)["job"]
    except (ValueError, KeyError, TypeError):
        return False
    return job is not None and job == os.environ.get("SLURM_JOB_ID") and "SLURM_RESTART_COUNT" in os.environ


def _may_change(key: str) -> bool:
    free = key in FREE_KEYS or key in FREE_ENGINE_KEYS or FREE_PATHS.fullmatch(key) is not None
    return free or key.startswith(FREE_SECTIONS)
