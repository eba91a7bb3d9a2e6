"""LoRA (Hu et al. 2022): to an encoder's linear layers a low-rank change, learned beside frozen weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.continuing.config import LoraConfig
from pretrain.encoders import Encoder

#: What an encoder calls its changes, among its modules.
NAME = "low_rank"


class LowRank(nn.Module):
    """x (..., i) to the change (..., o) = x A B * alpha / rank; B starts at zero, so that training starts with none."""

    def __init__(self, layer: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, config.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as the authors' code
        self.scale = config.alpha / config.rank

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale


class LowRanks(nn.Module):
    """The changes of all layers of an encoder that `config.layers` names, added to what these give.

    Raises ValueError where it has no such layer, or does not call it as a module.
    """

    def __init__(self, encoder: Encoder, config: LoraConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.names = [
            name
            for name, part in encoder.named_modules()
            if isinstance(part, nn.Linear)
            and (".attn." in name or ".mlp." in name)
            and name.rpartition(".")[2] in config.layers
        ]
        if not self.names:
            raise ValueError(
                f"lora.layers names {', '.join(config.layers)}, and {type(encoder).__name__} has no linear layer of "
                "its attention or MLP called so; set lora=null, or name others"
            )
        self.changes = nn.ModuleList()
        called: set[str] = set()
        for name in self.names:
            layer = encoder.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            change = LowRank(layer, config)
            self.changes.append(change)
            layer.register_forward_hook(_Added(change))
            layer.register_forward_hook(lambda *_, name=name: called.add(name))
        was_training = encoder.training
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, channels, *image_size))
        encoder.train(was_training)
        for name in self.names:
            hooks = encoder.get_submodule(name)._forward_hooks
            hooks.pop(next(reversed(hooks)))
        if called != set(self.names):
            missed = next(name for name in self.names if name not in called)
            raise ValueError(
                f"{type(encoder).__name__} reads the weights of {missed} without calling it, so that LoRA has no place "
                "there; set lora=null, or train_blocks to train a part"
            )

    @torch.no_grad()
    def merged(self, weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An encoder's `weights`, by the names of its parameters, with `changes`, this module's state dict, added."""
        merged = dict(weights)
        for place, name in enumerate(self.names):
            up, down = (changes[f"changes.{place}.{part}"].float() for part in ("up", "down"))
            change = self.changes[place]
            assert isinstance(change, LowRank)
            merged[f"{name}.weight"] = weights[f"{name}.weight"].float() + up @ down * change.scale
        return merged


class _Added:
    """A layer's output with its change; no module of the layer's own, whose names stay those of released weights."""

    def __init__(self, change: LowRank) -> None:
        self.change = change

    def __call__(self, layer: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out + self.change(given[0])


def add_low_rank(encoder: Encoder, config: LoraConfig, image_size: tuple[int, int], channels: int) -> None:
    """Freeze an encoder and give it changes that are trained where it was; its parameters keep their names."""
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    changes = LowRanks(encoder, config, image_size, channels)
    encoder.requires_grad_(False)
    encoder.add_module(NAME, changes.requires_grad_(learns))


def is_low_rank(name: str) -> bool:
    """Whether a parameter of a method is one of its encoder's changes."""
    return f"encoder.{NAME}." in name


def without_changes(encoder: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's whole state dict as a plain encoder takes it: with its changes, where it has any, merged."""
    changes = getattr(encoder, NAME, None)
    if not isinstance(changes, LowRanks):
        return dict(state)
    prefix = f"{NAME}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return changes.merged({key: value for key, value in state.items() if not key.startswith(prefix)}, own)
