"""What of a DeepSpeed engine's step we do ourselves: reducing in stages 0 and 1, clipping, leaving a step out.

DeepSpeed's own has a collective and several host waits for every parameter group, and a wait for every bucket that is
to overlap with the backward pass. What is said here of its insides was read in 0.19 and is held by tests on all stages.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.encoders.divided import division_of
from pretrain.engines.adamw import AdamW, Stretch
from pretrain.engines.expert_parallel import finish_experts
from pretrain.engines.live_state import fragments
from pretrain.engines.reduction import GradientReduction


def take_over(engine: Any, optimizer: AdamW) -> None:
    """Have `optimizer` find its parameters where DeepSpeed has put them, and be the one that clips and leaves out."""
    stage, trained = engine.zero_optimization_stage(), dict(engine.module.named_parameters())
    device = engine.device
    optimizer.attach(
        (Stretch(trained[name], master, start, numel) for name, _, master, start, _, numel in fragments(engine)),
        divided=stage > 0,
        device=device,
    )
    zero = engine.optimizer
    if stage == 0:
        _reduce_whole(engine)
    elif stage == 3:
        zero.clip_grad = 0.0
        zero._get_norm_groups = lambda: [torch.zeros(())]  # on the host: it is asked whether that is finite
        zero.unscale_and_clip_grads = lambda *_: None
    else:
        zero.clip_grad, zero.compute_grad_norm, zero.check_grad_overflow = 0.0, False, False
        if stage == 1 and not zero.cpu_offload:
            _reduce_for_partitions(engine)


def _reduce_whole(engine: Any) -> None:
    learned = [p for p in engine.module.parameters() if p.requires_grad]
    trained = [p for p in learned if division_of(p) is None]
    divided = [p for p in learned if division_of(p) is not None]
    if dist.get_world_size() == 1:
        engine.buffered_allreduce_fallback = lambda *_, **__: _fill(trained)
        return
    places, end = [], 0
    for parameter in trained:
        places.append((parameter, end))
        end += parameter.numel()
    reduction = GradientReduction(places, end, engine.is_gradient_accumulation_boundary, dist.get_world_size())

    def reduce_gradients(*_: Any, **__: Any) -> None:
        finish_experts(divided)
        reduction.finish()

    engine.buffered_allreduce_fallback = reduce_gradients


def _fill(trained: list[nn.Parameter]) -> None:
    """A parameter without a gradient counts as one of gradient zero, on any number of ranks."""
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _reduce_for_partitions(engine: Any) -> None:
    """The flat gradient has the layout of ZeRO's flat parameters, so that a rank's part of it is a stretch."""
    zero = engine.optimizer
    (flat,), (trained,), (master,) = zero.bit16_groups_flat, zero.bit16_groups, zero.single_partition_of_fp32_groups
    places = [(p, p.storage_offset() - flat.storage_offset()) for p in trained]
    reduction = GradientReduction(places, flat.numel(), engine.is_gradient_accumulation_boundary, dist.get_world_size())
    first = master.numel() * dist.get_rank(group=zero.real_dp_process_group[0])
    own = SimpleNamespace(flat_partition=reduction.flat.narrow(0, first, master.numel()))

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        reduction.finish()
        for parameter in trained:
            parameter.grad = None
        zero.averaged_gradients[0] = own

    zero.reduce_gradients = reduce_gradients
