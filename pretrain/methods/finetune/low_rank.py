"""LoRA (Hu et al. 2022): to each of an encoder's attention layers a low-rank change, learned beside frozen weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pretrain.encoders import Encoder
from pretrain.methods.finetune.config import LoraConfig


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

    The encoder's own parameters keep their names and become frozen. Raises ValueError where it has no such layer, or
    does not call it as a module.
    """

    def __init__(self, encoder: Encoder, config: LoraConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.names = [
            name
            for name, part in encoder.named_modules()
            if isinstance(part, nn.Linear) and ".attn." in name and name.rpartition(".")[2] in config.layers
        ]
        if not self.names:
            raise ValueError(
                f"method.lora.layers names {', '.join(config.layers)}, and {type(encoder).__name__} has no linear "
                "layer of its attention called so; set method.lora=null, or name others"
            )
        encoder.requires_grad_(False)
        self.changes = nn.ModuleList()
        called: set[str] = set()
        for name in self.names:
            layer = encoder.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            change = LowRank(layer, config)
            self.changes.append(change)
            layer.register_forward_hook(lambda _, given, out, change=change: out + change(given[0]))
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
                "there; set method.lora=null, or method.train_blocks to train a part"
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
