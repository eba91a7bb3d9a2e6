"""The writing end of one run: files in its folder, and the same in wandb (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from pretrain.config import Config
from pretrain.tracking.console import say
from pretrain.tracking.metrics_log import MetricsLog
from pretrain.tracking.pictures import contact_sheet
from pretrain.tracking.wandb_identity import identity_of
from pretrain.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"
SYSTEM = "system.jsonl"


class Tracker:
    """What a run writes down; lives on rank 0 only.

    The files are the truth. wandb gets every row from a thread of its own and never stops or stalls a run; what it
    missed, it gets from the files.
    """

    def __init__(self, run: Path, config: Config, start_step: int) -> None:
        self.run, self.config = run, config
        self.log = MetricsLog(run / METRICS, start_step)
        self.system_log = MetricsLog(run / SYSTEM, start_step)
        identity = identity_of(run, config)
        if identity.mode == "disabled":
            self.say("wandb: disabled")
        self.wandb = WandbRun(identity, start_step)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a finished step (counted from 1)."""
        self.log.write(step, values)
        self.wandb.log(step, values)

    def system(self, step: int, values: Mapping[str, float]) -> None:
        """Log how the machines do, as of a finished step: into a file of its own, and into wandb."""
        if values:
            self.system_log.write(step, values)
            self.wandb.log(step, values)

    def picture(self, step: int, name: str, pictures: Tensor) -> Path:
        """Save pictures (n, c, h, w) uint8 as `pictures/NAME-STEP.png`; of the name, text in brackets is a caption."""
        short, _, caption = name.partition(" (")
        path = self.run / "pictures" / f"{short.replace(' ', '-')}-{step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(contact_sheet(pictures, self.config.tracking.picture_channels)).save(path)
        except OSError as error:
            self.say(f"{path} can't be written ({error.strerror or error}); training goes on without it")
            with suppress(OSError):
                path.unlink()
            return path
        self.wandb.picture(step, path, caption.rstrip(")"))
        return path

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        say(text)

    def alarm(self, name: str, text: str, begins: bool) -> None:
        """Tell of an alarm that begins, or is over."""
        self.say(f"ALARM {name}: {text}" if begins else f"alarm {name} is {text}")
        if begins:
            self.wandb.alert(f"{self.config.name}: {name}", text)

    def close(self) -> None:
        """Finish the files and, within a limit, the wandb run."""
        self.log.close()
        self.system_log.close()
        self.wandb.finish()
