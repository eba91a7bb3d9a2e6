"""What distillation's teacher must be, told before anything starts."""

from __future__ import annotations

from pretrain.config import Config
from pretrain.methods.teachers import check_teacher


def check(config: Config) -> None:
    """Raise ValueError unless the encoder that is named is there and knows images of the size that it is shown."""
    views, method = config.views, config.method
    shown = views.global_size if views.teacher_crops is None else views.teacher_crops.size
    where = "views.global_crops" if views.teacher_crops is None else "views.teacher_crops"
    needs = "a loss of patches (or set method.patch_weight=0)" if method.patch_weight else None
    check_teacher(method.teacher, shown, where, config.data.channels, needs)
