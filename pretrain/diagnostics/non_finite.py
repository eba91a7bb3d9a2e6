"""Values that are not finite: which layer made them, from which samples. Costs nothing until it happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.diagnostics.weights import piece_of

MOST_NAMES = 5  # of parameters that are told


class TroubleError(ValueError):
    """Training went wrong: the same again would, too. `reason` is for the run's history."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class NonFiniteError(TroubleError):
    """The loss or the gradient is not a finite number; training on would destroy the weights."""

    def __init__(self, message: str) -> None:
        super().__init__(message, f"non_finite: {message.partition(';')[0]}")


def check_finite(
    loss_by_rank: list[float], grad_norm: float | None, step: int, last_checkpoint: str | None, found: str = ""
) -> None:
    """Raise NonFiniteError on every rank alike, naming the step, the rank and the checkpoint to go back to.

    A gradient norm that is not finite counts too. `found`: what is known of the layer.
    """
    what = what_is_wrong(loss_by_rank, grad_norm, step)
    if what is None:
        return
    where = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    raise NonFiniteError(
        f"{what}{found}; {where}. The same command would meet the same batches with the same weights: start a run of "
        "its own (name=...) with a lower optim.lr, with optim.clip_grad, or with engine.precision=fp32; or leave out "
        "such steps with diagnostics.skip_non_finite"
    )


def what_is_wrong(loss_by_rank: list[float], grad_norm: float | None, step: int) -> str | None:
    """In words, or None where all numbers of a step are finite."""
    bad = [rank for rank, loss in enumerate(loss_by_rank) if not math.isfinite(loss)]
    if bad:
        return f"loss became {loss_by_rank[bad[0]]} on rank {bad[0]} in step {step}"
    if grad_norm is not None and not math.isfinite(grad_norm):
        return f"the gradient norm became {grad_norm} in step {step} (every rank's loss is finite)"
    return None


def find_in_weights(method: nn.Module) -> dict[str, Any] | None:
    """Parameters of which this rank holds a value that is not finite, and buffers with NaN (a mask may hold -inf)."""
    held = [(name, piece_of(parameter)) for name, parameter in method.named_parameters()]
    held += [
        (name, buffer.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)) for name, buffer in method.named_buffers()
    ]
    return _named(held, "weights")


def find_in_forward(method: nn.Module, run: Callable[[], dict[str, Tensor]]) -> dict[str, Any] | None:
    """The module whose output is the first in `run()`, a forward pass of `method`, that is not finite.

    Of modules within each other it is the innermost: that one ends first.
    """
    found: dict[str, Any] = {}

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if found:
            return
        for tensor in tensors_in(output):
            count = not_finite(tensor)
            if count:
                given = [t.abs().max().item() for t in tensors_in(inputs) if t.is_floating_point() and t.numel()]
                found.update(
                    layer=name or type(module).__name__,
                    kind=type(module).__name__,
                    count=count,
                    of=tensor.numel(),
                    largest_input=max(given, default=0.0),
                )
                return

    with _hooks(method, look):
        output = run()
    if not found and not_finite(output["loss"]):
        found.update(layer="the loss", kind=type(method).__name__, count=1, of=1)
    return {"where": "forward", **found} if found else None


def find_in_backward(
    method: nn.Module, run: Callable[[], dict[str, Tensor]], whole: bool = True
) -> dict[str, Any] | None:
    """Where the gradient of `run()["loss"]` is the first time not finite, on its way back from the loss.

    layer: the innermost module that gets finite gradients and passes on others; where there is none, as in a loss that
    is no module, the last whose output gets such. parameters: those whose own gradients are not finite, where they are
    `whole`. Gradients are computed aside: nothing is accumulated, and only under ZeRO 3 does a rank wait for another.
    """
    calls: list[_Call] = []

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        given, made = ([t for t in tensors_in(part) if t.requires_grad] for part in (inputs, output))
        calls.append(_Call(name, type(module).__name__, given, made))

    with _hooks(method, keep):
        loss = run()["loss"]
    tensors = {id(tensor): tensor for call in calls for tensor in (*call.inputs, *call.outputs)}
    trained = [(name, parameter) for name, parameter in method.named_parameters() if parameter.requires_grad and whole]
    wanted = [*tensors.values(), *(parameter for _, parameter in trained)]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    bad = {key: not_finite(grad) for key, grad in zip(tensors, gradients, strict=False) if grad is not None}
    at_parameters = zip(trained, gradients[len(tensors) :], strict=True)
    parameters = _named([(name, grad) for (name, _), grad in at_parameters if grad is not None], "gradient")

    lost: _Call | None = None
    for call in reversed(calls):  # a module's parts end before it
        loses = _count(call.inputs, bad) and not _count(call.outputs, bad)
        if loses and (lost is None or call.name.startswith(f"{lost.name}." if lost.name else "")):
            lost = call
    behind = next((call for call in reversed(calls) if _count(call.outputs, bad)), None)
    if lost is not None:
        return {**(parameters or {}), "where": "gradient", **lost.described(_count(lost.inputs, bad), lost.inputs)}
    if behind is not None:
        counted = behind.described(_count(behind.outputs, bad), behind.outputs)
        return {**(parameters or {}), "where": "behind", **counted}
    return parameters


@dataclass(frozen=True)
class _Call:
    """A module's forward pass: the tensors with gradients that went in and came out."""

    name: str
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor]

    def described(self, count: int, tensors: list[Tensor]) -> dict[str, Any]:
        total = sum(tensor.numel() for tensor in tensors)
        return {"layer": self.name or self.kind, "kind": self.kind, "count": count, "of": total}


def _count(tensors: list[Tensor], bad: dict[int, int]) -> int:
    return sum(bad.get(id(tensor), 0) for tensor in tensors)


def in_words(found: dict[str, Any]) -> str:
    """Of a finding, what a person reads."""
    if "layer" not in found:
        what = "weights" if found["where"] == "weights" else "gradients"
        more = found["num_parameters"] - len(found["parameters"])
        return f"{what} of {', '.join(found['parameters'])}{f' and {more} more' if more else ''} are not finite"
    share = f"{found['count']} of {found['of']} values"
    if found["where"] == "forward":
        return f"the first output that is not finite is that of {found['layer']} ({found['kind']}; {share})"
    where = "in" if found["where"] == "gradient" else "behind"
    return f"every output is finite; the gradient is lost {where} {found['layer']} ({found['kind']}; {share})"


def samples_of(batch: Batch, key_of: Callable[[int, int], Sequence[str]]) -> list[dict[str, Any]]:
    """The samples of a micro-batch; `key_of(data set, sample)` gives key and shard."""
    rows = []
    for dataset, sample in batch["ids"].tolist():
        key, shard = key_of(dataset, sample)
        rows.append({"data_set": dataset, "sample": sample, "key": key, "shard": shard})
    return rows


def not_finite(tensor: Tensor) -> int:
    """How many of its values are not finite."""
    return int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of what a module takes or gives: tensors, tuples, lists and dictionaries of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


@contextmanager
def _hooks(method: nn.Module, look: Callable[[str, nn.Module, Any, Any], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: look(name, module, inputs, output)  # gives None: output stays
        )
        for name, module in method.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(tensors: Sequence[tuple[str, Tensor]], where: str) -> dict[str, Any] | None:
    names = [name for name, tensor in tensors if not_finite(tensor)]
    if not names:
        return None
    return {"where": where, "parameters": names[:MOST_NAMES], "num_parameters": len(names)}
