"""What a run is and how it stands, for the head of the page; every metric in numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.wording import counted
from launch.report import chronicle
from launch.report.markup import Html, element, table
from launch.report.read import Run
from pretrain.methods.registry import METHODS


def state_of(run: Run) -> tuple[str, str]:
    """(kind, words): `done`, `going`, `waiting` or `ended`, and what is known of it."""
    if run.is_finished:
        return "done", "finished"
    jobs = chronicle.jobs_of(run.history)
    if jobs and jobs[-1].outcome:
        job = jobs[-1]
        if any(event.get("event") == "requeued" for event in job.events):
            return "waiting", job.outcome
        return ("done" if job.outcome == "finished" else "ended"), job.outcome
    if not jobs and any(event.get("event") == "submitted" for event in run.history):
        return "waiting", "submitted, not started yet"
    if not run.metrics.num_rows:
        return "waiting" if not jobs else "going", "no step is logged yet"
    return "going", f"last sign of life {_when(_modified(run.folder / 'metrics.jsonl'))}"


def tiles(run: Run) -> Html:
    """The numbers that are looked at first."""
    series = run.metrics.series
    kind, words = state_of(run)
    step, total = run.metrics.last_step or run.card.get("step") or 0, run.total_steps
    share = min(1.0, step / total) if total else None
    bar = element("progress", value=f"{share:.4f}", max=1) if share is not None else None
    shown = [_tile("state", words, kind=kind)]
    shown.append(_tile("step", f"{step:,}", f"of {total:,}" if total else "", bar))
    loss = series.get("loss")
    if loss is not None and loss.last is not None:
        low = (loss.extent() or (loss.last,))[0]
        shown.append(_tile("loss", f"{loss.last:.4g}", f"lowest {low:.4g}"))
    speed, wait = series.get("images_per_second"), series.get("data_wait")
    if speed is not None and speed.last is not None:
        more = [] if wait is None or wait.last is None else [f"waiting for data {100 * wait.last:.1f}\u00a0%"]
        mfu = series.get("mfu")
        more += [] if mfu is None or mfu.last is None else [f"MFU {100 * mfu.last:.0f}\u00a0%"]
        shown.append(_tile("images per second", f"{speed.last:,.0f}", ", ".join(more)))
    restarts, alarms = len(list(chronicle.starts_of(run.history))), len(chronicle.alarms_of(run.history))
    if run.history:
        shown.append(
            _tile(
                "restarts",
                str(restarts),
                f"{alarms} alarm{'s' if alarms != 1 else ''}",
                kind="alarmed" if alarms else "",
            )
        )
    return element("div", *shown, class_="tiles")


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run is, as (name, value)."""
    setting = run.setting
    encoder = setting("encoder", default=None)
    encoder = encoder if isinstance(encoder, dict) else {}
    batch, accumulation = setting("train", "batch_size"), setting("train", "grad_accum_steps", default=1)
    ranks = next((event.get("ranks") for event in reversed(run.history) if event.get("event") == "started"), None)
    sources = setting("data", "train")
    if isinstance(sources, list):
        sources = ", ".join(str(part.get("path") if isinstance(part, dict) else part) for part in sources)
    epochs = run.metrics.last_row.get("epoch")
    crops = setting("views", "global_crops", default=[])
    local = setting("views", "local_crops")
    views = [f"{len(crops)} x {_size(crops[0])}"] if isinstance(crops, list) and crops else []
    if isinstance(local, dict):
        views.append(f"{local.get('count')} x {_size(local)}")
    method = METHODS.get(str(setting("method", "name")))
    shown = (method.shown,) if method is not None and method.shown else ()
    rows: list[tuple[str, Any]] = [
        ("method", _named(setting("method"), "name", shown)),
        (
            "encoder",
            encoder.get("model")
            or _named(encoder, "family", ("size", "dim", "depth", "depths", "heads", "patch", "window")),
        ),
        ("parameters exported", "" if run.num_parameters is None else f"{run.num_parameters / 1e6:,.2f} million"),
        ("data", sources),
        ("crops", " + ".join(views) + " px" if views else ""),
        ("seen so far", _seen(run.metrics.last_step, batch, epochs)),
        (
            "global batch",
            ""
            if batch is None
            else f"{batch:,}"
            + (
                f" = {counted(ranks or 0, 'rank')} x {batch // (ranks * accumulation)} x {accumulation} accumulated"
                if _divides(batch, ranks, accumulation)
                else ""
            )
            if isinstance(batch, int)
            else str(batch),
        ),
        (
            "arithmetic",
            f"{setting('engine', 'precision', default='')}, ZeRO {setting('engine', 'zero_stage', default='?')}"
            if run.config
            else "",
        ),
        ("starts from", setting("init_from") or ""),
        ("seed", setting("seed")),
        ("checkpoints", _checkpoints(run)),
        ("folder", str(run.folder)),
        ("last row written", _when(_modified(run.folder / "metrics.jsonl"))),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def metrics_table(run: Run) -> Html | None:
    """Every metric in numbers, for those who cannot see the curves, and for printing."""
    rows = []
    for name, thinned in run.metrics.series.items():
        extent = thinned.extent()
        shown = ("-",) * 3 if extent is None else tuple(f"{value:,.6g}" for value in (thinned.last, *extent))
        rows.append((name, *shown, thinned.num_bad or ""))
    if not rows:
        return None
    summary = f"all {len(rows)} metrics of {run.metrics.num_rows:,} rows in numbers"
    header = ("metric", "last", "lowest", "highest", "not finite")
    return element("details", element("summary", summary), table(header, rows))


def _tile(name: str, value: str, note: str = "", extra: Html | None = None, kind: str = "") -> Html:
    size = "words" if len(value) > 12 else None
    return element(
        "div",
        element("span", name, class_="name"),
        element("span", value, class_=f"value {size or ''}".strip()),
        extra,
        element("span", note, class_="note") if note else None,
        class_=f"tile {kind}".strip(),
    )


def _checkpoints(run: Run) -> str:
    if not run.checkpoints:
        return ""
    return f"{len(run.checkpoints)} kept, the last of step {run.checkpoints[-1]:,}"


def _named(section: Any, tag: str, keys: Sequence[str]) -> str:
    if not isinstance(section, dict):
        return ""
    details = [f"{key} {section[key]}" for key in keys if section.get(key) is not None]
    return ", ".join([str(section.get(tag, "")), *details])


def _size(view: Any) -> str:
    size = view.get("size") if isinstance(view, dict) else None
    if isinstance(size, list) and len(set(map(str, size))) == 1:
        return str(size[0])
    return "x".join(map(str, size)) if isinstance(size, list) else str(size)


def _seen(step: int | None, batch: Any, epoch: Any) -> str:
    if step is None or not isinstance(batch, int):
        return ""
    epochs = f" ({epoch:.2f} epochs)" if isinstance(epoch, int | float) else ""
    return f"{step * batch:,} images{epochs}"


def _divides(batch: Any, ranks: Any, accumulation: Any) -> bool:
    whole = all(isinstance(value, int) and value > 0 for value in (batch, ranks, accumulation))
    return whole and batch % (ranks * accumulation) == 0


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
