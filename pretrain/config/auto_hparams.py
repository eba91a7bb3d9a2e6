"""Settings that are `auto`, chosen by their method from the number of training images (imports no torch)."""

from __future__ import annotations

import dataclasses

from pretrain.config import Config
from pretrain.methods.registry import spec_of


def resolve_auto(config: Config, num_images: int, begun: Config | None = None) -> tuple[Config, list[str]]:
    """The configuration with every `auto` replaced, and a line for each that says what was chosen and why.

    A run that has begun keeps what was chosen then, however many images there are by now.
    """
    method = config.method
    kept = begun.method if begun is not None and begun.method.name == method.name else None
    resolved, lines = spec_of(method).resolve(method, num_images, kept)
    return dataclasses.replace(config, method=resolved) if lines else config, lines
