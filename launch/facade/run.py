"""A training run started from Python, and what it left."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.local import python_module, safe_environment
from launch.own_data import run_folder

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Run:
    """The folder of a run, and what is in it."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """Every setting."""
        from pretrain.config.yaml_file import read_yaml

        return dict(read_yaml(self.folder / "config.yaml"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: step, loss and so on."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line]

    def load(self, **options: Any) -> Model:
        """Its encoder; options as of `selfsight.load`."""
        from .model import load

        return load(self.folder, **options)


def pretrain(
    preset: str | Path | None = None,
    data: str | Path | None = None,
    *,
    val_share: float = 0.0,
    group_pattern: str | None = None,
    group_column: str | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Train in a process of its own, as `selfsight pretrain` does, and wait; the same call again continues a run.

    Args:
        preset: A preset's name or the path of a .yaml file; None: picked for the images.
        data: Images (packed into the cache), or shards.
        val_share: Of images: the share of each class to hold back for probes.
        group_pattern: What train and val must not share, as a regular expression on paths.
        group_column: The same as a column of a table.
        quiet: Show nothing of what it prints.
        overrides: Settings, by section or by full name: `train={"epochs": 3}`, `**{"optim.lr": 1e-3}`, `name="first"`.

    Raises:
        ValueError: It was refused; with the message.
        RuntimeError: It ended early; with the exit code and the last lines.
    """
    named, settings = None if preset is None else str(preset), _flat(overrides)
    # before it starts: a preset's file may be another when it ends
    folder = run_folder(named, settings, None if data is None else str(data))
    arguments = ["pretrain", *([named] if named is not None else []), *settings]
    return _train([*arguments, *_of_data(data, val_share, group_pattern, group_column)], folder, quiet)


def finetune(
    target: str | Path,
    data: str | Path,
    preset: str | Path | None = None,
    *,
    val_share: float = 0.0,
    group_pattern: str | None = None,
    group_column: str | None = None,
    quiet: bool = False,
    **overrides: Any,
) -> Run:
    """Train an encoder on with labels, as `selfsight finetune` does; the same call again continues the run.

    Args:
        target: A run, a checkpoint, an encoder folder or `timm:NAME`; or `none`, to begin with no weights.
        data: Labelled images (packed into the cache), or shards with a train and a val split.
        preset: Of method finetune: its name or the path of a .yaml file; None: the one for data of one's own.
        val_share, group_pattern, group_column, quiet, overrides: As of `pretrain`.

    Returns:
        The run; what it has measured of the images held back is in its `eval/finetune-STEP.json`.

    Raises:
        FileNotFoundError: There is no encoder; the message says what there is.
        ValueError: It was refused; with the message.
        RuntimeError: It ended early; with the exit code and the last lines.
    """
    from launch.finetune_command import finetune_folder

    named, settings = None if preset is None else str(preset), _flat(overrides)
    folder = finetune_folder(str(target), named, settings)
    arguments = ["finetune", str(target), *([named] if named is not None else []), *settings]
    return _train([*arguments, *_of_data(data, val_share, group_pattern, group_column)], folder, quiet)


def _of_data(
    data: str | Path | None, val_share: float, group_pattern: str | None, group_column: str | None
) -> list[str]:
    """The options that name images, of those that are given."""
    options = {"data": data, "val-share": val_share, "group-pattern": group_pattern, "group-column": group_column}
    return [f"--{name}={value}" for name, value in options.items() if value not in (None, 0.0)]


def _train(arguments: Sequence[str], folder: Path, quiet: bool) -> Run:
    """The run in `folder` that the command makes of these arguments, in a process of its own."""
    environ = {**safe_environment(os.environ), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        python_module("launch", *arguments),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if not quiet:
                print(lines[-1], flush=True)
    text = "\n".join(lines)
    if process.returncode == 2:
        raise ValueError(text[text.rfind("error: ") :].removeprefix("error: ") if "error: " in text else text)
    if process.returncode:
        raise RuntimeError(f"training ended with exit code {process.returncode}:\n" + "\n".join(lines[-20:]))
    return Run(folder)


def _flat(settings: Mapping[str, Any], above: str = "") -> list[str]:
    """`key.sub=value` of nested settings."""
    from pretrain.config.overrides import written

    found: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{key}.")
        else:
            found.append(f"{above}{key}={written(str(value) if isinstance(value, Path) else value)}")
    return found
