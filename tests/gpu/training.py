"""Runs of the real trainer for the kit: on batches that stay on the device, watched, and without checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from data_pipelines.children.nursery import nursery
from pretrain.config import Config
from pretrain.engines.engine import choose_device, initialise_distributed
from pretrain.run import resolve
from pretrain.stream.batches import DeviceSteps, Step
from pretrain.stream.datasets import open_datasets, sampler_of
from pretrain.stream.normalisation import choose_normalisation
from pretrain.survival.run_folder import write_config
from pretrain.survival.stopping import StopRequest
from pretrain.survival.watchdog import Watchdog
from pretrain.train import Trainer


class Repeated(Iterator[Step]):
    """The first `count` steps of the loader over and over, on the device: training as fast as it can be fed."""

    def __init__(self, steps: DeviceSteps, count: int) -> None:
        self._steps, self._count = steps, count
        self._kept: list[Step] = []
        self._given = 0

    def __next__(self) -> Step:
        if len(self._kept) < self._count:
            step = next(self._steps)
            copies = [{name: value.clone() for name, value in batch.items()} for batch in step.micro_batches]
            self._kept.append(step._replace(micro_batches=copies))
        self._given += 1
        micro_batches = [dict(batch) for batch in self._kept[(self._given - 1) % self._count].micro_batches]
        return self._kept[(self._given - 1) % self._count]._replace(micro_batches=micro_batches)


class Watching(Watchdog):
    """A watchdog that ends nothing, and calls `look` with the number of each step when it begins."""

    def __init__(self, look: Callable[[int], None]) -> None:
        super().__init__()
        self._look = look

    def step(self, number: int) -> None:
        super().step(number)
        self._look(number)


def train(
    config: Config, *, repeat: int | None = None, look: Callable[[int], None] = lambda step: None
) -> list[dict[str, Any]]:
    """Train to the end and give the rows of its metrics.

    Args:
        config: The run. It saves nothing and leaves no encoder: a large one would take longer to write than to train.
        repeat: See so many batches over and over, instead of what the loader brings.
        look: Called with the number of each step, from 1, when it begins.
    """
    device = choose_device(config)
    rank, world_size = initialise_distributed(device)
    if repeat is not None:  # a few batches are all that is wanted
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0))
    datasets = open_datasets(config.data)
    config, _ = resolve(config, datasets)
    folder = Path(config.runs) / config.name
    write_config(folder, config)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    if config.data.workers:
        nursery()
    with ExitStack() as held:
        for name in ("save", "publish"):
            held.enter_context(patch.object(Trainer, name, lambda *given, **named: None))
        if repeat is not None:
            real = DeviceSteps
            held.enter_context(patch("pretrain.train.DeviceSteps", lambda *given: Repeated(real(*given), repeat)))
        normalisation = choose_normalisation(config, datasets)
        trainer = Trainer(config, folder, sampler_of(config, datasets), normalisation, device, rank, world_size)
        held.callback(trainer.close)
        trainer.train(StopRequest(), Watching(look))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The values of a metric in those rows that have it."""
    return [row[name] for row in rows if name in row]
