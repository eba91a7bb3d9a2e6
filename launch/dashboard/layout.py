"""What a dashboard of runs shows, as plain values: sections of panels, from what the runs have written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval import registry
from launch.known_metrics import DIAGNOSTICS, HIDDEN, KNOWN, LOSS, SCHEDULES, SPEED, known_as
from pretrain.config.load import load_config
from pretrain.tracking.metrics_log import read_rows
from pretrain.tracking.wandb_identity import stored_identity
from pretrain.tracking.wandb_run import picture_key

MACHINES = {
    "CPU of every node, %": "cpu_percent",
    "Memory left, GB": "memory_available_gb",
    "The run's processes, GB": "processes_gb",
    "Open files": "open_files",
    "Swap, GB": "swap_used_gb",
    "Disk of the run, GB free": "run_disk_free_gb",
    "Disk of the cache, GB free": "cache_disk_free_gb",
    "Disks, MB read a second": "disk_read_mb_per_s",
    "Network, MB in a second": "network_in_mb_per_s",
    "Network, MB out a second": "network_out_mb_per_s",
    "GPUs in use, %": "gpu[0-9]+/utilisation_percent",
    "GPUs, GB": "gpu[0-9]+/memory_used_gb",
    "GPUs, degrees": "gpu[0-9]+/temperature_c",
    "GPUs, W": "gpu[0-9]+/power_w",
    "GPUs slowed by heat or power": "gpu[0-9]+/throttled",
}


@dataclass(frozen=True)
class Panel:
    """A chart of `metrics` over `x`, of all whose name matches `pattern`, bars of last values, or pictures."""

    title: str
    kind: Literal["lines", "bars", "pictures"] = "lines"
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    x: str = "step"
    by_method: bool = False  # one line a method: the mean of its runs, with their standard deviation


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]
    is_open: bool = True


@dataclass(frozen=True)
class Layout:
    """A workspace: of which runs, and what it shows of them."""

    name: str
    project: str
    entity: str | None
    group: str | None
    run_ids: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())


def layout_of(runs: Sequence[Path], name: str | None = None) -> Layout:
    """The dashboard of some runs of one project: of their group, where they have one and the same, else of themselves.

    Raises ValueError where a run has no wandb run, or they are of several projects.
    """
    identities = [_identity(run) for run in runs]
    projects = sorted({(str(identity["project"]), identity.get("entity")) for identity in identities}, key=str)
    if len(projects) > 1:
        listed = ", ".join("/".join(filter(None, (entity, project))) for project, entity in projects)
        raise ValueError(f"these runs are in several projects of wandb: {listed}; a dashboard is of one")
    configs = [load_config(run / "config.yaml") for run in runs]
    groups = {config.tracking.group for config in configs}
    group = groups.pop() if len(groups) == 1 else None
    (project, entity) = projects[0]
    return Layout(
        name=name or group or (configs[0].name if len(runs) == 1 else f"{configs[0].name} and {len(runs) - 1} more"),
        project=project,
        entity=entity,
        group=group,
        run_ids=tuple(identity["id"] for identity in identities),
        sections=sections(runs, several_methods=len({config.method.name for config in configs}) > 1 or bool(group)),
    )


def sections(runs: Sequence[Path], several_methods: bool) -> tuple[Section, ...]:
    """What there is to show of runs, by the names of what they logged."""
    logged = sorted({key for run in runs for key in _names(run / "metrics.jsonl")} - HIDDEN, key=_place)
    by_method = (Panel("loss by method", metrics=("loss",), by_method=True),) if several_methods else ()
    pictures = sorted({picture_key(path) for run in runs for path in (run / "pictures").glob("*-????????.png")})

    def curves(*groups: str) -> tuple[Panel, ...]:
        names = [name for group in groups for name in logged if known_as(name).group == group]
        return tuple(Panel(name, metrics=(name,)) for name in names)

    found = (
        Section("Loss and schedules", by_method + curves(LOSS, SCHEDULES)),
        Section("Speed and memory", curves(SPEED)),
        Section("Diagnostics and collapse", curves(DIAGNOSTICS)),
        Section("Probes", _probes(several_methods)),
        Section(
            "Machines, node by node",
            tuple(Panel(title, pattern=f"system/.*/{name}") for title, name in MACHINES.items()),
            is_open=False,
        ),
        Section("Pictures", tuple(Panel(key.partition("/")[2], "pictures", (key,)) for key in pictures)),
    )
    return tuple(section for section in found if section.panels)


def as_text(layout: Layout) -> str:
    """The layout for a person to read."""
    where = "/".join(filter(None, (layout.entity or "(your entity)", layout.project)))
    runs = f"{'run' if len(layout.run_ids) == 1 else 'runs'} {', '.join(layout.run_ids)}"
    of = f"group {layout.group}" if layout.group else runs
    lines = [f"workspace {layout.name!r} in {where}, of {of}"]
    for section in layout.sections:
        lines.append(f"  {section.name}{'' if section.is_open else ' (closed)'}")
        for panel in section.panels:
            shown = panel.pattern or ", ".join(panel.metrics)
            over = f" over {panel.x}" if panel.kind == "lines" else ""
            lines.append(f"    {panel.kind:8} {panel.title}: {shown}{over}{' by method' if panel.by_method else ''}")
    return "\n".join(lines)


def _probes(by_method: bool) -> tuple[Panel, ...]:
    unasked = ("knn", "linear")  # those of classes, which every probe of a run has
    names = (*unasked, *(name for name in registry.built_in() if name not in unasked))
    with_errors = tuple(
        Panel(
            f"{name}, with one standard error",
            metrics=(f"probe/{name}", f"probe/{name}_low", f"probe/{name}_high"),
            x="probe/step",
        )
        for name in names
    )
    return (
        *with_errors,
        *(Panel(f"last {name}", "bars", (f"probe/{name}",), by_method=by_method) for name in unasked),
    )


def _place(name: str) -> tuple[int, str]:
    """Where a metric stands: those that are known in their order, the others by name."""
    order = list(KNOWN)
    return (order.index(name) if name in KNOWN else len(order)), name


def _names(log: Path) -> set[str]:
    return {key for row in read_rows(log) for key in row}


def _identity(run: Path) -> dict[str, Any]:
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is no run folder (it has no config.yaml); give runs/NAME")
    identity = stored_identity(run)
    if "id" not in identity or "project" not in identity:
        raise ValueError(
            f"{run} has no wandb run: it was trained with tracking.wandb=disabled. Continue it with offline or online, "
            "or see `selfsight report`, which needs no wandb"
        )
    return identity
