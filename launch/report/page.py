"""The page: its parts, in one file that asks nobody for anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from data_pipelines.files import write_text
from launch.report.course import course_of
from launch.report.curves import charts_of
from launch.report.facts import facts, metrics_table, state_of, tiles
from launch.report.finetuned import finetuned
from launch.report.galleries import galleries
from launch.report.history import chronicle_of
from launch.report.markup import Html, data, element, joined, shown, table
from launch.report.pictures import BUDGET
from launch.report.probes import probes, probes_compared
from launch.report.read import Run, read_run
from launch.report.settings import configuration
from launch.report.verdict import verdict_of
from launch.run_facts import runs_of_sweep
from pretrain.description import describe, own_words

#: The browser itself refuses whatever this page might load.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"
_MOST_RUNS = 12


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or one that compares several; returns where it lies.

    The folder of a sweep stands for those of its runs that have begun. `out` is by default `report.html` in the folder
    of the run or sweep; for several it must be named. The file is there whole or not at all. Raises FileNotFoundError
    for a folder that holds no run, and ValueError for no or too many.
    """
    if not folders:
        raise ValueError("which run? Name its folder, such as runs/NAME")
    if out is None and len(folders) == 1:
        out = folders[0] / "report.html"
    folders = [run for folder in folders for run in _runs_of(folder)]
    if len(folders) > _MOST_RUNS:
        raise ValueError(f"{len(folders)} runs are more than a page can compare; name {_MOST_RUNS} at most")
    if out is None:
        raise ValueError("several runs make a page of their own; say where with --out FILE")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it, such as {out / 'report.html'}")
    page = render([read_run(folder) for folder in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def _runs_of(folder: Path) -> list[Path]:
    """The run of a folder, or of a sweep's all that have begun; they lie beside it."""
    swept = None if _is_run(folder) else runs_of_sweep(folder)
    if swept is None:
        return [folder]
    begun = [run for run in swept if _is_run(run)]
    if not begun:
        raise FileNotFoundError(f"no run of the sweep {folder} has begun; `selfsight status {folder}` shows them")
    return begun


def refresh(target: str | Path) -> Path | None:
    """Write `report.html` anew into the run that `target` is, or is a checkpoint or encoder of; None where it is none.

    Never raises: a page is no reason to lose a training or a probe.
    """
    try:
        path = Path(target).expanduser()
        folder = next((place for place in (path, *path.absolute().parents[:3]) if _is_run(place)), None)
        return None if folder is None else write_report([folder])
    except Exception as error:
        print(f"{target}: no report.html ({type(error).__name__}: {error}); `selfsight report` writes it", flush=True)
        return None


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def render(runs: Sequence[Run]) -> str:
    """The whole page as text, from `assets/page.html`."""
    problems = [f"{run.name}: {problem}" if len(runs) > 1 else problem for run in runs for problem in run.problems]
    one = runs[0] if len(runs) == 1 else None
    charts = charts_of(runs)
    curves = joined([_curves(charts), *([metrics_table(one)] if one else [])])
    if one:
        sections = [
            ("finetuned", "Fine-tuned", finetuned(one, problems)),
            ("probes", "Probes", probes(one, problems)),
            ("curves", "Curves", curves),
            ("pictures", "Pictures over time", galleries(runs, BUDGET, problems)),
            ("made", "How it was made", configuration(one)),
            ("history", "History", chronicle_of(one)),
        ]
    else:
        sections = [
            ("settings", "Settings that differ", _settings_compared(runs)),
            ("probes", "Probes", _probes_compared(runs, problems)),
            ("curves", "Curves", curves),
            ("pictures", "Last pictures", galleries(runs, BUDGET, problems)),
        ]
    if problems:
        listed = element("ul", *(element("li", problem) for problem in dict.fromkeys(problems[:50])))
        sections.append(("problems", "What could not be read", listed))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: value if isinstance(value, Html) else shown(value)
    return environment.from_string(_asset("page.html")).render(
        policy=POLICY,
        title=one.name if one else f"{len(runs)} runs: " + ", ".join(run.name for run in runs),
        lead=list(filter(None, (own_words(one.config), describe(one.config)))) if one else [],
        courses=list(filter(None, map(course_of, runs))),
        verdicts=[(run, _kind(number), verdict_of(run)) for number, run in enumerate(runs)],
        several=len(runs) > 1,
        tiles=tiles(one) if one else None,
        facts=_facts(runs),
        sections=[section for section in sections if section[2]],
        data=data(charts, id="charts"),
        css=_asset("report.css"),
        script=_asset("report.js"),
        written=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


def _asset(name: str) -> Html:
    return Html(files("launch.report").joinpath("assets", name).read_text(encoding="utf-8"))


def _facts(runs: Sequence[Run]) -> Html:
    """What the run is, or of several what each is, beside each other."""
    if len(runs) == 1:
        listed = [joined([element("dt", name), element("dd", value)]) for name, value in facts(runs[0])]
        return element("dl", *listed)
    told = [{"state": state_of(run)[1], **dict(facts(run))} for run in runs]
    names = list(dict.fromkeys(name for each in told for name in each))
    header = ["", *(element("span", run.name, class_=_kind(number)) for number, run in enumerate(runs))]
    return table(header, [(name, *(each.get(name, "") for each in told)) for name in names], numbers=False)


def _kind(number: int) -> str:
    """The classes of a run's name: the colour and the dashes that `report.js` gives its curves."""
    return f"run c{number % 8} d{number % 3}"


def _curves(charts: dict[str, Any]) -> Html:
    if not charts["groups"]:
        return element("p", "No step is logged yet.", class_="note")
    controls = element(
        "form",
        element(
            "label",
            "smoothing ",
            element("input", type="range", id="smoothing", min=0, max=0.98, step=0.02, value=0),
            element("output", "0", for_="smoothing", id="smoothed"),
        ),
        element("label", element("input", type="checkbox", id="logarithmic"), " logarithmic"),
        element("label", element("input", type="checkbox", id="clipped"), " cut off spikes"),
        element("button", "all steps", type="button", id="whole", disabled=True),
        element(
            "span",
            "drag over a curve to zoom, double click to go back; arrow keys read it point by point",
            class_="note",
        ),
        class_="controls",
        autocomplete="off",
    )
    groups = []
    for number, group in enumerate(charts["groups"]):
        constant = group["constant"]
        note = element("p", "Constant: " + ", ".join(constant), class_="note") if constant else None
        drawn = joined([element("div", class_="charts", data_group=number), note])
        if group["title"] == "Nodes":  # as many as a cluster has, and seldom what is asked first
            groups.append(element("details", element("summary", f"Nodes ({len(group['charts'])} curves)"), drawn))
        else:
            groups.append(joined([element("h3", group["title"]), drawn]))
    without = element("noscript", element("p", "Curves are drawn by a script in this file, which is switched off."))
    return joined([controls, without, *groups])


def _probes_compared(runs: Sequence[Run], problems: list[str]) -> Html | None:
    shown = []
    for number, run in enumerate(runs):
        found = probes(run, problems)
        if found is not None:
            shown.append(joined([element("h3", run.name, class_=_kind(number)), found]))
    if not shown:
        return None
    return joined([probes_compared(runs), element("details", element("summary", "every probe"), *shown)])


def _settings_compared(runs: Sequence[Run]) -> Html | None:
    """A table of all settings that are not alike in all runs."""
    flat = [dict(_leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key, "(not set)") for settings in flat]
        if len(set(values)) > 1 and key != "name":
            rows.append((key, *values))
    return table(["", *(run.name for run in runs)], rows[:300], numbers=False) if rows else None


def _leaves(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [leaf for name, item in value.items() for leaf in _leaves(item, f"{key}.{name}" if key else str(name))]
    return [(key, yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip())]
