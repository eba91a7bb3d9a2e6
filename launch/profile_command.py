"""The work of `selfsight data profile`: a preset's loader, measured."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show_profile(preset: str, overrides: Sequence[str], gpu_rate: float | None, seconds: float, as_json: bool) -> None:
    """Print how fast this process makes a preset's batches, what its threads do, and the cores for a GPU's rate."""
    from data_pipelines.loader import Loader
    from data_pipelines.profile import profile, ranks_for_profiling
    from pretrain.config.load import load_config
    from pretrain.stream.datasets import sampler_of, training_datasets
    from pretrain.stream.loading import loader_of, resolve_backend

    config = resolve_backend(load_config(preset, overrides))
    datasets = training_datasets(config)
    sampler = sampler_of(config, datasets)
    world_size = ranks_for_profiling(sampler.batch_size)

    def make(threads: int | None) -> Loader:
        return loader_of(
            config, sampler, workers=0, world_size=world_size, **({} if threads is None else {"threads": threads})
        )

    found = profile(make, seconds)
    total = sum(found.milliseconds.values())
    if as_json:
        result = {
            "preset": preset,
            "backend": found.backend,
            "threads": found.threads,
            "images_per_second": {"one_thread": found.rate_of_one, "all_threads": found.rate_of_all},
            "scaling": found.scaling,
            "milliseconds_per_image": found.milliseconds,
            "gpu_rate": gpu_rate,
            "cores_needed": None if gpu_rate is None else found.cores_for(gpu_rate),
        }
        print(json.dumps(result, indent=2))
        return
    table = Table("stage", "ms an image", "share", title=f"{preset}, crops by {found.backend}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, milliseconds in found.milliseconds.items():
        table.add_row(stage, f"{milliseconds:.3f}", f"{milliseconds / total:.0%}")
    console = Console()
    console.print(table)
    several = f"; {found.threads} threads: {found.rate_of_all:,.0f} images/s, {found.scaling:.0%} of as many times one"
    console.print(f"one thread: {found.rate_of_one:,.0f} images/s{several if found.threads > 1 else ''}")
    if gpu_rate is not None:
        cores = found.cores_for(gpu_rate)
        console.print(f"{gpu_rate:,.0f} images/s need {cores} core{'s' * (cores > 1)} of this kind")
