"""What of a DeepSpeed engine a checkpoint holds: where each rank keeps which part of it, under every ZeRO stage.

Stage 0 keeps all of it on every rank. Stages 1 and 2 divide the fp32 parameters of the optimizer and their moments:
each group's are laid one after the other, and each rank owns an equal stretch of that; the module's own parameters
stay whole. Stage 3 divides every parameter, frozen ones too. What is said here of DeepSpeed's insides was read in
0.19 and is held by tests on every stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.checkpoints.pieces import MOMENTS, VALUE, Part, Pieces
from pretrain.encoders.divided import division_of

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def counters(engine: Any) -> dict[str, int]:
    """DeepSpeed's own numbers that a resumed engine must go on from."""
    return {name: int(getattr(engine, name)) for name in _COUNTERS}


def own_parts(engine: Any) -> list[Part]:
    """What this rank is to write: all it holds alone, and its share of what every rank holds."""
    return list(_shared(_parts(engine), dist.get_rank(), dist.get_world_size()))


def num_bytes(engine: Any) -> int:
    """The size of a checkpoint's pieces together, of all ranks."""
    trained = sum(12 * _numel(p) for p in engine.module.parameters() if p.requires_grad)
    frozen = sum(4 * _numel(p) for p in engine.module.parameters() if not p.requires_grad)
    return trained + frozen + sum(buffer.numel() * buffer.element_size() for _, buffer in _buffers(engine.module))


def tensor_names(module: nn.Module) -> dict[int, str]:
    """By identity: under which name a checkpoint holds a parameter or buffer of the module."""
    named = [*module.named_parameters(), *_buffers(module)]
    return {id(tensor): name for name, tensor in named}


@torch.no_grad()
def restore(engine: Any, pieces: Pieces, counted: dict[str, int]) -> None:
    """Bring an engine to the state of a checkpoint, whatever ranks and stage wrote it. All ranks call it.

    The engine is fresh: of the same method and groups, no step taken. AdamW counts steps once for all parameters;
    where a checkpoint has several counts, as older ones may, the highest is taken.

    Raises ValueError where the checkpoint is of another model.
    """
    _check_names(engine.module, pieces)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # all parameters divided
    optimizer = engine.optimizer.optimizer if stage else engine.optimizer
    if pieces.steps:
        optimizer.begin(max(pieces.steps.values()))
    for part in [*_parts(engine), *_followers(engine)]:
        if part.kind == VALUE or pieces.has(part.kind, part.name):
            part.write(pieces.read(part.kind, part.name, part.offset, part.numel))
    for name, value in counted.items():
        setattr(engine, name, value)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    # stage 3 gathers its small parameters when they are next used. Its own `checkpoint_event_epilogue` would do so
    # here, and DeepSpeed 0.19 then fails in the second step ("tracing error") with modules that run twice in a pass


@torch.no_grad()
def restore_moments(engine: Any, pieces: Pieces) -> list[str]:
    """Give a fresh engine the moments of a checkpoint, and its count of steps; the names of parameters that learn and
    of which it has none in their shape: then nothing is taken. All ranks call it."""
    stage = engine.zero_optimization_stage()
    learned = {name: whole_shape(p) for name, p in engine.module.named_parameters() if p.requires_grad}
    lacking = [
        name for name, shape in learned.items()
        if pieces.shapes.get(name) != shape or not all(pieces.has(moment, name) for moment in MOMENTS)
    ]  # fmt: skip
    if lacking:
        return lacking
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()  # all parameters divided
    (engine.optimizer.optimizer if stage else engine.optimizer).begin(max(pieces.steps.values()))
    for part in _parts(engine):
        if part.kind in MOMENTS:
            part.write(pieces.read(part.kind, part.name, part.offset, part.numel))
    return []


def _check_names(module: nn.Module, pieces: Pieces) -> None:
    shapes = {name: whole_shape(parameter) for name, parameter in module.named_parameters()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in _buffers(module)}
    wrong = sorted(
        name for name in shapes.keys() | pieces.shapes.keys()
        if shapes.get(name) != pieces.shapes.get(name) and math.prod(shapes.get(name, (1,)))
    )  # fmt: skip
    if wrong:
        known = [f"{name}: {pieces.shapes.get(name)} there, {shapes.get(name)} here" for name in wrong[:3]]
        raise ValueError(f"the checkpoint is of another model; {len(wrong)} tensors differ: {'; '.join(known)}")


def _parts(engine: Any) -> Iterator[Part]:
    """All that this rank holds of the state: parameters and their moments, frozen parameters, buffers."""
    stage = engine.zero_optimization_stage()
    states = (engine.optimizer.optimizer if stage else engine.optimizer).state
    for name, shape, master, start, offset, numel in fragments(engine):
        where = {"name": name, "shape": shape, "offset": offset, "numel": numel, "start": start}
        where |= {"replicated": stage == 0 and division_of(master) is None, "twin": _is_twin(master)}
        yield Part(VALUE, tensor=master, **where)
        state = states.get(master)
        if state:
            for moment in MOMENTS:
                yield Part(moment, tensor=state[moment], steps=float(state["step"]), **where)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        division = division_of(parameter)
        if stage == 3:
            yield from _local_part(name, parameter)
        elif division is not None:
            numel, twin = parameter.numel(), _is_twin(parameter)
            yield Part(VALUE, name, division.shape, division.offset, numel, parameter, twin=twin)
        else:
            shape = tuple(parameter.shape)
            yield Part(VALUE, name, shape, 0, parameter.numel(), parameter, replicated=True)
    for name, buffer in _buffers(engine.module):
        yield Part(VALUE, name, tuple(buffer.shape), 0, buffer.numel(), buffer, replicated=True)


def _followers(engine: Any) -> Iterator[Part]:
    """The module's own parameters where the optimizer keeps another copy: it is that which a step changes."""
    stage = engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and stage == 3:
            yield from _local_part(name, parameter)
        elif parameter.requires_grad and stage:
            yield Part(VALUE, name, tuple(parameter.shape), 0, parameter.numel(), parameter)


def fragments(engine: Any) -> Iterator[tuple[str, tuple[int, ...], Tensor, int, int, int]]:
    """Of each trained parameter what this rank's optimizer holds: name, whole shape, the optimizer's tensor, where it
    starts there, where in the parameter, and how many elements."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    trained = {id(p): (name, p) for name, p in engine.module.named_parameters() if p.requires_grad}
    if stage == 0:
        for name, p in trained.values():
            division = division_of(p)
            yield name, whole_shape(p), p, 0, 0 if division is None else division.offset, p.numel()
    elif stage == 3:
        for name, p in trained.values():
            group, start, length = zero.grad_position[zero.get_param_id(p)]
            offset = length * dist.get_rank()
            numel = min(length, p.ds_numel - offset)
            if numel > 0:  # the last ranks may hold padding
                yield name, tuple(p.ds_shape), zero.fp32_partitioned_groups_flat[group], start, offset, numel
    else:
        for number, master in enumerate(zero.single_partition_of_fp32_groups):
            whole = zero.bit16_groups_flat[number]
            first = master.numel() * dist.get_rank(group=zero.real_dp_process_group[number])
            for p in zero.bit16_groups[number]:
                # where it really lies, whatever order and padding the group was laid out with
                assert p.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                at = p.storage_offset() - whole.storage_offset()
                begin, end = max(at, first), min(at + p.numel(), first + master.numel())
                if begin < end:
                    yield trained[id(p)][0], tuple(p.shape), master, begin - first, begin - at, end - begin


def _local_part(name: str, parameter: nn.Parameter) -> Iterator[Part]:
    """This rank's part of a parameter that stage 3 has divided; the last ranks may hold nothing of it."""
    held: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    offset = held.numel() * dist.get_rank()
    numel = min(held.numel(), _numel(parameter) - offset)
    if numel > 0:
        yield Part(VALUE, name, whole_shape(parameter), offset, numel, held)


def _shared(parts: Iterator[Part], rank: int, world_size: int) -> Iterator[Part]:
    """The parts of which a rank has others, and an equal share of the elements of those that all ranks have."""
    everywhere = []
    for part in parts:
        if part.replicated:
            everywhere.append(part)
        elif part.numel and not part.twin:
            yield part
    total = sum(part.numel for part in everywhere)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    at = 0
    for part in everywhere:
        begin, end = max(at, first), min(at + part.numel, last)
        if begin < end:
            yield Part(
                part.kind, part.name, part.shape, begin - at, end - begin, part.tensor, begin - at, True, part.steps
            )
        at += part.numel


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that are state: those that a state dict holds."""
    kept = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter of which this rank may hold a part."""
    division = division_of(parameter)
    return tuple(getattr(parameter, "ds_shape", parameter.shape)) if division is None else division.shape


def _is_twin(parameter: Tensor) -> bool:
    """Whether an earlier rank holds the same part of a parameter of which ranks hold parts."""
    division = division_of(parameter)
    return division is not None and not division.ranks.is_first


def _numel(parameter: nn.Parameter) -> int:
    return math.prod(whole_shape(parameter))
