"""AdamW, its parameter groups, and their rates at each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pretrain.methods.base import Method
from pretrain.schedules import Cosine
from pretrain.schema import OptimConfig

#: Parameters that are tokens or positions, whatever their shape: never decayed.
TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed", "relative_position_bias_table")


def parameter_groups(method: Method, layer_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters grouped by what differs between them.

    Each group carries `lr_scale` (layer decay: rate of a layer relative to the one above it), `decay` (whether weight
    decay applies: not to biases, norms and tokens) and `frozen_until` (steps with neither rate nor decay).
    """
    encoder = method.encoder
    top = encoder.depth + 1 if encoder else 0
    groups: dict[tuple[float, bool, int], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = encoder.layer_of(name) if encoder and name.startswith("encoder.") else top
        decay = not (parameter.ndim <= 1 or name.endswith(".bias") or name.endswith(TOKENS) or method.no_decay(name))
        groups[layer_decay ** (top - layer), decay, method.frozen_until(name)].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "lr_scale": scale,
            "decay": decay,
            "frozen_until": frozen_until,
        }
        for (scale, decay, frozen_until), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(method: Method, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW over the method's groups; `set_rates` gives it its rates before each step."""
    groups = parameter_groups(method, config.layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=fused)


def set_rates(groups: Iterable[dict[str, Any]], step: int, lr: Cosine, weight_decay: Cosine) -> tuple[float, float]:
    """Write the rates of optimizer step `step` into the groups; gives the base rate and the weight decay.

    A frozen group has rate 0 AND decay 0. torch's AdamW multiplies the decay by the rate, but not every optimizer
    that the groups could be given to does.
    """
    rate, decay = lr(step), weight_decay(step)
    for group in groups:
        frozen = step < group["frozen_until"]
        group["lr"] = 0.0 if frozen else rate * group["lr_scale"]
        group["weight_decay"] = decay if group["decay"] and not frozen else 0.0
    return rate, decay
