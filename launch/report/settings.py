"""How a run was configured: what differs from its preset, the versions, the whole of it."""

from __future__ import annotations

import shlex
from collections.abc import Set

from launch.report import chronicle
from launch.report.markup import Html, element, joined, table
from launch.report.read import Run


def configuration(run: Run) -> Html | None:
    """What differs from the preset, the versions, and the whole configuration."""
    parts: list[Html] = []
    command = _command(run)
    if command:
        parts.append(element("div", element("h3", "The command"), element("pre", command)))
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


def _command(run: Run) -> str:
    """What the run was last started with, or queued with where no start is recorded."""
    for kind in ("started", "submitted"):
        for event in reversed(run.history):
            words = event.get("command")
            if event.get("event") == kind and isinstance(words, list) and words:
                return shlex.join(map(str, words))
    return ""


def _differences(run: Run) -> tuple[str | None, list[str]]:
    """The shipped preset that a run was last started from, and where the two differ; None where unknown."""
    from pretrain.config.load import ConfigError, differences, list_presets, load_config

    preset = _preset(run, {known.name for known in list_presets()})
    if preset is None:
        return None, []
    try:
        config = load_config(run.folder / "config.yaml")
        lines = differences(load_config(preset, ["data.train=unknown"]), config)
    except (ConfigError, OSError, ValueError):  # of another version
        return None, []
    own = ("name:", "description:", "runs:", "data.train:")
    return preset, [line for line in lines if not line.startswith(own)]


def _preset(run: Run, names: Set[str]) -> str | None:
    """The one of `names` that the last start was made with; where no start says, the first that a command does."""
    told = [event["preset"] for event in run.history if event.get("event") == "started" and "preset" in event]
    commands = [event["command"] for event in run.history if isinstance(event.get("command"), list)]
    words = told[-1:] or [word for command in commands for word in command]  # earlier versions kept the command alone
    return next((word for word in words if isinstance(word, str) and word in names), None)


def _probe_versions(run: Run) -> dict[str, str]:
    for _, results in run.probes:
        versions = results.get("versions") if isinstance(results, dict) else None
        if isinstance(versions, dict):
            return {str(name): str(version) for name, version in versions.items()}
    return {}
