"""From what a checkpoint nests and wraps around its weights to one dictionary of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

#: Under which names checkpoints hold their weights, from the outside in; an average's before the raw ones'.
INNER = ("model", "model_state", "state_dict_ema", "state_dict", "teacher", "student", "model_ema", "module")
#: I-JEPA's checkpoints have a state dict for each of these, all of which count.
JOINED = ("encoder", "predictor", "target_encoder")
#: What torch.compile, data parallelism, FSDP and recomputation wrap around modules.
WRAPPERS = r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.(?=.)"


def unwrapped(checkpoint: Any, which: str) -> tuple[State, dict[str, str]]:
    """The tensors of a checkpoint by the names they had before anything was wrapped around their modules.

    which: teacher or student, where it holds both. Also returns what was not taken, each key with the reason. Raises
    ValueError where there are no tensors, or some that are not dense or claim more numbers than they have.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"the checkpoint is a {type(checkpoint).__name__}; a dictionary of tensors is needed")
    left: dict[str, str] = {}
    inner = _innermost(checkpoint, which, left)
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    left |= {f"[{key}]": "no tensor" for key in inner if key not in tensors}
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors; its keys are {', '.join(map(str, list(inner)[:8]))}")
    for key, value in tensors.items():
        if not isinstance(key, str):
            raise ValueError(f"the checkpoint's key {key!r} is a {type(key).__name__}; tensors have names")
        # a view may claim more numbers than it has, which a copy would then take in memory
        whole = value.layout == torch.strided and value.device.type == "cpu"
        if not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"the checkpoint's {key} is not a dense tensor with all of its numbers")
    named: State = {}
    for key, value in tensors.items():
        plain = re.sub(WRAPPERS, "", key)
        if plain in named:
            raise ValueError(f"the checkpoint holds {plain} twice, with and without a wrapper's name ({key})")
        named[plain] = value
    return named, left


def _innermost(checkpoint: Mapping[str, Any], which: str, left: dict[str, str]) -> Mapping[str, Any]:
    for name in INNER:
        if name in {"teacher": ("student",), "student": ("teacher", "state_dict_ema")}[which]:
            continue
        inner = checkpoint.get(name)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            left |= {f"[{key}]": "beside the weights" for key in checkpoint if key != name}
            return _innermost(inner, which, left)
    if all(isinstance(checkpoint.get(part), Mapping) for part in JOINED):
        parts = {f"{part}.{key}": value for part in JOINED for key, value in checkpoint[part].items()}
        return {**{key: value for key, value in checkpoint.items() if key not in JOINED}, **parts}
    return checkpoint
