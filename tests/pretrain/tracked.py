"""What wandb has of a run, over all its files: for tests of runs that were preempted, killed, probed.

tracked = tracked_run(folder)
assert tracked.column("loss") == [...]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.tracking.wandb_files import WandbFile, read_wandb_file, wandb_files


@dataclass(frozen=True)
class TrackedRun:
    """Every file that wandb wrote in the folder of a run, oldest first."""

    files: list[WandbFile]

    @property
    def ids(self) -> set[str]:
        """The run's id: one, if all is well."""
        return {file.id or file.path.stem.removeprefix("run-") for file in self.files}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history that a server would have after all files were sent in order."""
        return [row for file in self.files for row in file.history]

    def column(self, name: str) -> dict[int, Any]:
        """The values of a metric by step (of the checkpoint, for those of a probe).

        Fails where a step has two of them.
        """
        step = "probe/step" if name.startswith("probe/") else "step"
        found: dict[int, Any] = {}
        for row in self.rows:
            if name in row:
                assert row[step] not in found, f"wandb has {name} of step {row[step]} twice"
                found[row[step]] = row[name]
        return found

    def names(self) -> set[str]:
        """Of all metrics."""
        return {name for row in self.rows for name in row if not name.startswith("_")}


def tracked_run(folder: Path) -> TrackedRun:
    """Read back what wandb wrote in a run folder (or any that has a `wandb` folder)."""
    return TrackedRun([read_wandb_file(path) for path in wandb_files(folder)])
