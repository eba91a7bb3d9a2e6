"""`selfsight demo`: the whole way, by the very commands that a user would type."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from data_pipelines.files import read_json, write_json
from launch.local import python_module, safe_environment
from pretrain.config.load import PRESETS
from pretrain.survival.stopping import EXIT_STOPPED

PRESET = "demo"
#: Beside k-NN and linear; of trained heads one seed and fewer passes than usual, so that minutes are enough.
PROBES = ("--also", "attentive", "--also", "few_shot", "--also", "segmentation", "--seeds", "1", "--epochs", "40")


def run_demo(out: Path) -> None:
    """Go from images to a probed encoder below `out`, showing each command; finished steps are skipped.

    Raises SystemExit with the code of the first command that fails.
    """
    from data_pipelines.demo import MASK_NAMES, SIDE

    images, shards, run = out / "images", out / "shards", out / "runs" / PRESET
    commands = [
        ["demo-data", str(images)],
        ["pack", str(images), str(shards), "--mask-names", str(images / MASK_NAMES)],
        ["verify", str(shards)],
        ["pretrain", PRESET, "--data", str(shards), f"runs={run.parent}", "tracking.wandb=offline"],
        # whole images: the crops it learned from are pieces of them at the same resolution
        ["probe", str(run), "--data", str(shards), "--image-size", str(SIDE), *PROBES],
    ]
    out.mkdir(parents=True, exist_ok=True)
    journal = _Journal(out / "steps.json", recipe=_recipe())
    start, finished_before = time.monotonic(), True
    for position, command in enumerate(commands, 1):
        shown = shlex.join(["selfsight", *command])
        _say(f"\n[{position}/{len(commands)}] $ {shown}")
        seconds = journal.seconds.get(shown)
        if seconds is not None:
            _say(f"done before, in {seconds:.0f} s")
            continue
        began, finished_before = time.monotonic(), False
        code = _run(command)
        if code == EXIT_STOPPED:
            _say("stopped after a checkpoint; `make demo`, or `selfsight demo`, goes on from there")
        if code:
            raise SystemExit(code)
        journal.add(shown, time.monotonic() - began)
        _say(f"took {journal.seconds[shown]:.0f} s")
    if finished_before:  # else the probe has just shown them
        _show_results(run)
    _say(f"\nall of it: {sum(journal.seconds.values()):.0f} s, {time.monotonic() - start:.0f} s of them now")
    _say(_next_steps(run, shards))


class _Journal:
    """The commands that have succeeded, and how long each took.

    Raises ValueError where they were made by another `recipe`: by a release with another demo.
    """

    def __init__(self, path: Path, recipe: str) -> None:
        self.path, self.recipe = path, recipe
        known = read_json(path) or {"recipe": recipe, "seconds": {}}
        if known.get("recipe") != recipe:
            raise ValueError(f"{path.parent} was made by another version of the demo; remove it, or take another --out")
        self.seconds: dict[str, float] = known["seconds"]

    def add(self, command: str, seconds: float) -> None:
        self.seconds[command] = round(seconds, 1)
        write_json(self.path, {"recipe": self.recipe, "seconds": self.seconds})


def _recipe() -> str:
    """A digest of what decides the demo's images and training."""
    import data_pipelines.demo

    sources = (Path(data_pipelines.demo.__file__), PRESETS / f"{PRESET}.yaml")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _run(command: list[str]) -> int:
    # Ctrl-C reaches the child too, which may have a checkpoint to write; we wait for it (and unlike an ignored
    # signal, a handler that does nothing is not inherited)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.Popen(python_module("launch", *command), env=safe_environment(os.environ)).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _show_results(run: Path) -> None:
    from rich.console import Console

    from eval.report import probe_table

    newest = max((run / "eval").glob("probe-*.json"), key=lambda path: path.stat().st_mtime)
    _say("")
    Console().print(probe_table(json.loads(newest.read_text(encoding="utf-8"))))


def _next_steps(run: Path, shards: Path) -> str:
    newest = sorted((run / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime)[-2:]
    pictures = "\n".join(f"  {picture}" for picture in newest)
    return f"""
Pictures of the last step: the crops it saw, and what its tokens tell apart
{pictures}

What there is now
  {run}/pictures/      the same for earlier steps
  {run}/metrics.jsonl  every logged value; {run}/config.yaml: every setting
  {run}/encoder/       the frozen encoder
  {run}/eval/          the table above as JSON

What to do next
  selfsight pack YOUR_IMAGES YOUR_SHARDS --val-share 0.05   your own images (sub-folders are classes)
  selfsight pretrain --list                                 methods and encoders to choose from
  selfsight pretrain {PRESET} --data {shards} train.steps=10000 name=longer"""


def _say(text: str) -> None:
    print(text, flush=True)
