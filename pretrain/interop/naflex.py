"""Encoders of images at their own shape as timm's NaFlexViT has them, where it computes the same."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
from safetensors.torch import save
from torch import nn

from pretrain.encoders import Encoder
from pretrain.encoders.registry import family_of
from pretrain.encoders.saved import EncoderCard


def recipe_of(card: EncoderCard) -> dict[str, Any]:
    """Arguments of `timm.create_model` whose NaFlexViT takes the weights, by its names.

    Raises ValueError with the reason where it computes something else on images of any shape.
    """
    family = family_of(card.encoder)
    why = family.why_not_naflex if family.naflex is None else _of_family(card).why_not(card.encoder)
    if why is not None:
        raise ValueError(
            f"timm {timm.__version__}'s NaFlexViT {why}. Try instead --to onnx OUT.onnx --native, or --to hf OUT/ "
            "--native, which selfsight opens"
        )
    recipe: dict[str, Any] = _of_family(card).recipe_of(card.encoder, card.image_size, card.channels)
    return recipe


def _of_family(card: EncoderCard) -> ModuleType:
    name = family_of(card.encoder).naflex
    assert name is not None
    return import_module(name)


def write_naflex(path: Path, encoder: Encoder, card: EncoderCard, recipe: dict[str, Any]) -> None:
    """Write a state dict that `timm.create_model(**recipe)` loads; the recipe, mean and std are in its header."""
    header = {"timm": json.dumps(recipe), "mean": json.dumps(card.mean), "std": json.dumps(card.std)}
    path.write_bytes(save(_of_family(card).state_of(encoder), metadata=header))


def open_naflex(path: Path, recipe: dict[str, Any]) -> nn.Module:
    """timm's model with the weights of a file that `write_naflex` wrote."""
    return timm.create_model(**recipe, checkpoint_path=str(path)).eval()
