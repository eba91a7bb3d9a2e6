"""The `selfsight` commands for SLURM clusters."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.data_commands import changes_of
from launch.probe_command import label_kind_named

SUBMIT_EXAMPLES = (
    "Examples:\n\n"
    "[bold]selfsight submit mae_vitb16_in1k_800 --data /shared/in1k --nodes 4 --gpus-per-node 8 --time 24:00:00[/]\n\n"
    "[bold]selfsight submit my.yaml --nodes 2 --micro-batch 64 --probe /shared/labelled --dry-run[/]\n\n"
    "[bold]selfsight submit my.yaml --array optim.lr=1e-3,5e-4 --array seed=0,1 --array-max 2[/]\n\n"
    "[bold]selfsight submit --site-example > ~/.config/selfsight/site.yaml[/]"
)
_JOB, _PROBES, _SWEEP, _SITE = "What the job asks for", "Probes", "Sweeps", "The cluster"


def submit(
    preset: Annotated[str | None, typer.Argument(help="A preset's name, or the path of a .yaml file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the preset.")] = None,
    data: Annotated[str | None, typer.Option(help="The training shards; short for data.train=PATH.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the run, or of the sweep; short for name=NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts and the plan; queue nothing.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: 1.", rich_help_panel=_JOB)] = None,
    gpus_per_node: Annotated[
        str | None, typer.Option(help="A number, or TYPE:NUMBER; one process each.", rich_help_panel=_JOB)
    ] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes, where there are no GPUs.", rich_help_panel=_JOB)
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Cores of a GPU's process.", rich_help_panel=_JOB)
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of a node: 200G; 0 is all.", rich_help_panel=_JOB)] = None,
    time: Annotated[
        str | None, typer.Option(help="Limit of a job: minutes, HH:MM:SS or D-HH:MM.", rich_help_panel=_JOB)
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images of a GPU at a time; chooses train.grad_accum_steps.", rich_help_panel=_JOB),
    ] = None,
    signal_seconds: Annotated[
        int | None,
        typer.Option(min=1, help="So long before the limit a checkpoint is written; 180.", rich_help_panel=_JOB),
    ] = None,
    preflight: Annotated[
        bool, typer.Option(help="Look at every node before training (seconds).", rich_help_panel=_JOB)
    ] = True,
    exclude_sick: Annotated[
        bool, typer.Option("--exclude-sick", help="Go on without nodes that fail that look.", rich_help_panel=_JOB)
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(
            min=0, help="In a row without a newer checkpoint; then the job stays away. 3.", rich_help_panel=_JOB
        ),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="In a row, on the same nodes, before a failed job goes through the queue. 2.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other option of sbatch, such as reservation=x; repeatable.",
            rich_help_panel=_SITE,
        ),
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="NAME", help="A place that the site profile names.", rich_help_panel=_SITE)
    ] = None,
    partition: Annotated[str | None, typer.Option(help="One, or several: a,b.", rich_help_panel=_SITE)] = None,
    account: Annotated[str | None, typer.Option(rich_help_panel=_SITE)] = None,
    qos: Annotated[str | None, typer.Option(rich_help_panel=_SITE)] = None,
    constraint: Annotated[str | None, typer.Option(help="Features of nodes.", rich_help_panel=_SITE)] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes not to use.", rich_help_panel=_SITE)] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            help="A site profile; else $SELFSIGHT_SITE or ~/.config/selfsight/site.yaml.", rich_help_panel=_SITE
        ),
    ] = None,
    site_example: Annotated[
        bool, typer.Option("--site-example", help="Print a profile to edit, and stop.", rich_help_panel=_SITE)
    ] = False,
    probe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Probe on these labelled shards when training has finished.", rich_help_panel=_PROBES
        ),
    ] = None,
    probe_every: Annotated[
        float | None, typer.Option(help="Also every so many epochs, while it runs.", rich_help_panel=_PROBES)
    ] = None,
    probe_also: Annotated[
        list[str] | None,
        typer.Option(metavar="PROBE", help="A further probe, such as logistic; repeatable.", rich_help_panel=_PROBES),
    ] = None,
    probe_group_by: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="As `probe --group-by`, such as patient.", rich_help_panel=_PROBES),
    ] = None,
    probe_label: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="As `probe --label`, such as diagnosis.", rich_help_panel=_PROBES),
    ] = None,
    probe_label_kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="As `probe --label-kind`.", rich_help_panel=_PROBES)
    ] = None,
    probe_gpus: Annotated[
        int | None, typer.Option(min=0, help="Default: 1 where training has GPUs.", rich_help_panel=_PROBES)
    ] = None,
    probe_cpus: Annotated[
        int | None, typer.Option(min=1, help="Default: as --cpus-per-task.", rich_help_panel=_PROBES)
    ] = None,
    probe_time: Annotated[
        str | None, typer.Option(help="Limit of a probe job; 4 hours at most.", rich_help_panel=_PROBES)
    ] = None,
    probe_partition: Annotated[
        str | None, typer.Option(help="Default: as --partition.", rich_help_panel=_PROBES)
    ] = None,
    array: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2", help="A run for each value; repeated: for each combination.", rich_help_panel=_SWEEP
        ),
    ] = None,
    array_file: Annotated[
        Path | None, typer.Option(help="Runs as a YAML list of {key: value}.", rich_help_panel=_SWEEP)
    ] = None,
    array_max: Annotated[int | None, typer.Option(min=1, help="So many run at a time.", rich_help_panel=_SWEEP)] = None,
) -> None:
    """Queue a pretraining on a SLURM cluster, all of it checked first; the same again continues a run."""
    from launch.cluster.site import site_example as example

    if site_example:
        typer.echo(example(), nl=False)
        return
    if preset is None:
        raise ValueError(
            "which preset? `selfsight pretrain --list` shows them; a file of your own is named by its path"
        )
    from launch.cluster.options import JobOptions, job_variables, probe_resources, python_of, training_resources
    from launch.cluster.probes import ProbeOptions
    from launch.cluster.site import find_site, load_site
    from launch.cluster.submit import Request, plan_submission, queue

    profile = load_site(find_site(site), at)
    options = JobOptions(
        nodes=nodes, gpus_per_node=gpus_per_node, tasks_per_node=tasks_per_node, cpus_per_task=cpus_per_task,
        memory=memory, time=time, partition=partition, account=account, qos=qos, constraint=constraint,
        exclude=exclude, signal_seconds=signal_seconds, probe_gpus=probe_gpus, probe_cpus=probe_cpus,
        probe_time=probe_time, probe_partition=probe_partition, sbatch=tuple(sbatch or ()),
    )  # fmt: skip
    resources = training_resources(options, profile)
    request = Request(
        preset=preset,
        overrides=tuple(changes_of(overrides, data) + ([] if name is None else [f"name={name}"])),
        resources=resources,
        site=profile,
        python=python_of(profile),
        command=("selfsight", *sys.argv[1:]),
        micro_batch=micro_batch,
        arrays=tuple(array or ()),
        array_file=array_file,
        array_max=array_max,
        variables=job_variables(preflight, exclude_sick, max_failures, restarts),
        probe=ProbeOptions(
            data=tuple(probe or ()),
            every=probe_every,
            also=tuple(probe_also or ()),
            group_by=probe_group_by,
            label=probe_label,
            label_kind=label_kind_named(probe_label_kind, "--probe-label-kind"),
            resources=probe_resources(options, profile, resources),
        ),
    )
    typer.echo("checking settings, data, cluster and run folder; nothing is queued before that", err=True)
    plan = plan_submission(request, check_cluster=not dry_run or shutil.which("sinfo") is not None)
    lines = "\n".join(f"# {line}" for line in plan.lines)
    if dry_run:
        scripts = [plan.script, *(job.script for job in plan.probes), *([plan.wrapper] if plan.wrapper else [])]
        typer.echo("\n".join([*scripts, lines]))
        return
    queued = queue(plan)
    typer.echo(lines)
    told = (
        f"job {queued.job}: {len(plan.runs)} runs of {plan.name}" if plan.is_array else f"job {queued.job}: {plan.name}"
    )
    behind = f", probes in {', '.join(queued.probes)}" if queued.probes else ""
    typer.echo(f"queued {told}{behind}; logs in {os.path.relpath(plan.folder / 'logs')}")
