"""From the command line over the site profile to what a job asks for (imports no torch)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster.passed_through import passed_through
from launch.cluster.resources import Resources, lead_time
from launch.cluster.site import Site
from launch.cluster.slurm import gpus_of, seconds_of
from pretrain.config.load import ConfigError


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What was typed; None is what the profile says."""

    nodes: int | None = None
    gpus_per_node: str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    signal_seconds: int | None = None
    probe_gpus: int | None = None
    probe_cpus: int | None = None
    probe_time: str | None = None
    probe_partition: str | None = None
    sbatch: tuple[str, ...] = ()  # further options, NAME=VALUE


def training_resources(options: JobOptions, site: Site, environ: Mapping[str, str] = os.environ) -> Resources:
    """What the training job asks for: as typed, else as the profile, else as sbatch's own variables say."""
    asked = options.gpus_per_node if options.gpus_per_node is not None else site.gpus_per_node
    _, gpus = gpus_of(asked)
    if gpus and options.tasks_per_node not in (None, gpus):
        raise ConfigError(f"--tasks-per-node {options.tasks_per_node} and {gpus} GPUs a node: a GPU has one process")
    time = options.time or _text(site.time)
    if time is not None:
        seconds_of(time)
    return Resources(
        nodes=options.nodes or site.nodes or 1,
        gpus_per_node=str(asked) if gpus else None,
        tasks_per_node=gpus or options.tasks_per_node or 1,
        cpus_per_task=options.cpus_per_task or site.cpus_per_task,
        memory=_memory(options.memory or _text(site.memory)),
        time=time,
        partition=options.partition or site.partition or environ.get("SBATCH_PARTITION"),
        account=options.account or site.account or environ.get("SBATCH_ACCOUNT"),
        qos=options.qos or site.qos or environ.get("SBATCH_QOS"),
        constraint=options.constraint or site.constraint,
        exclude=options.exclude or site.exclude,
        mail=site.mail,
        signal_seconds=lead_time(options.signal_seconds or site.signal_seconds, time),
        gpus_by=site.gpus_by,
        further=passed_through(options.sbatch, site.sbatch),
    )


def probe_resources(options: JobOptions, site: Site, training: Resources) -> Resources:
    """What a probe job asks for: one GPU, or a task's cores, of the partition that training runs in."""
    kind, gpus = gpus_of(training.gpus_per_node)
    wanted = options.probe_gpus if options.probe_gpus is not None else site.probe.gpus
    wanted = min(gpus, 1) if wanted is None else wanted
    time = options.probe_time or _text(site.probe.time)
    if time is not None:
        seconds_of(time)
    return replace(
        training,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=None if wanted == 0 else f"{kind}:{wanted}" if kind else str(wanted),
        cpus_per_task=options.probe_cpus or site.probe.cpus or training.cpus_per_task,
        memory=None,
        time=time,
        partition=options.probe_partition or site.probe.partition or training.partition,
        account=site.probe.account or training.account,
        qos=site.probe.qos or training.qos,
        signal_seconds=lead_time(None, time),
    )


def job_variables(
    preflight: bool, exclude_sick: bool, max_failures: int | None, restarts: int | None = None
) -> dict[str, str]:
    """What `slurm/pretrain.sbatch` reads from its environment."""
    chosen = {} if preflight else {"SELFSIGHT_PREFLIGHT": "0"}
    if exclude_sick:
        chosen["SELFSIGHT_EXCLUDE_SICK"] = "1"
    if max_failures is not None:
        chosen["SELFSIGHT_MAX_FAILURES"] = str(max_failures)
    if restarts is not None:
        chosen["SELFSIGHT_RESTARTS"] = str(restarts)
    return chosen


def python_of(site: Site, environ: Mapping[str, str] = os.environ) -> str:
    """The interpreter of the jobs: the profile's venv, $SELFSIGHT_PYTHON, or the one that submits."""
    if site.venv is not None:
        return str(Path(site.venv) / "bin" / "python")
    return environ.get("SELFSIGHT_PYTHON") or sys.executable


def _memory(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"\d+[KMGT]?", text, re.IGNORECASE):
        raise ConfigError(f"--memory is {text!r}; give a node's megabytes, or a number with K, M, G or T such as 200G")
    return text


def _text(value: object) -> str | None:
    return None if value is None else str(value)
