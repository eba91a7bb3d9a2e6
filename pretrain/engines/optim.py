"""AdamW, its parameter groups, and their rates at each step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import nn

from pretrain.config import OptimConfig
from pretrain.continuing.config import ContinuingConfig
from pretrain.continuing.low_rank import is_low_rank
from pretrain.encoders.base import depth_of
from pretrain.engines.adamw import AdamW
from pretrain.engines.schedules import Schedule
from pretrain.methods.base import Method

#: Parameters that are tokens or positions, whatever their shape: not decayed but for `Encoder.decayed`.
TOKENS = ("cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "relative_position_bias_table")

_ANYWHERE = (-math.inf, math.inf)


def parameter_groups(
    method: Method,
    layer_decay: float,
    patch_embed_lr_scale: float = 1.0,
    continuing: ContinuingConfig | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters grouped by what differs between them.

    Each group carries `lr_scale` (layer decay: rate of a layer relative to the one above it; times
    `patch_embed_lr_scale` for the patch embedding), `decay` (whether weight decay applies: not to biases, norms and
    tokens), `frozen_until` (steps with neither rate nor decay), `ramp_steps` (after these, in which the rate rises) and
    `bounds` (within which they are kept, or None).

    Raises ValueError when the patch embedding is to have a rate of its own and the encoder names none.
    """
    encoder = method.encoder
    top = encoder.depth + 1 if encoder else 0
    num_scaled = 0
    waits, ramp = (0, 0) if continuing is None else (continuing.heads_first_steps, continuing.ramp_steps)
    groups: dict[tuple[float, bool, int, int, tuple[float, float]], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        own = encoder is not None and name.startswith("encoder.")
        changes = own and is_low_rank(name)
        layer = depth_of(encoder, name) if own and not changes else top
        # decay would draw changes, and the weights with them, back to those that training began with, not to zero
        exempt = changes or method.no_decay(name) or (own and encoder.no_decay(name))
        token = name.endswith(TOKENS) and not (own and name.endswith(encoder.decayed))
        decay = not (parameter.ndim <= 1 or name.endswith(".bias") or token or exempt)
        scale = layer_decay ** (top - layer)
        if layer == 0 and _in_patch_embedding(name):
            scale *= patch_embed_lr_scale
            num_scaled += 1
        brought = own and not name.endswith("mask_token")
        frozen_until = max(method.frozen_until(name), waits if brought else 0)
        key = (scale, decay, frozen_until, ramp if brought else 0, method.bounds(name) or _ANYWHERE)
        groups[key].append((name, parameter))
    if patch_embed_lr_scale != 1 and not num_scaled:
        raise ValueError(
            f"optim.patch_embed_lr_scale is {patch_embed_lr_scale:g}, but {type(encoder).__name__} has no "
            "patch_embed to apply it to; set it to 1"
        )
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "lr_scale": scale,
            "decay": decay,
            "frozen_until": frozen_until,
            "ramp_steps": ramp_steps,
            "bounds": None if bounds == _ANYWHERE else bounds,
        }
        for (scale, decay, frozen_until, ramp_steps, bounds), members in sorted(
            groups.items(), key=lambda item: item[0]
        )
    ]


def _in_patch_embedding(name: str) -> bool:
    """Whether a parameter belongs to a module that makes tokens of pixels: `patch_embed`, `patch_embed1`, ..."""
    return any(part.startswith("patch_embed") for part in name.split(".")[:-1])


def build_optimizer(method: Method, config: OptimConfig, continuing: ContinuingConfig | None = None) -> AdamW:
    """AdamW over the method's groups; `set_rates` gives it its rates before each step."""
    groups = parameter_groups(method, config.layer_decay, config.patch_embed_lr_scale, continuing)
    return AdamW(groups, config.betas, config.eps, config.clip_grad)


def set_rates(groups: Iterable[dict[str, Any]], step: int, lr: Schedule, weight_decay: Schedule) -> tuple[float, float]:
    """Write the rates of optimizer step `step` into the groups; gives the base rate and the weight decay.

    A frozen group has rate 0 AND decay 0. torch's AdamW multiplies the decay by the rate, but not every optimizer
    that the groups could be given to does.
    """
    rate, decay = lr(step), weight_decay(step)
    for group in groups:
        frozen = step < group["frozen_until"]
        group["lr"] = 0.0 if frozen else rate * group["lr_scale"] * _risen(step, group)
        group["weight_decay"] = decay if group["decay"] and not frozen else 0.0
    return rate, decay


def _risen(step: int, group: dict[str, Any]) -> float:
    """The share of its rate that a group has in its ramp: all of it in the ramp's last step, and without one."""
    ramp = group.get("ramp_steps", 0)
    return 1.0 if not ramp else min(1.0, (step - group["frozen_until"] + 1) / ramp)
