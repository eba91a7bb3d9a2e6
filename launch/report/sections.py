"""The parts of a page beside its curves: what the run is, its probes, pictures, history, configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval.report import Measured, Results, read_results
from launch.report import chronicle
from launch.report.markup import Html, element, joined, table
from launch.report.pictures import frames_of, spread
from launch.report.read import Run

_TAIL_LINES, _TAIL_BYTES = 25, 8192
_CAPTIONS = {
    "crops": "what the loader gave in that step",
    "reconstructions": "image, what the network was given, what it made of it",
}


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
    for column, value, baseline in _best(run):
        shown.append(_tile(column, f"{100 * value.share:.1f}\u00a0%", f"± {100 * (value.error or 0):.1f}{baseline}"))
    speed, wait = series.get("images_per_second"), series.get("data_wait")
    if speed is not None and speed.last is not None:
        waiting = "" if wait is None or wait.last is None else f"waiting for data {100 * wait.last:.1f}\u00a0%"
        shown.append(_tile("images per second", f"{speed.last:,.0f}", waiting))
    restarts, alarms = len(list(chronicle.starts_of(run.history))), len(list(chronicle.alarms_of(run.history)))
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
    batch, accumulation = setting("train", "batch_size"), setting("train", "accumulation", default=1)
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
    rows: list[tuple[str, Any]] = [
        ("method", _named(setting("method"), "name", ("target", "prototypes", "codes", "vocabulary"))),
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
                f" = {ranks} ranks x {batch // (ranks * accumulation)} x {accumulation} accumulated"
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


def probes(run: Run, problems: list[str]) -> Html | None:
    """Every probe: a plot with error bars beside its table."""
    shown = []
    for name, results in sorted(run.probes, key=lambda probe: _step_of(probe[1])):
        try:
            told = read_results(results)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            problems.append(f"eval/{name} is not a result of `selfsight probe` as this version writes it ({error!r})")
            continue
        rows = [(row, *("-" if value is None else value for value in values)) for row, values in told.rows]
        notes = element("ul", *(element("li", note) for note in told.notes), class_="notes")
        shown.append(
            element(
                "article",
                element("h3", told.title),
                element("div", _plot(told), table(["", *told.columns], rows, "top-1 in %"), class_="beside"),
                notes,
            )
        )
    if not shown:
        return None
    *earlier, last = shown
    if not earlier:
        return last
    return joined([last, element("details", element("summary", f"{len(earlier)} earlier probes"), *reversed(earlier))])


def probes_compared(runs: Sequence[Run]) -> Html | None:
    """The pretrained row of each run's newest probe, beside the untrained one, as one table."""
    found: list[tuple[str, Results]] = []
    for run in runs:
        for name, results in sorted(run.probes, key=lambda probe: _step_of(probe[1]), reverse=True):
            try:
                found.append((f"{run.name}, step {_step_of(results):,} ({name})", read_results(results)))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError):
                continue
            break
    if len(found) < 2:
        return None
    columns = list(dict.fromkeys(column.rstrip("*") for _, told in found for column in told.columns))
    rows = []
    for name, told in found:
        values = {row: dict(zip((c.rstrip("*") for c in told.columns), cells, strict=True)) for row, cells in told.rows}
        shown = []
        for column in columns:
            ours, fresh = (values.get(row, {}).get(column) for row in ("pretrained", "untrained"))
            shown.append("-" if ours is None else f"{ours}" + ("" if fresh is None else f" ({100 * fresh.share:.1f})"))
        rows.append((name, *shown))
    return table(["", *columns], rows, "the newest probe of each run: top-1 in % (untrained)")


def galleries(runs: Sequence[Run], budget: int, problems: list[str]) -> Html | None:
    """Pictures over the steps; of several runs, the last of each."""
    wanted = [(run, name, steps) for run in runs for name, steps in sorted(run.pictures.items(), key=_crops_last)]
    if len(runs) > 1:
        wanted = [(run, name, spread(steps, 1)) for run, name, steps in wanted]
    shown = []
    for run, name, steps in wanted:
        frames = frames_of(steps, budget // len(wanted), problems)
        if not frames:
            continue
        words = name.replace("-", " ")
        label = f"{run.name}: {words}" if len(runs) > 1 else words
        images = [
            element(
                "figure",
                element(
                    "img", src=frame.uri, alt=f"{label} at step {frame.step:,}", width=frame.width, height=frame.height
                ),
                element("figcaption", f"step {frame.step:,}"),
                data_step=frame.step,
            )
            for frame in frames
        ]
        caption = _CAPTIONS.get(name)
        left_out = len(steps) - len(frames)
        notes = [caption] if caption else []
        notes += [f"{left_out} more in pictures/"] if left_out and len(runs) == 1 else []
        shown.append(
            element(
                "article",
                element("h3", label),
                element("p", "; ".join(notes), class_="note") if notes else None,
                element("div", *images, class_="strip", tabindex=0, role="group", aria_label=f"{label} over the steps"),
                class_="gallery",
            )
        )
    return element("div", *shown, class_="galleries side" if len(runs) > 1 else "galleries") if shown else None


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}"


def chronicle_of(run: Run) -> Html | None:
    """The jobs of a run, what else happened, and the end of its log."""
    jobs = chronicle.jobs_of(run.history)
    rows = [
        (
            job.number,
            job.job or "-",
            job.where,
            _short(job.began),
            chronicle.duration(job.waited),
            chronicle.duration(job.start_up),
            chronicle.duration(chronicle.seconds_of(job)),
            "" if job.first_step is None else f"{job.first_step:,}",
            "" if job.last_step is None else f"{job.last_step:,}",
            "" if job.repeated is None else f"{job.repeated:,}",
            job.outcome or "going on, as far as is known",
        )
        for job in jobs
    ]
    parts: list[Html] = []
    if rows:
        lost = sum(job.waited or 0 for job in jobs)
        again = sum(job.repeated or 0 for job in jobs)
        summary = _count(jobs, "start")
        if len(jobs) > 1:
            summary += f"; {chronicle.duration(lost)} between them; {again:,} steps done again"
        parts.append(element("p", summary, class_="note"))
        header = (
            "start",
            "job",
            "nodes",
            "began (UTC)",
            "waited",
            "start-up",
            "ran",
            "from step",
            "to step",
            "again",
            "how it ended",
        )
        parts.append(table(header, rows, numbers=False))
    others = [event for event in run.history if event.get("event") not in ("started",)]
    if others:
        listed = [
            element(
                "li",
                element("time", _short(str(event.get("time", "")))),
                " ",
                element("b", str(event.get("event", "")).replace("_", " ")),
                " ",
                chronicle.told(event),
                class_=f"event {'alarm' if event.get('event') in ('alarm', 'saved_not', 'given_up') else ''}".strip(),
            )
            for event in others[-200:]
        ]
        summary = _count(others, "event") + (", the last 200 shown" if len(others) > 200 else "")
        parts.append(element("details", element("summary", summary), element("ol", *listed), open=len(others) <= 12))
    logs = chronicle.logs_of(run.history)
    if logs:
        links = [element("li", _link(run, log)) for log in logs[:20]]
        parts.append(element("details", element("summary", _count(logs, "log file")), element("ul", *links)))
        tail = next((text for log in logs if (text := _tail(_log_path(run, log)))), None)
        if tail:
            parts.append(element("details", element("summary", "end of the newest log"), element("pre", tail)))
    return joined(parts) if parts else None


def configuration(run: Run) -> Html | None:
    """What differs from the preset, the versions, and the whole configuration."""
    parts: list[Html] = []
    preset, lines = _differences(run)
    if preset is not None:
        shown = element("ul", *(element("li", element("code", line)) for line in lines)) if lines else "nothing"
        parts.append(element("div", element("h3", f"Differs from the preset {preset} in"), shown))
    versions = chronicle.versions_of(run.history) or _probe_versions(run)
    if versions:
        parts.append(element("div", element("h3", "Versions"), table(("package", "version"), sorted(versions.items()))))
    if run.config_text:
        parts.append(element("details", element("summary", "config.yaml"), element("pre", run.config_text[:200_000])))
    return joined(parts) if parts else None


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


def _best(run: Run) -> Iterator[tuple[str, Measured, str]]:
    """The headline numbers of the newest probe: (column, value, words on the untrained encoder)."""
    for _, results in sorted(run.probes, key=lambda probe: _step_of(probe[1]), reverse=True):
        try:
            told = read_results(results)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue
        rows = dict(told.rows)
        marked = [place for place, column in enumerate(told.columns) if column.endswith("*")] or [0]
        places = [*marked, *(place for place, column in enumerate(told.columns) if column == "linear")]
        for place in dict.fromkeys(places):
            value, untrained = rows["pretrained"][place], rows.get("untrained", [None] * len(told.columns))[place]
            if value is not None:
                yield (
                    told.columns[place].rstrip("*"),
                    value,
                    f", untrained {100 * untrained.share:.1f}\u00a0%" if untrained else "",
                )
        return


def _plot(told: Results) -> Html:
    """Rows as points with their error, one panel a column; read by eye, the table beside it has the numbers."""
    left, width, row_height, gap = 84, 230, 19, 26
    values = [value for _, row in told.rows for value in row if value is not None]
    top = min(1.0, max([value.share + (value.error or 0) for value in values], default=1.0) * 1.08)
    height = row_height * len(told.rows) + 34
    marks: list[Html] = []
    for number, (name, _) in enumerate(told.rows):
        y = 24 + row_height * number + 8
        marks.append(element("text", name, x=left - 8, y=y + 4, class_="label", text_anchor="end"))
    step = next(size for size in (0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if top / size <= 5 or size == 0.5)
    for place, column in enumerate(told.columns):
        start = left + place * (width + gap)
        marks.append(element("text", column, x=start, y=12, class_="label strong"))
        for tick in range(int(top / step + 1e-9) + 1):
            x = start + tick * step / top * width
            marks.append(element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=20, y2=height - 14, class_="grid"))
            marks.append(
                element(
                    "text", f"{100 * tick * step:g}", x=f"{x:.1f}", y=height - 2, class_="tick", text_anchor="middle"
                )
            )
        for number, (name, row) in enumerate(told.rows):
            if (value := row[place]) is None:
                continue
            y, x = 24 + row_height * number + 8, start + value.share / top * width
            kind = "ours" if name == "pretrained" else "other"
            if value.error:
                reach = value.error / top * width
                path = f"M{x - reach:.1f} {y - 4}v8m0 -4H{x + reach:.1f}m0 -4v8"
                marks.append(element("path", d=path, class_=f"error {kind}"))
            title = element("title", f"{name}: {value} %")
            marks.append(element("circle", title, cx=f"{x:.1f}", cy=y, r=2.5, class_=kind))
    wide = left + len(told.columns) * (width + gap)
    return element(
        "svg", *marks, viewBox=f"0 0 {wide} {height}", width=wide, height=height, class_="dots", role="img",
        aria_label="; ".join(f"{name}: " + ", ".join(str(v) for v in row if v is not None) for name, row in told.rows),
    )  # fmt: skip


def _differences(run: Run) -> tuple[str | None, list[str]]:
    """The preset that a run was made from, or the one of its name, and where the two differ; None where unknown."""
    from pretrain.config import ConfigError, differences, list_presets, load_config

    names = {preset.name for preset in list_presets()}
    said = [word for event in run.history if isinstance(event.get("command"), list) for word in event["command"]]
    preset = next((word for word in [*said, run.name] if word in names), None)
    if preset is None:
        return None, []
    try:
        config = load_config(run.folder / "config.yaml")
        lines = differences(load_config(preset, ["data.train=unknown"]), config)
    except (ConfigError, OSError, ValueError):  # of another version
        return None, []
    own = ("name:", "description:", "runs:", "data.train:")
    return preset, [line for line in lines if not line.startswith(own)]


def _probe_versions(run: Run) -> dict[str, str]:
    for _, results in run.probes:
        versions = results.get("versions") if isinstance(results, dict) else None
        if isinstance(versions, dict):
            return {str(name): str(version) for name, version in versions.items()}
    return {}


def _log_path(run: Run, log: str) -> Path:
    path = Path(log)
    return path if path.is_absolute() else run.folder / path


def _link(run: Run, log: str) -> Html:
    return element("a", log, href="file://" + quote(str(_log_path(run, log).absolute())))


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:])
    except OSError:
        return ""


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


def _step_of(results: Any) -> int:
    try:
        return int(results["target"]["step"] or 0)
    except (KeyError, TypeError, ValueError):
        return 0


def _crops_last(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] == "crops", item[0]


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _short(iso: str) -> str:
    """`2026-11-21T13:29:31+00:00` as `2026-11-21 13:29:31`."""
    return iso[:19].replace("T", " ")
