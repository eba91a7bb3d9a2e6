"""AdamW's moments of a run that is gone on from: `continuing.optimizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoints.folder import read_state
from pretrain.checkpoints.pieces import Pieces
from pretrain.checkpoints.saving import piece_name
from pretrain.config import Config
from pretrain.engines import live_state
from pretrain.interop.earlier_run import checkpoint_of


def take_optimizer(engine: Any, config: Config) -> str | None:
    """Give a fresh engine the moments of the run, or of the checkpoint, that `init_from` names, where
    `continuing.optimizer` asks for them; says so.

    Raises ValueError where there are none, or not of every parameter that learns: moments of zero beside a count of
    steps that is not would make the first steps of the others several times too long.
    """
    if config.continuing is None or not config.continuing.optimizer:
        return None
    source = config.init_from
    assert source is not None
    checkpoint = checkpoint_of(Path(source).expanduser())
    if checkpoint is None:
        raise ValueError(
            f"continuing.optimizer is true, and init_from {source} holds no optimizer's state: name a run or one of "
            "its checkpoints (RUN/checkpoints/step-...), or set continuing.optimizer=false"
        )
    world_size = read_state(checkpoint).world_size
    with Pieces([checkpoint / piece_name(rank, world_size) for rank in range(world_size)]) as pieces:
        lacking = live_state.restore_moments(engine, pieces)
        if lacking:
            raise ValueError(
                f"continuing.optimizer is true, and {checkpoint} has no moments of {', '.join(lacking[:3])} in the "
                f"run's shape ({len(lacking)} parameters); set continuing.optimizer=false, or give the method and the "
                "encoder the source's settings"
            )
        steps = int(max(pieces.steps.values()))
    return f"  AdamW's moments after {steps} steps, of {checkpoint.name}"
