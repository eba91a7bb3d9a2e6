"""One rank of several tiny runs, one after the other: `python worker.py CONFIGS.json`. Started by test_train.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch

from pretrain.config.load import parse_config
from pretrain.engines.engine import choose_device, initialise_distributed
from pretrain.run import resolve
from pretrain.stream.datasets import open_datasets, sampler_of
from pretrain.stream.normalisation import choose_normalisation
from pretrain.survival.run_folder import check_run_folder, write_config
from pretrain.survival.stopping import StopRequest
from pretrain.survival.watchdog import Watchdog
from pretrain.train import Trainer


def run(data: dict[str, Any], rank: int, world_size: int) -> None:
    """What `pretrain.run.pretrain` does, within a process group that several runs share."""
    save_at_start = data.pop("save_at_start", False)  # what was loaded, written once more
    config = parse_config(data)
    datasets = open_datasets(config.data)
    config, _ = resolve(config, datasets)
    folder = check_run_folder(config)
    if rank == 0:
        write_config(folder, config)
    normalisation = choose_normalisation(config, datasets)
    trainer = Trainer(
        config, folder, sampler_of(config, datasets), normalisation, choose_device(config), rank, world_size
    )
    if save_at_start:
        trainer.save(wait=True)
    trainer.train(StopRequest(), Watchdog())
    trainer.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    configs = json.loads(Path(sys.argv[1]).read_text())
    place = initialise_distributed(torch.device("cpu"))
    for each in configs:
        run(each, *place)
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's engines hold on to each other; nothing is left to do
