"""Which curves a page shows, in which groups and words; the drawing is `assets/report.js`'s."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from eval.report import read_results
from launch.known_metrics import ERRORS, GROUPS, HIDDEN, KNOWN, known_as
from launch.report.chronicle import alarms_of, starts_of
from launch.report.pictures import spread
from launch.report.read import NO_RESULTS, Run
from launch.report.thinning import Thinned
from pretrain.methods.registry import METHODS

#: Of all series of a page together; the buckets of each are joined until they are no more.
MOST_POINTS = 60_000
#: Measures of a run that goes on from released weights in which these have a line of their own.
OF_START = ("knn_top1", "few_shot_5", "held_out_rankme", "slice_rankme", "slice_patch_rank")
#: Of a kind, over every curve; of more, some that are evenly spread.
MOST_MARKS = 200
#: Nodes that have a line of their own; of more, one line for their mean and a band from the lowest to the highest.
MOST_NODE_LINES = 8


def charts_of(runs: Sequence[Run]) -> dict[str, Any]:
    """All that `report.js` draws, as plain JSON values: groups of charts, and the marks that they share."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.series if name not in HIDDEN))
    ranked = {name: place for place, name in enumerate(KNOWN)}
    grouped: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    constant: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in sorted(names, key=lambda name: ranked.get(name, len(ranked))):
        known = known_as(name)
        present = [(number, run.metrics.series[name]) for number, run in enumerate(runs) if name in run.metrics.series]
        value = _constant([thinned for _, thinned in present])
        if value is not None:
            constant[known.group].append(f"{known.title} {value:,.6g}")
            continue
        grouped[known.group].append(
            {
                "title": known.title,
                "percent": known.percent,
                "wide": name == "loss",
                "log": name == "grad_norm" and any(_is_spiky(thinned) for _, thinned in present),
                "series": [
                    _series(runs[number].name, number, thinned, _error_of(name, runs[number]))
                    for number, thinned in present
                ],
                "references": _references(name, runs),
            }
        )
    groups: list[dict[str, Any]] = [
        {"title": group, "charts": grouped[group], "constant": constant[group]} for group in GROUPS
    ]
    groups.insert(1, {"title": "Probes over checkpoints", "charts": list(_probe_charts(runs)), "constant": []})
    if len(runs) == 1:
        groups.append(_node_group(runs[0]))
    _share_out([series for group in groups for chart in group["charts"] for series in chart["series"]])
    return {
        "groups": [group for group in groups if group["charts"] or group["constant"]],
        "marks": list(_marks(runs[0])) if len(runs) == 1 else [],
        "runs": [run.name for run in runs],
    }


def _constant(present: list[Thinned]) -> float | None:
    """The one value that several points of all series have; None where they differ, or there is one point only."""
    extents = [thinned.extent() for thinned in present]
    known = [extent for extent in extents if extent is not None]
    if len(known) < len(extents) or any(thinned.num_bad for thinned in present):
        return None
    low, high = min(low for low, _ in known), max(high for _, high in known)
    several = any(len(thinned.columns()["x"]) > 1 for thinned in present)
    return high if several and high - low <= 1e-9 * max(abs(high), abs(low)) else None


def _is_spiky(thinned: Thinned) -> bool:
    columns = thinned.columns()
    middle = sorted(columns["y"])[len(columns["y"]) // 2] if columns["y"] else 0.0
    return middle > 0 and max(columns.get("hi", columns["y"])) > 25 * middle


def _error_of(name: str, run: Run) -> list[float]:
    """The standard error of each point of a metric that has one."""
    error = run.metrics.series.get(ERRORS[name]) if name in ERRORS else None
    return error.columns()["y"] if error is not None else []


def _series(label: str, number: int, thinned: Thinned, errors: Sequence[float] = ()) -> dict[str, Any]:
    series: dict[str, Any] = {"label": label, "color": number, **thinned.columns()}
    if len(errors) == len(series["x"]) > 0:
        series["points"] = len(errors) <= 40
        series["lo"] = [value - error for value, error in zip(series["y"], errors, strict=True)]
        series["hi"] = [value + error for value, error in zip(series["y"], errors, strict=True)]
    if thinned.num_bad:
        series["bad"] = thinned.bad_steps
    return series


def _references(name: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Values that a curve should be compared with: of DINO, for example, those of a teacher that tells nothing."""
    if len(runs) == 1 and name in OF_START and name in runs[0].metrics.series:
        points = runs[0].metrics.series[name].columns()
        if points["x"][:1] == [0]:  # measured before the first step
            return [{"label": "the start", "y": points["y"][0]}]
    names = [(run, str(run.setting("method", "name"))) for run in runs]
    guessing = [(run, METHODS[method].guessing) for run, method in names if method in METHODS]
    counts = {run.setting("method", settings[name]) for run, settings in guessing if name in settings}
    if len(counts) == 1:
        (count,) = counts
        if isinstance(count, int) and count > 1:
            return [{"label": "ln K", "y": math.log(count)}]
    return []


def _marks(run: Run) -> Iterator[dict[str, Any]]:
    for step, text in spread([start for start in starts_of(run.history) if start[0] > 0], MOST_MARKS):
        yield {"step": step, "kind": "restart", "label": text}
    for step, text in spread(alarms_of(run.history), MOST_MARKS):
        yield {"step": step, "kind": "alarm", "label": text}


def _probe_charts(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Each measure over checkpoints with its error, where a run was probed at several steps on the same images."""
    columns: dict[str, list[dict[str, Any]]] = {}
    units: dict[str, str] = {}
    for number, run in enumerate(runs):
        for conditions, points in probed_steps(run).items():
            if len(points) < 2:
                continue
            for place, column in enumerate(conditions[0]):
                known = [(step, values[place]) for step, values in points if values[place] is not None]
                if not known:
                    continue
                units[column.rstrip("*")] = known[0][1].unit
                columns.setdefault(column.rstrip("*"), []).append(
                    {
                        "label": run.name,
                        "color": number,
                        "points": True,
                        "x": [step for step, _ in known],
                        "y": [value.share for _, value in known],
                        "lo": [value.share - (value.error or 0) for _, value in known],
                        "hi": [value.share + (value.error or 0) for _, value in known],
                    }
                )
    for column, series in columns.items():
        percent = units[column] == "percent"
        yield {"title": column, "percent": percent, "log": False, "series": series, "references": []}


def probed_steps(run: Run) -> dict[tuple[Any, ...], list[tuple[int, list[Any]]]]:
    """Of a run's probes, those that may be compared: (columns, data) -> (step, the pretrained encoder's values)."""
    found: dict[tuple[Any, ...], dict[int, list[Any]]] = {}
    for _, results in run.probes:
        try:
            told = read_results(results)
            step = results["target"]["step"]
            data = (results["data"]["train"]["checksum"], results["data"]["val"]["checksum"])
            key = (tuple(told.columns), *data, results["target"]["image_size"])
        except NO_RESULTS:
            continue
        if isinstance(step, int):
            found.setdefault(key, {})[step] = dict(told.rows)["pretrained"]
    return {key: sorted(points.items()) for key, points in found.items()}


def _node_group(run: Run) -> dict[str, Any]:
    """What the nodes measured of themselves: a line each while they are few."""
    charts, constant = [], []
    for name, nodes in run.system.items():
        title = name.replace("/", ": ").replace("_", " ")
        value = _constant(list(nodes.values()))
        if value is not None:
            constant.append(f"{title} {value:,.6g}")
            continue
        series = [_series(node, number, thinned) for number, (node, thinned) in enumerate(sorted(nodes.items()))]
        if len(series) > MOST_NODE_LINES:
            series = [_over_nodes(series)]
        charts.append({"title": title, "percent": False, "log": False, "series": series, "references": []})
    return {"title": "Nodes", "charts": charts, "constant": constant}


def _over_nodes(series: list[dict[str, Any]]) -> dict[str, Any]:
    """Many nodes as one series: at each step that any of them has, their mean, lowest and highest."""
    at: dict[float, list[tuple[float, float, float]]] = {}
    for node in series:
        rows = zip(node["x"], node["y"], node.get("lo", node["y"]), node.get("hi", node["y"]), strict=True)
        for x, y, low, high in rows:
            at.setdefault(x, []).append((y, low, high))
    steps = sorted(at)
    return {
        "label": f"mean of {len(series)} nodes",
        "color": 0,
        "x": steps,
        "y": [sum(y for y, _, _ in at[x]) / len(at[x]) for x in steps],
        "lo": [min(low for _, low, _ in at[x]) for x in steps],
        "hi": [max(high for _, _, high in at[x]) for x in steps],
    }


def _share_out(series: list[dict[str, Any]]) -> None:
    """Join neighbouring points of all series alike until the page holds no more than `MOST_POINTS`."""
    while sum(len(each["x"]) for each in series) > max(MOST_POINTS, 2 * len(series)):
        for each in series:
            if len(each["x"]) < 16 or each.get("points"):
                continue
            pairs = [slice(first, first + 2) for first in range(0, len(each["x"]), 2)]
            low, high = each.get("lo", each["y"]), each.get("hi", each["y"])
            each["lo"], each["hi"] = [min(low[pair]) for pair in pairs], [max(high[pair]) for pair in pairs]
            each["y"] = [sum(each["y"][pair]) / len(each["y"][pair]) for pair in pairs]
            each["x"] = [each["x"][pair][-1] for pair in pairs]
        if all(len(each["x"]) < 16 or each.get("points") for each in series):
            return
