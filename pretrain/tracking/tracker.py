"""What a run writes down: `metrics.jsonl`, wandb, pictures, and a line of progress.

wandb never stops or stalls a run: every call is guarded, and a lost service only ends the dashboard.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from data_pipelines.files import write_text
from pretrain.config import as_shown, dump_config
from pretrain.schema import Config
from pretrain.tracking.pictures import contact_sheet

FINISH_SECONDS = 30
INIT_SECONDS = 20


class Tracker:
    """The writing end of one run; lives on rank 0 only."""

    def __init__(self, run: Path, config: Config, start_step: int) -> None:
        self.run, self.config = run, config
        self.log = run / "metrics.jsonl"
        _forget_after(self.log, start_step)
        self.file = self.log.open("a", encoding="utf-8")
        self.wandb = WandbRun.start(run, config)
        self.started = time.monotonic()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a finished step (counted from 1)."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        self.wandb.log(dict(values), step)

    def picture(self, step: int, name: str, pictures: Tensor) -> Path:
        """Save pictures (n, c, h, w) uint8 as `pictures/NAME-STEP.png`; of the name, text in brackets is a caption."""
        short, _, caption = name.partition(" (")
        path = self.run / "pictures" / f"{short.replace(' ', '-')}-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = Image.fromarray(contact_sheet(pictures, self.config.tracking.picture_channels))
        sheet.save(path)
        self.wandb.image(f"pictures/{short}", sheet, caption.rstrip(")"), step)
        return path

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        print(text, flush=True)

    def alarm(self, name: str, text: str, begins: bool) -> None:
        """Tell of an alarm that begins, or is over."""
        self.say(f"ALARM {name}: {text}" if begins else f"alarm {name} is {text}")
        if begins:
            self.wandb.alert(f"{self.config.name}: {name}", text)

    def close(self) -> None:
        """Finish the files and, within a limit, the wandb run."""
        self.file.close()
        self.wandb.finish()


def _forget_after(log: Path, step: int) -> None:
    """Drop rows of steps after `step`: they were logged after the checkpoint that is resumed, and will come again."""
    if not log.exists():
        return
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run may be cut
            continue
        if row["step"] <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    if kept != lines:
        write_text(log, "".join(kept))


class WandbRun:
    """A wandb run that may be absent, lost or slow without its caller noticing."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def start(cls, folder: Path, config: Config) -> WandbRun:
        """Begin or continue the run whose id is in `wandb.json`; offline unless logged in or asked for."""
        tracking = config.tracking
        mode = wandb_mode(tracking.wandb)
        if mode == "disabled":
            return cls(None)
        known = folder / "wandb.json"
        settings: dict[str, Any] = {
            "project": tracking.project,
            "name": config.name,
            "group": tracking.group,
            "tags": list(tracking.tags),
            "job_type": "pretrain",
        }
        if known.is_file():
            settings["id"] = json.loads(known.read_text(encoding="utf-8"))["id"]
        run = open_wandb(folder, mode, {"yaml": dump_config(config)} | as_shown(config), settings)
        if run is not None:
            write_text(known, json.dumps({"id": run.id, "project": tracking.project, "mode": mode}) + "\n")
        return cls(run)

    def log(self, values: dict[str, Any], step: int) -> None:
        self._guard(lambda run: run.log(values, step=step))

    def image(self, name: str, picture: Image.Image, caption: str, step: int) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(picture, caption=caption)}, step=step)

        self._guard(send)

    def alert(self, title: str, text: str) -> None:
        self._guard(lambda run: run.alert(title=title, text=text, level="WARN", wait_duration=0))

    def summary(self, values: Mapping[str, float]) -> None:
        self._guard(lambda run: run.summary.update(dict(values)))

    def finish(self) -> None:
        """Wait for the upload, but not for ever."""
        run, self._run = self._run, None
        if run is None:
            return
        thread = threading.Thread(target=WandbRun(run)._guard, args=(lambda r: r.finish(),), daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            print(f"wandb did not finish within {FINISH_SECONDS} s; `wandb sync` uploads what is left", flush=True)

    def _guard(self, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # wandb raises many kinds when its service is gone; none may end a training
            print(f"wandb is lost ({type(error).__name__}: {error}); metrics.jsonl goes on", flush=True)
            self._run = None


def wandb_mode(wanted: str) -> str:
    """`auto` is online for a user who is logged in and offline otherwise; WANDB_MODE, if set, decides."""
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import netrc

    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any("wandb" in host for host in hosts) else "offline"


def open_wandb(folder: Path, mode: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A wandb run, offline if the server can't be reached in time; None when even that fails."""
    try:
        import wandb

        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                return wandb.init(
                    dir=str(folder),
                    mode=attempt,
                    resume="allow",
                    config=dict(config),
                    settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
                    **settings,
                )
            except wandb.errors.Error as error:
                print(f"wandb can't start {attempt}: {error}", flush=True)
    except Exception as error:  # a broken dashboard is no reason not to train
        print(f"wandb can't start ({type(error).__name__}: {error}); metrics.jsonl has everything", flush=True)
    return None


def log_probe(run: Path, metrics: Mapping[str, float]) -> None:
    """Put probe results into the summary of a run's wandb run, if it has one."""
    known = run / "wandb.json"
    if not known.is_file():
        return
    stored = json.loads(known.read_text(encoding="utf-8"))
    opened = open_wandb(run, stored["mode"], {}, {"id": stored["id"], "project": stored["project"]})
    tracked = WandbRun(opened)
    tracked.summary(metrics)
    tracked.finish()
