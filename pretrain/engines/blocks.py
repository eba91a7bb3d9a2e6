"""What `Method.blocks()` names, compiled and recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pretrain.config import EngineConfig
from pretrain.config.load import ConfigError

#: Variants of a block's code that may be compiled: each rate of drop path and each shape of attention makes one.
MOST_VARIANTS = 128


def prepare_blocks(blocks: Sequence[nn.Module], config: EngineConfig) -> None:
    """Compile the blocks of a method, and recompute them in the backward pass, where the configuration asks for it.

    Raises ConfigError where it does and there are none.
    """
    for asked, setting in ((config.activation_checkpointing, "activation_checkpointing"), (config.compile, "compile")):
        if asked and not blocks:
            raise ConfigError(
                f"engine.{setting} is about blocks, and the method names none; set engine.{setting}=false"
            )
    if config.activation_checkpointing:
        for block in blocks:
            if not keeps_statistics(block):
                block.forward = recomputed(block.forward)
    if config.compile:
        import torch._dynamo

        # beyond the limit a block would be left as it is, without a word
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_VARIANTS)
        for block in blocks:
            block.compile(dynamic=True)


def keeps_statistics(block: nn.Module) -> bool:
    """Whether a forward pass changes the block: computing it a second time would count its batch a second time."""
    return any(isinstance(part, _BatchNorm) for part in block.modules())


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that keeps nothing for the backward pass but its inputs; without gradients, as it is."""

    def run(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return run
