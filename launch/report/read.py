"""What a run folder tells, read with patience: half-written runs, empty ones, rows cut in the middle."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from data_pipelines.remote.urls import redact
from launch.report.thinning import Thinned
from launch.run_facts import is_run, published_card, total_steps
from pretrain.survival.history import read_history

#: What reading a file of `eval/` raises that is none of ours, or of another version.
NO_RESULTS = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
#: Of a series, its values or means of so many neighbours; of one node's, as there may be many nodes.
BUCKETS, NODE_BUCKETS = 500, 120
_MOST_NODES = 256  # whose values are kept apart
_MOST_SERIES = 400  # names of metrics; a page of more is no page
_MOST_LETTERS = 2000  # of a text in the history
_PICTURE = re.compile(r"(?P<name>.+)-(?P<step>\d{8,})\.png")


@dataclass
class Metrics:
    """`metrics.jsonl`: each metric by its name, in the order in which the names first came."""

    series: dict[str, Thinned] = field(default_factory=dict)
    num_rows: int = 0
    num_skipped: int = 0  # lines that are no rows
    last_step: int | None = None
    last_row: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One run folder as it was when it was read."""

    folder: Path
    name: str
    config: dict[str, Any]  # empty where there is none that can be read
    config_text: str
    metrics: Metrics
    system: dict[str, dict[str, Thinned]]  # value -> node -> series
    history: list[dict[str, Any]]
    probes: list[tuple[str, Any]]  # file name, what it holds
    finetuned: list[tuple[str, Any]]  # likewise, of what fine-tuning has measured
    pictures: dict[str, list[tuple[int, Path]]]  # name -> (step, file), by step
    card: dict[str, Any]  # of the published encoder or tokenizer
    num_parameters: int | None  # of what is exported
    checkpoints: list[int]
    problems: list[str]  # what could not be read

    def setting(self, *keys: str, default: Any = None) -> Any:
        """A value of the configuration, such as `setting("train", "batch_size")`."""
        value: Any = self.config
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    @property
    def total_steps(self) -> int | None:
        """How many steps the run shall have, as far as the configuration and the rows so far tell."""
        return total_steps(self.config.get("train"), self.metrics.last_row)

    @property
    def is_finished(self) -> bool:
        """Whether the encoder, or tokenizer, of the last step is published."""
        step, total = self.card.get("step"), self.total_steps
        return isinstance(step, int) and total is not None and step >= total


def read_run(folder: Path) -> Run:
    """Read a run folder; raises FileNotFoundError where there is none.

    What is missing or broken in it is left out, and what is broken is told in `problems`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of a run; name one, such as runs/NAME")
    if not is_run(folder):
        raise FileNotFoundError(
            f"{folder} holds neither config.yaml nor metrics.jsonl, so it is not a run; name one, such as runs/NAME"
        )
    problems: list[str] = []
    text = _text(folder / "config.yaml", problems)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"config.yaml is not YAML: {error}")
        config = None
    if not isinstance(config, dict):
        config = {}
    metrics = read_metrics(folder / "metrics.jsonl", problems)
    if metrics.num_skipped > 1:  # one is the line that is being written
        problems.append(f"metrics.jsonl: {metrics.num_skipped} lines are no rows and were passed over")
    probes, finetuned = _results(folder, problems)
    return Run(
        folder=folder,
        name=str(config.get("name") or folder.resolve().name),
        config=config,
        config_text=text,
        metrics=metrics,
        system=read_system(folder / "system.jsonl", problems),
        history=_history(folder, problems),
        probes=probes,
        finetuned=finetuned,
        pictures=_pictures(folder),
        card=published_card(folder),
        num_parameters=_num_parameters(folder),
        checkpoints=sorted(
            int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit()
        ),
        problems=problems,
    )


def read_metrics(path: Path, problems: list[str] | None = None) -> Metrics:
    """The rows of a `metrics.jsonl` of any length, line by line."""
    metrics = Metrics()
    for row in _rows(path, problems if problems is not None else []):
        step: Any = None if row is None else row.get("step")
        if row is None or not _is_number(step):
            metrics.num_skipped += 1
            continue
        if metrics.last_step is not None and step <= metrics.last_step:
            for thinned in metrics.series.values():
                thinned.rewind(step)
        metrics.num_rows += 1
        metrics.last_step, metrics.last_row = int(step), row
        for name, value in row.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or name == "step":
                continue
            if name not in metrics.series:
                if len(metrics.series) >= _MOST_SERIES:
                    continue
                metrics.series[name] = Thinned(BUCKETS)
            metrics.series[name].add(step, _as_float(value))
    return metrics


def read_system(path: Path, problems: list[str] | None = None) -> dict[str, dict[str, Thinned]]:
    """What the nodes measured of themselves (`system/NODE/VALUE`), as value -> node -> series; empty where there is
    no such file."""
    found: dict[str, dict[str, Thinned]] = defaultdict(dict)
    nodes: set[str] = set()
    for row in _rows(path, problems if problems is not None else []):
        step: Any = None if row is None else row.get("step")
        if row is None or not _is_number(step):
            continue
        for key, value in row.items():
            if not key.startswith("system/") or not _is_number(value, finite=False):
                continue
            node, _, name = key.removeprefix("system/").partition("/")
            if (node not in nodes and len(nodes) >= _MOST_NODES) or (name not in found and len(found) >= _MOST_SERIES):
                continue
            nodes.add(node)
            thinned = found[name].setdefault(node, Thinned(NODE_BUCKETS))
            last = thinned.last_step()
            if last is not None and step < last:
                thinned.rewind(step)
            thinned.add(step, _as_float(value))
    return dict(found)


def _rows(path: Path, problems: list[str]) -> Iterator[dict[str, Any] | None]:
    """Each line of a file as the object it holds, or None for a line that holds none."""
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else None
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} can't be read: {error.strerror}")


def _is_number(value: Any, finite: bool = True) -> TypeGuard[float]:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (not finite or (abs(value) < 2**53 and math.isfinite(value)))
    )


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} can't be read: {error.strerror}")
        return ""


def _history(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        events = read_history(folder)
    except OSError as error:
        problems.append(f"history.jsonl can't be read: {error.strerror}")
        return []
    return [{key: _as_text(value) for key, value in event.items()} for event in events]


def _as_text(value: Any) -> Any:
    """Text of an event as a page may show it: not without end, and without passwords in URLs."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return redact(value[:_MOST_LETTERS]) if isinstance(value, str) else value


def _results(folder: Path, problems: list[str]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Of `eval/` the probes, and what fine-tuning has measured."""
    probes: list[tuple[str, Any]] = []
    finetuned: list[tuple[str, Any]] = []
    for path in sorted((folder / "eval").glob("*.json")):
        if path.name.startswith("compare-"):
            continue
        found = finetuned if path.name.startswith("finetune-") else probes
        try:
            found.append((path.name, json.loads(path.read_text(encoding="utf-8", errors="replace"))))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"eval/{path.name} can't be read: {error}")
    return probes, finetuned


def _pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in sorted((folder / "pictures").glob("*.png")):
        match = _PICTURE.fullmatch(path.name)
        if match:
            found[match["name"]].append((int(match["step"]), path))
    return {name: sorted(steps) for name, steps in found.items()}


def _num_parameters(folder: Path) -> int | None:
    """How many numbers the newest exported weights hold, by the header of their file alone."""
    places = [folder, *sorted((folder / "checkpoints").glob("step-*"), reverse=True)]
    for path in (place / what / "model.safetensors" for place in places for what in ("encoder", "tokenizer")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > 100_000_000:
                    continue
                header = json.loads(file.read(length))
            return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error):
            continue
    return None
