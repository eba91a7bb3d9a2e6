"""What VQ-KD's teacher must be, told before anything starts."""

from __future__ import annotations

from pretrain.config import Config
from pretrain.methods import teachers


def check_teacher(config: Config) -> None:
    """Raise ValueError unless the encoder that is named is there and has a map of tokens for the run's images."""
    size, channels = config.views.global_size, config.data.channels
    teachers.check_teacher(config.method.teacher, size, "views.global_crops", channels, "VQ-KD")
