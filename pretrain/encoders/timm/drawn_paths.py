"""timm's stochastic depth with draws that are a function of (seed, step, row, crop, branch), as in `../drop_path.py`.

timm's blocks add up their branches themselves, so nothing is skipped here: what is dropped is computed and multiplied
by zero. Which images those are does not depend on ranks, accumulation or who shares a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path

Weights = list[Tensor]  # of one module: (b,) fp32 for each of its calls in a pass


class DrawnDropPath(DropPath):
    """timm's DropPath that is handed what each image's branch is multiplied by; outside of `drawn` it draws itself.

    weights: of the pass, one for each call. calls: how many there were.
    """

    weights: Weights
    calls: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.weights:
            return super().forward(x)
        weights = self.weights[self.calls]
        self.calls += 1
        each = x.shape[0] // weights.shape[0]
        if each * weights.shape[0] != x.shape[0]:
            raise ValueError(
                f"a branch of this timm model has {x.shape[0]} rows for {weights.shape[0]} images, so which image each "
                "belongs to is not known; set encoder.drop_path=0"
            )
        if each > 1:  # MobileViT's branches have a row for each place within a patch, image by image
            weights = weights.repeat_interleave(each)
        return (x * weights.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)

    def hand(self, weights: Weights) -> None:
        self.weights, self.calls = weights, 0


class _Handed:
    """A block that may be computed again in the backward pass, and then drops the same: its draws are an input."""

    def forward(self, *inputs: Any, drawn: Sequence[Weights] = (), **named: Any) -> Any:
        if drawn:
            for part, weights in zip(drop_paths(self), drawn, strict=True):
                part.hand(weights)
        return super().forward(*inputs, **named)


@cache
def _handed(block: type) -> type:
    return type(block.__name__, (_Handed, block), {})


def _hand_in(block: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook before a block: what its modules were handed goes along as an input."""
    return inputs, {**named, "drawn": [part.weights for part in drop_paths(block)]}


def drop_paths(module: nn.Module) -> list[DrawnDropPath]:
    return [part for part in module.modules() if isinstance(part, DrawnDropPath)]


def take_over(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Have a timm model drop what it is handed by `draw`. `blocks` are those that may be computed again."""
    for part in model.modules():
        if type(part) is DropPath:
            part.__class__ = DrawnDropPath  # timm builds it; ours differs in `forward`, not in state
            part.hand([])
    for block in blocks:
        if drop_paths(block):
            block.__class__ = _handed(type(block))
            block.register_forward_pre_hook(_hand_in, with_kwargs=True)


def draw(model: nn.Module, calls: Sequence[int], images: Tensor) -> None:
    """Hand each DropPath of a model its weights for a pass over `images` (b, ...), all crops of a view after another.

    calls: how often each is called in a pass, in the order of `model.modules()`.
    """
    parts = drop_paths(model)
    rates = [part.drop_prob for part, count in zip(parts, calls, strict=True) for _ in range(count)]
    weights = drop_path.weights_of(rates, images.shape[0], images.device) if model.training else None
    for part, count in zip(parts, calls, strict=True):
        part.hand([] if weights is None else weights[:count])
        weights = weights if weights is None else weights[count:]
