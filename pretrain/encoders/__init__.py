"""Image encoders behind one seam (`base.Encoder`), a folder for each family (importing this imports no torch)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.encoders.base import Encoder, Features, Mask
    from pretrain.encoders.registry import build_encoder

__all__ = ["Encoder", "Features", "Mask", "build_encoder"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{'registry' if name == 'build_encoder' else 'base'}"), name)
