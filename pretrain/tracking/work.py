"""How much a method computes for an image, and what share of the device's peak that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from data_pipelines.loader import Batch
from pretrain.methods.base import Method

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Work:
    """What one image costs a training step.

    flops: floating-point operations of the model, a product and a sum counted as two: of the products of matrices,
        convolutions and attention alone. Threefold where gradients flow (forward, and a backward pass of twice that);
        once for teachers and tokenizers. What is computed a second time to save memory is not the model's.
    tokens: tokens that the first block of the encoder that learns is given, over all crops; None without such a block.
    """

    flops: float
    tokens: float | None

    def rates(self, images_per_second: float, peak: float | None, world_size: int) -> dict[str, float]:
        """Of all ranks together: `teraflops` a second and `tokens_per_second`; `mfu`, the share of the devices' `peak`
        (FLOP/s of one) where it is known."""
        speed = self.flops * images_per_second
        rates = {"teraflops": speed / 1e12}
        if self.tokens is not None:
            rates["tokens_per_second"] = self.tokens * images_per_second
        if peak is not None:
            rates["mfu"] = speed / (peak * world_size)
        return rates


def rates_of(
    method: Method, batch: Batch, look: Callable[[Batch], object], peak: float | None, world_size: int
) -> Callable[[float], dict[str, float]]:
    """What `Work.rates` says of a number of images per second; nothing where the work can't be counted, as of a plug-in
    that does what no counter follows."""
    try:
        work = count_work(method, batch, look)
    except Exception as error:  # on all ranks alike
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(
                f"FLOPs and tokens are not counted, and no MFU is told ({type(error).__name__}: {error}); training "
                "goes on all the same",
                flush=True,
            )
        return lambda images_per_second: {}
    return partial(work.rates, peak=peak, world_size=world_size)


def count_work(method: Method, batch: Batch, look: Callable[[Batch], object]) -> Work:
    """The work of a micro-batch, counted in one forward pass by `look`, which is `forward` without gradients.

    In evaluation mode: no path is dropped. Blocks that are compiled run as they are written, for what is compiled can't
    be counted. What the pass counted is put back. Under ZeRO 3 all ranks call it.
    """
    kept = [(buffer, buffer.clone()) for buffer in method.buffers()]
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention})
    was_training, tokens = method.training, _Tokens()
    blocks = method.encoder.blocks() if method.encoder is not None else []
    hook = blocks[0].register_forward_pre_hook(tokens.add) if blocks else None
    method.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter, _frozen(counter) as frozen:
            look(batch)
    finally:
        method.train(was_training)
        if hook is not None:
            hook.remove()
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    rows, total = len(batch["rows"]), counter.get_total_flops()
    return Work((3 * (total - frozen[0]) + frozen[0]) / rows, tokens.count / rows if tokens.count else None)


class _Tokens:
    """Counts the tokens (..., d) that a block is given."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs:
            given = getattr(inputs[0], "tokens", inputs[0])
            self.count += given.numel() // given.shape[-1]


@contextmanager
def _frozen(counter: FlopCounterMode) -> Iterator[list[int]]:
    """A list of one number: FLOPs counted in modules none of whose parameters learn."""
    inside: list[nn.Module] = []
    found = [0]

    def enter(module: nn.Module, inputs: Any) -> None:
        if inside:
            return
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            inside.append(module)
            found[0] -= counter.get_total_flops()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if inside and module is inside[0]:
            inside.clear()
            found[0] += counter.get_total_flops()

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _attention(query: Any, key: Any, value: Any, *given: Any, out_shape: Any = None, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)
