"""DINO's `auto` settings, chosen from the number of training images (imports no torch).

The published numbers are ImageNet's; fewer images want fewer prototypes, a colder teacher and a faster average. The
table is lightly-train's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.methods.dino.config import DinoConfig

IMAGENET_IMAGES = 1_281_167
SMALL_IMAGES = 20_000
#: Fewer images than the first number: so many prototypes.
PROTOTYPES = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))


def resolve(method: DinoConfig, num_images: int, begun: DinoConfig | None) -> tuple[DinoConfig, list[str]]:
    """The section with every `auto` replaced, and a line for each; what `begun` has, where the run has begun."""
    prototypes = next((count for below, count in PROTOTYPES if num_images < below), 65536)
    temperature = between(num_images, 0.02, 0.07)
    chosen = {
        "prototypes": prototypes,
        "teacher_temperature": temperature,
        "teacher_momentum": between(num_images, 0.99, 0.996),
    }
    chosen = {name: value for name, value in chosen.items() if getattr(method, name) == "auto"}
    if not chosen:
        return method, []
    why = f"for {num_images:,} images"
    if begun is not None:
        chosen, why = {name: getattr(begun, name) for name in chosen}, "as when the run began"
    lines = [f"method.{name}: auto is {value:g} {why}" for name, value in chosen.items()]
    if chosen.get("teacher_temperature", 1.0) < method.warmup_teacher_temperature:
        temperature = chosen["teacher_temperature"]
        chosen["warmup_teacher_temperature"] = temperature  # a warm-up rises
        lines.append(f"method.warmup_teacher_temperature: {temperature:g}, no more than the temperature it rises to")
    return dataclasses.replace(method, **chosen), lines


def between(num_images: int, small: float, imagenet: float) -> float:
    """From `small` at 20,000 images to `imagenet` at ImageNet's number, linear, three digits."""
    share = (num_images - SMALL_IMAGES) / (IMAGENET_IMAGES - SMALL_IMAGES)
    return round(small + (imagenet - small) * min(max(share, 0.0), 1.0), 3)
