"""As `worker.py`, with a layer that fails where each configuration's `fault` says so."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from torch import Tensor, nn
from worker import run

import pretrain.train
from pretrain.engines import reduction
from pretrain.engines.engine import initialise_distributed
from pretrain.engines.reduction import LEAST_BUCKET
from pretrain.methods.base import Method
from pretrain.methods.registry import build_method


def plant(method: Method, fault: dict[str, Any], rank: int) -> Method:
    """Let `fault["layer"]` give inf, or a gradient of NaN, in `fault["steps"]` on `fault["rank"]`; or sleep there."""
    now = {"step": -1}

    def fail(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if now["step"] not in fault["steps"] or rank != fault["rank"]:
            return None
        if fault["kind"] == "forward":
            return output / (output - output)
        return output + (output - output).sqrt()  # 0, whose gradient is NaN

    method.register_forward_pre_hook(lambda module, inputs: now.update(step=inputs[1]))
    method.get_submodule(fault["layer"]).register_forward_hook(fail)
    return method


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    configs = json.loads(Path(sys.argv[1]).read_text())
    rank, world_size = initialise_distributed(torch.device("cpu"))
    for each in configs:
        fault = each.pop("fault", None)
        if "folders" in each:  # of the rank: a path that is not absolute is another one on each
            os.chdir(each.pop("folders")[rank])
        reduction.LEAST_BUCKET = each.pop("least_bucket", LEAST_BUCKET)
        pretrain.train.build_method = (
            build_method if fault is None else lambda *given, f=fault: plant(build_method(*given), f, rank)
        )
        try:
            run(each, rank, world_size)
        except ValueError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
    sys.stdout.flush()
    os._exit(0)
