"""A layout as a workspace of wandb's, through its own package `wandb-workspaces`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.files import read_json, write_json
from launch.dashboard.layout import Layout, Panel
from pretrain.tracking.wandb_identity import wandb_mode

FILE = "dashboard.json"  # in the folder of the first run: which workspace is its
TIMEOUT_SECONDS = 20


def save(layout: Layout, folder: Path) -> str:
    """Create the workspace, or bring the one that `folder` remembers to this layout; its URL.

    Raises ValueError and OSError that say what is missing: the package, a login, the server.
    """
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError:
        raise ValueError(
            "`selfsight dashboard` needs the package wandb-workspaces: pip install '.[dashboard]' in the checkout; "
            "--dry-run shows the layout without it"
        ) from None
    layout = replace(layout, entity=layout.entity or _default_entity())
    workspace = workspace_of(layout)
    known = read_json(folder / FILE)
    if isinstance(known, dict) and known.get("project") == layout.project and known.get("entity") == layout.entity:
        workspace._internal_name, workspace._internal_id = known["name"], known["id"]
    try:
        workspace.save()
    except Exception as error:  # of wandb's many kinds
        raise OSError(f"wandb did not take the workspace: {_first_line(error)}") from error
    view = {"entity": layout.entity, "project": layout.project}
    view |= {"name": workspace._internal_name, "id": workspace._internal_id, "url": workspace.url}
    write_json(folder / FILE, view)
    return str(workspace.url)


def workspace_of(layout: Layout) -> Any:
    """The `wandb_workspaces` object; asks nobody."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.workspaces as ws

    whose = [expr.Metric("Group") == layout.group] if layout.group else [expr.Metric("ID").isin(list(layout.run_ids))]
    return ws.Workspace(
        entity=layout.entity or "",
        project=layout.project,
        name=layout.name,
        sections=[
            ws.Section(name=section.name, is_open=section.is_open, panels=[_panel(panel) for panel in section.panels])
            for section in layout.sections
        ],
        settings=ws.WorkspaceSettings(x_axis="step", max_runs=20),
        runset_settings=ws.RunsetSettings(filters=whose),
    )


def as_json(layout: Layout) -> str:
    """What would be sent to wandb, as JSON."""
    view = workspace_of(replace(layout, entity=layout.entity or "ENTITY"))._to_model()
    return json.dumps(json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)), indent=2)


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    grouped: dict[str, Any] = {}
    if panel.by_method:
        grouped = {"groupby": wr.Config("method.name"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    if panel.kind == "pictures":
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.metrics), gallery_axis="step")
    if panel.kind == "bars":
        return wr.BarPlot(title=panel.title, metrics=list(panel.metrics), **grouped)
    return wr.LinePlot(
        title=panel.title, x=panel.x, y=list(panel.metrics), metric_regex=panel.pattern, title_x=panel.x, **grouped
    )


def _default_entity() -> str:
    """Whose workspaces are made where nobody is named: of who is logged in; the first question to the server."""
    if wandb_mode("auto") != "online":
        raise ValueError(
            "nobody is logged in to wandb here (or WANDB_MODE says offline); run `wandb login` on a machine that "
            "reaches the server, or see `--dry-run` and `selfsight report`"
        )
    import wandb

    try:
        entity = wandb.Api(timeout=TIMEOUT_SECONDS).default_entity
    except Exception as error:
        raise OSError(
            f"the wandb server can't be asked ({_first_line(error)}); is this machine online, and WANDB_BASE_URL "
            "right? `selfsight report` needs no server"
        ) from error
    if not entity:
        raise ValueError("wandb knows no default entity for this login; name one with --entity")
    return str(entity)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
