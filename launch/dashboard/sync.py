"""What runs wrote offline, sent to the wandb server: in order, once, and with what wandb lost on the way."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipelines.wording import counted
from pretrain.config.load import load_config
from pretrain.survival.run_folder import is_held
from pretrain.tracking.wandb_files import Had, mend, read_wandb_file, wandb_files, what_wandb_has
from pretrain.tracking.wandb_identity import Identity, identity_of, stored_identity, wandb_mode
from pretrain.tracking.wandb_run import WandbRun, missing_rows

LIVE_SECONDS = 600.0  # a file that was written to within these may still be


def sync(runs: Sequence[Path], timeout_minutes: float) -> list[str]:
    """Send all offline files of runs that are not sent yet; a line for each run.

    May be repeated: what is sent is marked so by wandb. A file of a run that goes on is left for later, for wandb sends
    a file once. Raises ValueError and OSError where nobody is logged in, or the server takes nothing.
    """
    if wandb_mode("auto") == "offline" or wandb_mode("auto") == "disabled":
        raise ValueError("nobody is logged in to wandb here (or WANDB_MODE says offline); run `wandb login` first")
    return [_sync_run(run, timeout_minutes) for run in runs]


def waiting(run: Path) -> tuple[list[Path], list[Path]]:
    """The offline files of a run that are still to be sent, oldest first; and those that may still be written to.

    Written to may be all that no life has ended, while the run is trained, and for a while after: a probe, or a run on
    a file system without locks. wandb takes its time to write, so that the age of a file alone says little.
    """
    held = is_held(run)
    ready: list[Path] = []
    live: list[Path] = []
    for path in wandb_files(run):
        file = read_wandb_file(path)
        if not file.offline or file.synced or not file.id:  # empty: killed before a byte was written
            continue
        fresh = time.time() - path.stat().st_mtime < LIVE_SECONDS
        (live if (held or fresh) and not file.ended else ready).append(path)
    return ready, live


def complete(run: Path, timeout_minutes: float = 60.0) -> int:
    """Give wandb what it lacks of a run's files; the number of rows.

    For a run that has ended: whoever trains does the same at the next start. Of a run that was online only the server
    knows what has come through, so it is asked; else the rows go into a further offline file.
    """
    stored = stored_identity(run)
    if "id" not in stored:
        return 0
    identity = identity_of_ended(run)
    was_online = any(not path.parent.name.startswith("offline-") for path in wandb_files(run, identity.id))
    missing = missing_rows(run, Had() if was_online else what_wandb_has(run, identity.id, identity.project))
    if not missing:
        return 0
    tracked = WandbRun(
        replace(identity, mode="online" if was_online else "offline"),
        start_step=max(row.get("step", 0) for row in missing),
    )
    tracked.finish(60 * timeout_minutes)
    return tracked.num_caught_up


def identity_of_ended(run: Path) -> Identity:
    """The wandb run of a training, with how it was last tracked; `wandb.json` is left as it is."""
    stored = stored_identity(run)
    identity = identity_of(run, load_config(run / "config.yaml"), keep=False)
    return replace(identity, mode=stored.get("mode", "offline"))


def _sync_run(run: Path, timeout_minutes: float) -> str:
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"{run} is no run folder (it has no config.yaml); give runs/NAME")
    ready, live = waiting(run)
    later = ""
    if live or is_held(run):
        later = "; it goes on, so the rest is left for when it has ended"
        if live:
            later = f"; still written to: {counted(len(live), 'file')}; again when the run has ended"
    added = 0 if later else complete(run, timeout_minutes)
    if added:
        ready, _ = waiting(run)
    lost = f", with {counted(added, 'row')} that wandb had lost" if added else ""
    if not ready:
        return f"{run}: {'sent' + lost.removeprefix(', with') if added else 'nothing to send'}{later}"
    for path in ready:
        mend(path)
    command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", *(str(path.parent) for path in ready)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * timeout_minutes, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"{run}: `wandb sync` was not done within {timeout_minutes:g} minutes; the same command goes on, and "
            "--timeout-minutes gives it longer"
        ) from None
    sent = [path for path in ready if path.with_name(path.name + ".synced").exists()]
    if len(sent) < len(ready):
        said = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise OSError(f"{run}: `wandb sync` sent {len(sent)} of {counted(len(ready), 'file')}; it said\n  {said}")
    return f"{run}: sent {counted(len(sent), 'file')}{lost}{later}"
