"""`selfsight submit`: all that can be refused is refused, then a plan is printed or queued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_pipelines.files import check_writable, lock, write_text
from data_pipelines.remote.urls import redact
from launch.cluster.arithmetic import solve_accumulation
from launch.cluster.probes import ProbeJob, ProbeOptions, check_probes, probe_jobs
from launch.cluster.quoting import bash_words, log_pattern, sbatch_line
from launch.cluster.render import container_python, render, set_arguments, settings_of
from launch.cluster.requeue import newest_checkpoint
from launch.cluster.resources import Resources, check_resources, with_time
from launch.cluster.runs import check_interpreter, check_not_queued, check_run_to_submit
from launch.cluster.shared import local_lines
from launch.cluster.site import Site
from launch.cluster.slurm import array_limit, ask
from launch.cluster.sweep import Element, sweep_elements
from launch.pretrain_command import plan_of
from pretrain.config import Config
from pretrain.config.load import ConfigError, load_config, load_noting
from pretrain.survival.history import record

PROBE_SECONDS = 4 * 3600  # of a probe job, where the user says nothing and the partition allows it


@dataclass(frozen=True)
class Request:
    """What a user asks for, as typed."""

    preset: str
    overrides: tuple[str, ...]
    resources: Resources
    site: Site
    python: str  # the interpreter of the jobs, as the nodes find it
    command: tuple[str, ...]  # for the record
    micro_batch: int | None = None
    arrays: tuple[str, ...] = ()
    array_file: Path | None = None
    array_max: int | None = None
    probe: ProbeOptions = field(default_factory=ProbeOptions)
    variables: Mapping[str, str] = field(default_factory=dict)  # further settings of the job

    @property
    def told(self) -> list[str]:
        """The command as it may be written down and shown: passwords and tokens in URLs are hidden."""
        return [redact(word) for word in self.command]


@dataclass(frozen=True)
class Run:
    """One run that is submitted: what its training is started with, and where it lies."""

    name: str
    folder: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A submission that nothing is known to be wrong with."""

    request: Request
    name: str  # of the run, or of the sweep
    folder: Path  # its scripts and logs lie here
    runs: tuple[Run, ...]
    script: str
    probes: tuple[ProbeJob, ...]
    wrapper: str | None  # Python inside a container
    lines: tuple[str, ...]  # what follows from it, in words

    @property
    def is_array(self) -> bool:
        return bool(self.request.arrays or self.request.array_file)


@dataclass(frozen=True)
class Queued:
    """What SLURM has taken."""

    job: str
    probes: tuple[str, ...]
    script: Path


def plan_submission(request: Request, check_cluster: bool = True) -> Plan:
    """Check all of a submission and write its scripts, in memory. Reads only.

    Raises ValueError and OSError for everything that is known to be wrong with it: the cluster's part (unless not
    `check_cluster`), the configuration, the data, the arithmetic of the batch, the run folder and the environment.
    """
    probe = replace(request.probe, resources=with_time(request.probe.resources, PROBE_SECONDS, check_cluster))
    if check_cluster:
        lines = check_resources(request.resources)
        if request.probe.data:
            check_resources(probe.resources, what="the probe job: ")
    else:
        lines = ["there is no SLURM here: partition, nodes, GPUs, time and the queue are not checked"]
    check_interpreter(request.python, request.site)
    base = load_config(request.preset, request.overrides)
    swept = bool(request.arrays or request.array_file)
    elements = [Element(base.name, ())]
    if swept:
        elements = sweep_elements(base.name, request.arrays, request.array_file, request.overrides)
        most = array_limit() if check_cluster else None
        if most is not None and len(elements) > most:
            raise ConfigError(f"the sweep has {len(elements)} runs, and this cluster takes arrays of {most}; split it")
    runs: list[Run] = []
    told: list[list[str]] = []
    for element in elements:
        check_not_queued(Path(base.runs).absolute() / element.name, ask_slurm=check_cluster)
        try:
            run, said = _check_element(request, element, base.name if swept else None)
        except ConfigError as error:
            raise ConfigError(f"{element.name}: {error}" if swept else str(error)) from None
        runs.append(run)
        told.append(said)
    lines += _once(runs, told)
    check_probes(probe, base)
    folder = Path(base.runs).absolute() / base.name
    lines += local_lines(_places(request, base))
    check_writable(folder)
    wrapper = None if request.site.container is None else container_python(request.site.container)
    python = request.python if wrapper is None else str(folder / "jobs" / "python")
    script = _script(request, base.name, folder, [run.arguments for run in runs], python)
    probes = probe_jobs(
        probe,
        [run.folder for run in runs],
        name=base.name,
        folder=folder,
        array=_array(request, len(runs)),
        settings=settings_of(request.site, python, request.variables),
        written_by=bash_words(request.told),
    )
    return Plan(request, base.name, folder, tuple(runs), script, tuple(probes), wrapper, tuple(lines))


def queue(plan: Plan) -> Queued:
    """Hand a plan to SLURM: the training job, then its probes; all of them, or none.

    The scripts are kept in `jobs/` of the run, and its history says what was submitted; where that can't be written, as
    on a full disk, nothing stays queued.
    """
    for folder in {plan.folder, *(run.folder for run in plan.runs)}:
        for part in ("jobs", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    with (plan.folder / "jobs" / ".lock").open("a+", encoding="utf-8") as file:
        if not lock(file):
            raise ConfigError(f"{plan.folder} is being submitted by another process; wait for it, then look at its job")
        for run in plan.runs:  # between the plan and the lock, another may have been queued
            check_not_queued(run.folder)
        if plan.wrapper is not None:
            wrapper = plan.folder / "jobs" / "python"
            write_text(wrapper, plan.wrapper)
            mode = wrapper.stat().st_mode
            wrapper.chmod(mode | (mode & 0o444) >> 2)  # to be run by whom the umask lets read it
        jobs: list[str] = []
        try:
            job, script = _sbatch(plan.script, plan.folder, "pretrain", [])
            jobs.append(job)
            for probe in plan.probes:
                number, _ = _sbatch(probe.script, plan.folder, "probe", probe.dependency(job))
                jobs.append(number)
            queued = Queued(jobs[0], tuple(jobs[1:]), script)
            _remember(plan, queued)
        except OSError as error:
            raise OSError(f"{error}; {_take_back(jobs)}" if jobs else str(error)) from error
        except BaseException:  # Ctrl-C
            if jobs:
                _take_back(jobs)
            raise
    return queued


def _check_element(request: Request, element: Element, sweep: str | None) -> tuple[Run, list[str]]:
    """Check one run, and solve the arithmetic of its batch."""
    overrides = [*request.overrides, *element.overrides]
    if sweep is not None:
        overrides += [f"name={element.name}"]
        given = {override.partition("=")[0] for override in overrides}
        for key, value in (("tracking.group", sweep), ("tracking.job_type", "sweep")):
            overrides += [f"{key}={value}"] if key not in given else []
    if request.probe.every is not None:
        overrides += [f"checkpoint.milestone_every_epochs={request.probe.every:g}"]
    config, notes = load_noting(request.preset, overrides)
    ranks = request.resources.ranks
    fixed = any(override.partition("=")[0] == "train.grad_accum_steps" for override in overrides)
    accumulation = solve_accumulation(config, ranks, request.micro_batch, fixed)
    if accumulation != config.train.grad_accum_steps:
        overrides += [f"train.grad_accum_steps={accumulation}"]
        config = load_config(request.preset, overrides)
    folder = Path(config.runs).absolute() / config.name
    check_writable(folder)
    checked = check_run_to_submit(config, ranks)
    preset = request.preset if not request.preset.startswith("-") else f"./{request.preset}"
    begun = newest_checkpoint(folder)
    goes_on = [f"continues {folder} from its checkpoint of step {begun:,}"] if begun >= 0 else []
    return Run(config.name, folder, (preset, *overrides)), [*goes_on, *notes, *checked.chosen, *plan_of(checked, ranks)]


def _once(runs: Sequence[Run], told: Sequence[Sequence[str]]) -> list[str]:
    """What is told of every run, once, then what is told of each."""
    of_all = [line for line in told[0] if all(line in said for said in told)]
    return of_all + [
        f"{run.name}: {line}" for run, said in zip(runs, told, strict=True) for line in said if line not in of_all
    ]


def _places(request: Request, config: Config) -> dict[str, Path]:
    """Paths that every node has to see."""
    places = {"this folder": Path.cwd(), "the run folder": Path(config.runs).absolute()}
    if request.site.container is None:
        places["the jobs' Python"] = Path(request.python).parent  # not what it links to: a venv's own folder matters
    for source in [config.data.train] if isinstance(config.data.train, str) else [s.path for s in config.data.train]:
        if "://" not in source:
            places["the data"] = Path(source)
    return places


def _array(request: Request, count: int) -> str | None:
    if not (request.arrays or request.array_file):
        return None
    ceiling = "" if request.array_max is None else f"%{request.array_max}"
    return f"0-{count - 1}{ceiling}"


def _script(request: Request, name: str, folder: Path, elements: Sequence[Sequence[str]], python: str) -> str:
    array = _array(request, len(elements))
    lines = [
        sbatch_line("job-name", name),
        sbatch_line("chdir", str(Path.cwd())),
        sbatch_line("output", log_pattern(str(folder / "logs"), "%j.out" if array is None else "%A_%a.out")),
        sbatch_line("open-mode", "append"),
        sbatch_line("requeue"),
        *([] if array is None else [sbatch_line("array", array)]),
        *request.resources.lines(),
    ]
    settings = [*settings_of(request.site, python, request.variables), *set_arguments(elements, array is not None)]
    return render("pretrain", lines, settings, bash_words(request.told))


def _sbatch(script: str, folder: Path, kind: str, options: Sequence[str]) -> tuple[str, Path]:
    """Submit a script that is kept as `jobs/KIND-JOB.sbatch`; its job and the file."""
    path = folder / "jobs" / f".{kind}-{os.getpid()}.sbatch"
    write_text(path, script)
    try:
        said = ask(["sbatch", "--parsable", *options, str(path)])
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    job = said.strip().splitlines()[-1].partition(";")[0]  # JOB, or JOB;CLUSTER
    kept = path.with_name(f"{kind}-{job}.sbatch")
    try:
        path.rename(kept)
    except OSError:  # the job is queued all the same, and must be known to be
        kept = path
    return job, kept


def _take_back(jobs: Sequence[str]) -> str:
    """Cancel what was queued before a later part was refused, and say so."""
    try:
        ask(["scancel", *jobs])
    except OSError as failed:
        return f"{' '.join(jobs)} had been queued and can't be taken back ({failed})"
    return f"what had been queued, {' '.join(jobs)}, was taken back"


def _remember(plan: Plan, queued: Queued) -> None:
    for number, run in enumerate(plan.runs):
        element = f"_{number}" if plan.is_array else ""
        log = plan.folder / "logs" / (f"{queued.job}{element}.out")
        probes = [
            job if probe.element is not None or not plan.is_array else f"{job}{element}"
            for job, probe in zip(queued.probes, plan.probes, strict=True)
            if probe.element in (None, number)
        ]
        record(
            run.folder,
            "submitted",
            jobs=[f"{queued.job}{element}"],
            probes=probes,
            command=plan.request.told,
            log=str(log),
            script=str(queued.script),
        )
    if plan.is_array:
        elements = [{"name": run.name, "arguments": list(run.arguments)} for run in plan.runs]
        write_text(plan.folder / "sweep.json", json.dumps({"job": queued.job, "runs": elements}, indent=2) + "\n")
