"""The probe jobs behind a training job, and beside it.

Behind it, one job for each data set waits until training has finished (afterok; of an array, each element's for its
own). Beside it, one long small job for each data set watches for milestone checkpoints (`selfsight probe --follow`).
One watcher instead of a job for each milestone: nothing has to call sbatch from a compute node, which some sites
forbid, and a preempted or requeued training leaves no second set of jobs behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eval.base import LabelKind
from launch.cluster.quoting import log_pattern, sbatch_line
from launch.cluster.render import render, set_arguments
from launch.cluster.resources import Resources
from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.methods.registry import spec_of


@dataclass(frozen=True)
class ProbeOptions:
    """What is probed, how often, and with what."""

    data: tuple[str, ...] = ()
    every: float | None = None  # epochs, while training runs
    also: tuple[str, ...] = ()  # further probes by name
    group_by: str | None = None  # a field of each sample's .json, such as of patients, who stay together
    label: str | None = None  # a field of it that is to be predicted
    label_kind: LabelKind | None = None
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class ProbeJob:
    """A batch script, and when SLURM may start it."""

    script: str
    follows: bool = False
    element: int | None = None  # of an array, the one that it belongs to; None: all of them
    array: bool = False

    def dependency(self, job: str) -> list[str]:
        """sbatch's options for a job behind the training job `job`; it goes when that can't happen any more."""
        if self.follows:
            return [f"--dependency=after:{job}" + ("" if self.element is None else f"_{self.element}")]
        return [f"--dependency={'aftercorr' if self.array else 'afterok'}:{job}", "--kill-on-invalid-dep=yes"]


def check_probes(options: ProbeOptions, config: Config) -> None:
    """Refuse probes of what can't be probed: the data are opened. Imports torch."""
    from eval import registry
    from eval.splits import open_splits

    if not options.data:
        for option, given, what in (
            ("every", options.every, "how often to probe"),
            ("also", options.also or None, "which further probes to run"),
            ("group-by", options.group_by, "what belongs together"),
            ("label", options.label, "what is predicted"),
            ("label-kind", options.label_kind, "what kind of label is predicted"),
        ):
            if given is not None:
                raise ConfigError(f"--probe-{option} says {what}, but not on what; add --probe DATA")
        return
    registry.check_names(options.also)
    if spec_of(config.method).exports != "encoder":
        raise ConfigError(
            f"--probe: method {config.method.name} leaves a tokenizer, and probes are of encoders; leave it out"
        )
    for data in options.data:
        splits = open_splits(data, None, options.group_by, options.label, options.label_kind)
        registry.chosen(options.also, kind=splits.labels.kind)  # a probe of other labels is refused


def probe_jobs(
    options: ProbeOptions,
    runs: Sequence[Path],
    *,
    name: str,
    folder: Path,
    array: str | None,
    settings: Sequence[str],
    written_by: str,
) -> list[ProbeJob]:
    """The scripts of all probe jobs of `runs`, which are the elements of an array unless `array` is None."""

    def script(kind: str, lines: Sequence[str], arguments: Sequence[Sequence[str]], log: str) -> str:
        header = [
            sbatch_line("job-name", f"{name}-{kind}"),
            sbatch_line("chdir", str(Path.cwd())),
            sbatch_line("output", log_pattern(str(folder / "logs"), log)),
            sbatch_line("open-mode", "append"),
            sbatch_line("requeue"),
            *lines,
            *replace(options.resources, nodes=1, tasks_per_node=1).lines(),
        ]
        # only a job whose lines name an array has elements
        chosen = set_arguments(arguments, array=any(line.startswith("#SBATCH --array") for line in lines))
        return render("probe", header, [*settings, *chosen], written_by)

    how = [argument for name in options.also for argument in ("--also", name)]
    for option, value in (
        ("--group-by", options.group_by),
        ("--label", options.label),
        ("--label-kind", options.label_kind),
    ):
        how += [] if value is None else [option, value]
    jobs = []
    for data in options.data:
        arguments = [(str(run), "--data", data, *how) for run in runs]
        lines = [] if array is None else [sbatch_line("array", array)]
        log = "probe-%j.out" if array is None else "probe-%A_%a.out"
        jobs.append(ProbeJob(script("probe", lines, arguments, log), array=array is not None))
    if options.every is None:
        return jobs
    for data in options.data:
        for number, run in enumerate(runs):
            text = script("follow", [], [(str(run), "--data", data, *how, "--follow")], "follow-%j.out")
            jobs.append(ProbeJob(text, follows=True, element=None if array is None else number))
    return jobs
