"""`selfsight embed`: features of every image as parquet files, made once and read by every probe."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_pipelines.packing.grouping import NO_GROUPS
from launch.data_commands import Progress
from launch.ranks import rank_environment

EMBED_EXAMPLES = (
    "Examples:\n\n[bold]selfsight embed runs/photos --data shards/ --out features/[/]\n\n"
    "[bold]selfsight launch --nproc 4 embed timm:vit_small_patch16_224.dino --data shards/ --out features/[/]\n\n"
    "[bold]srun selfsight embed runs/photos --data shards/ --out features/ --tokens[/]"
)


def embed(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint or an encoder folder, or timm:MODEL.")],
    data: Annotated[str, typer.Option(help="Shards; or images as `pack` takes: packed once. Labels are not needed.")],
    out: Annotated[Path, typer.Option(help="The store: a folder; what is there already is not made again.")],
    split: Annotated[str, typer.Option(help="train, val, test, or all that DATA has.")] = "all",
    tokens: Annotated[bool, typer.Option("--tokens", help="Keep the patch tokens, too: hundreds an image.")] = False,
    npy: Annotated[bool, typer.Option("--npy", help="Decode into .npy beside at once, not when read.")] = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in px; default: the encoder's own.")] = None,
    native: Annotated[
        bool, typer.Option("--native", help="Images keep their own shape, in as many patches as the square has.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    precision: Annotated[str, typer.Option(help="auto (bf16 where the device has it), fp32 or bf16.")] = "auto",
    last_blocks: Annotated[int, typer.Option(min=1, help="Blocks whose class token (or mean) is kept.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; each process takes a GPU of its own.")] = "auto",
    progress: Progress = True,
) -> None:
    """Compute the features of every image once, as parquet that every probe reads.

    One process by itself, or one of many under srun, torchrun or `selfsight launch`. The same command again goes on
    where the last one ended.
    """
    from pretrain.encoder_folder import check_target

    check_target(target)
    ranks = rank_environment(os.environ)
    tell = partial(print, flush=True)
    from launch.own_data import shards_of

    data = shards_of(data, NO_GROUPS, tell if ranks.rank == 0 else lambda line: None, progress and ranks.rank == 0)
    from eval.embed import embed as run
    from eval.probe import device_named

    chosen = device_named(device)
    if chosen == "cuda" and ranks.world_size > 1:
        import torch

        chosen = f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
    run(
        target, data, out, split=split, tokens=tokens, npy=npy, image_size=image_size, native=native,
        batch_size=batch_size, precision=precision, last_blocks=last_blocks, device=chosen, rank=ranks.rank,
        world_size=ranks.world_size, progress=progress, say=tell,
    )  # fmt: skip
