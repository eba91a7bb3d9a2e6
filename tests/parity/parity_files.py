"""Recorded values, and the encoder that the importer makes of their weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Encoder, Features
from pretrain.encoders.layouts import Imported
from pretrain.encoders.saved import load_encoder
from pretrain.interop.official import import_checkpoint


def recorded(name: str) -> dict[str, Any]:
    """A file of the folder that SELFSIGHT_PARITY names; the test is skipped without one."""
    folder = os.environ.get("SELFSIGHT_PARITY")
    if not folder:
        pytest.skip("set SELFSIGHT_PARITY to the folder of recorded values")
    return torch.load(Path(folder) / name, weights_only=True)


def imported(
    state: dict[str, Tensor],
    layout: str,
    folder: Path,
    *overrides: str,
    mask_token: bool = False,
    size: tuple[int, int] | None = None,
    which: str = "teacher",
) -> tuple[Encoder, Imported]:
    """The encoder that the importer makes of a recorded state dict, read back from disk, of images of `size`."""
    folder.mkdir(exist_ok=True)
    wrapped = state if any(isinstance(value, dict) for value in state.values()) else {"model": state}
    torch.save(wrapped, folder / "checkpoint.pth")
    found = import_checkpoint(folder / "checkpoint.pth", layout, folder / "encoder", which=which, overrides=overrides)
    saved, card = load_encoder(folder / "encoder")
    encoder = build_encoder(card.encoder, size or card.image_size, card.channels, mask_token=mask_token)
    encoder.inner().load_state_dict(saved.inner().state_dict())
    return encoder, found


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).detach())


def everything(features: Features) -> Tensor:
    """(b, p + n, d) class and register tokens, then patches."""
    parts = [features.tokens] if features.prefix_tokens is None else [features.prefix_tokens, features.tokens]
    return torch.cat(parts, dim=1)


def gradients_as_state(record: dict[str, Any]) -> dict[str, Tensor]:
    """The recorded gradients in the place of the weights: what an importer does to weights, it does to gradients."""
    known = dict(record["grads"])
    known |= {
        f"norms.3.{end}": known[f"norm.{end}"] for end in ("weight", "bias") if f"norms.3.{end}" in record["state_dict"]
    }
    without = set(record.get("without_grad", ()))
    return {
        name: known[name] if name in known else torch.zeros_like(value) if name in without else value
        for name, value in record["state_dict"].items()
    }
