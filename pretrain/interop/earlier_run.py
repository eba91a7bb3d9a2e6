"""What a run that starts from another of the same method takes beside the encoder: heads, predictors, decoders."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.checkpoints.folder import read_state
from pretrain.checkpoints.pieces import Pieces
from pretrain.checkpoints.saving import piece_name
from pretrain.methods.base import Method


@torch.no_grad()
def take_rest(method: Method, source: Path) -> list[str]:
    """Put what surrounds the encoder in a run's latest checkpoint, or in the checkpoint `source`, into a method before
    it trains; says what was taken.

    Of what has a slow average that is taken, as the encoder is. `source` of other kinds, such as RUN/encoder, holds
    the encoder alone: nothing is taken. Nor is it for a method that saves a head beside its encoder, which belongs to
    that run's labels.
    """
    checkpoint = checkpoint_of(source)
    if checkpoint is None or method.beside_encoder() is not None:
        return []
    world_size, averages = read_state(checkpoint).world_size, _averages(method)
    taken, left = 0, []
    with Pieces([checkpoint / piece_name(rank, world_size) for rank in range(world_size)]) as pieces:
        for name, parameter in method.named_parameters():
            if name.startswith("encoder.") or not (parameter.requires_grad or name in averages):
                continue
            theirs = averages.get(name, name)
            if pieces.shapes.get(theirs) != tuple(parameter.shape):
                left.append(name)
                continue
            parameter.copy_(pieces.whole(theirs))
            taken += 1
        taken += _take_buffers(method, pieces)
    if not taken:
        return []
    lines = [f"{taken} tensors of the method around it, of {checkpoint.name}"]
    return lines + ([f"fresh: {', '.join(left[:6])} (not there, or of another shape)"] if left else [])


def _take_buffers(method: Method, pieces: Pieces) -> int:
    """Centres and running statistics of what surrounds the encoders: without its centre a head that has learned tells
    every image the same at first."""
    kept, taken = method.state_dict().keys(), 0
    for name, buffer in method.named_buffers():
        around = name in kept and not any(part.endswith("encoder") for part in name.split("."))
        if around and pieces.shapes.get(name) == tuple(buffer.shape):
            buffer.copy_(pieces.whole(name))
            taken += 1
    return taken


def _averages(method: Method) -> dict[str, str]:
    """The names of parameters that slow averages follow, and those of the averages."""
    names = {id(module): name for name, module in method.named_modules()}
    return {
        f"{names[id(fast)]}.{name}": f"{names[id(slow)]}.{name}"
        for slow, fast in method.ema_pairs()
        for name, _ in slow.named_parameters()
    }


def checkpoint_of(source: Path) -> Path | None:
    """The checkpoint that a run has last, or that `source` is; None where it is neither."""
    latest = source / "checkpoints" / "latest"
    if latest.is_file():
        source = latest.parent / latest.read_text(encoding="utf-8").strip()
    return source if next(source.glob("piece-*.safetensors"), None) else None
