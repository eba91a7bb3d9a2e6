"""What of a run, its folder and its environment can be refused before it is queued."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from data_pipelines.files import lock
from launch.cluster.queue import queued
from launch.cluster.site import Site
from launch.pretrain_command import Checked, check_run
from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.survival.history import read_history

_NEEDED = ("launch", "pretrain", "eval", "torch", "deepspeed", "timm", "wandb", "webdataset")
_MISSING = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"


def check_run_to_submit(config: Config, ranks: int) -> Checked:
    """As `check_run`, and what only matters to a job that starts by itself, later: folder, resuming, wandb."""
    checked = check_run(config, ranks)
    from pretrain.checkpoints.folder import CheckpointFolder, check_resume, damage, read_state
    from pretrain.run import is_finished, resolve
    from pretrain.survival.run_folder import check_run_folder

    resolved, _ = resolve(config, checked.datasets)
    folder = check_run_folder(resolved)
    if is_finished(folder, resolved, checked.sampler):
        raise ConfigError(f"{folder} is finished; to train longer or otherwise, take another --name")
    for path in CheckpointFolder(folder, resolved.checkpoint).all()[-1:]:
        if damage(path) is None:  # else training takes the one before it, and says so
            check_resume(path, read_state(path))
    _check_not_trained(folder)
    _check_wandb(config)
    return checked


def check_not_queued(run: Path, ask_slurm: bool = True) -> None:
    """Refuse a run of which a job is in the queue or running: two at once would write over each other."""
    if not ask_slurm:
        return
    jobs = [str(job) for event in read_history(run) if event["event"] == "submitted" for job in event.get("jobs", ())]
    for job in queued(jobs):
        raise ConfigError(
            f"{run} has job {job.id} in the queue already ({job.state}); wait for it, `selfsight cancel "
            f"{os.path.relpath(run)}`, or take a --name of its own"
        )


def check_interpreter(python: str, site: Site) -> None:
    """Refuse a Python that is not there or can't import what jobs need; a container's is asked by the preflight."""
    if site.container is not None:
        image = Path(site.container.image)
        if not image.exists():
            raise FileNotFoundError(f"the site profile's container.image {image} is not there; correct its path")
        return
    try:
        done = subprocess.run(
            [python, "-c", _MISSING, *_NEEDED], capture_output=True, text=True, check=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise ValueError(
            f"the jobs' Python {python} can't be run: {' '.join(said)}. Name another: venv in the site profile, or "
            "SELFSIGHT_PYTHON"
        ) from None
    if missing := done.stdout.split():
        raise ValueError(f"the jobs' Python {python} lacks {', '.join(missing)}; install selfsight into it")


def _check_not_trained(folder: Path) -> None:
    """Refuse a run that a process holds right now, here or on a node that shares the folder."""
    place = folder / ".lock"
    if not place.is_file() or not os.access(place, os.W_OK):
        return
    with place.open("r+", encoding="utf-8") as file:
        if not lock(file):
            raise ConfigError(
                f"{folder} is being trained by another process ({file.read().strip() or 'unknown'}); wait for it, end "
                "it, or take a --name of its own"
            )


def _check_wandb(config: Config) -> None:
    """Refuse wandb online without a login: a job has nobody to ask."""
    from pretrain.tracking.wandb_identity import wandb_mode

    if config.tracking.wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        try:
            logged_in = wandb_mode("auto") == "online"
        except OSError:
            logged_in = False
        if not logged_in:
            raise ConfigError(
                "tracking.wandb is online and nobody is logged in here, which a job can't mend; run `wandb login`, or "
                "set tracking.wandb=offline and `wandb sync` later"
            )
