"""From a Config to a DeepSpeed engine, on one CPU process or many GPUs."""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.encoders.divided import whole
from pretrain.engines.adamw import AdamW
from pretrain.engines.blocks import prepare_blocks
from pretrain.engines.expert_parallel import divide_experts
from pretrain.engines.gpus import gpu_of
from pretrain.engines.optim import build_optimizer
from pretrain.engines.precision import allow_fast_products
from pretrain.engines.take_over import take_over
from pretrain.methods.base import Method
from pretrain.quiet import quiet_deepspeed


def choose_device(config: Config) -> torch.device:
    """The device that `engine.device` names; checks that it is there and can do what is asked. Starts nothing."""
    wanted = config.engine.device
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(
            "engine.device is cuda, but torch sees no GPU on this machine "
            f"(torch {torch.__version__}, built for CUDA {torch.version.cuda}); set engine.device=cpu or auto"
        )
    if not available or wanted == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", gpu_of(int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()))


def import_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for a device, without what it would compile for it."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    import deepspeed.ops

    quiet_deepspeed()
    # On the CPU, DeepSpeed would compile a shared-memory transport at start (24 s, and fails without a compiler).
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False


def initialise_distributed(device: torch.device) -> tuple[int, int]:
    """Join the process group (gloo on CPU, nccl on GPU) that RANK, WORLD_SIZE and so on describe; (rank, world size).

    Without those variables this process is a group of its own.
    """
    import_deepspeed(device)
    import deepspeed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    store = None
    if "MASTER_PORT" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # a port that is free now and stays ours
        os.environ["MASTER_PORT"] = str(store.port)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=datetime.timedelta(minutes=30),
            device_id=device if device.type == "cuda" else None,
        )
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return dist.get_rank(), dist.get_world_size()


def deepspeed_config(config: Config, world_size: int, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed dictionary: ours, with `engine.deepspeed` merged in; sizes of buckets are those of the latter.

    ZeRO's buckets are no larger than the model, but for an even number of elements, which DeepSpeed asks for: it fills
    its default of 5e8 elements (2 GB) every step.
    """
    engine = config.engine
    bucket = min(500_000_000, max(num_parameters + num_parameters % 2, 2))
    sizes: dict[str, Any] = {"reduce_bucket_size": bucket} if engine.zero_stage else {}
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 1:
        zero |= {"overlap_comm": False, "contiguous_gradients": False}  # gradients come from `GradientReduction`
    if 0 < engine.zero_stage < 3:
        sizes |= {"allgather_bucket_size": bucket}
    if engine.zero_stage == 3:
        zero |= {"sub_group_size": 10**15}  # one flat tensor, whatever the size
        # what stays gathered is gathered one by one after each step; all else together, before it is needed
        sizes |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket}
    ours: dict[str, Any] = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.train.batch_size // (world_size * config.train.grad_accum_steps),
        "gradient_accumulation_steps": config.train.grad_accum_steps,
        "gradient_clipping": 0.0,  # the optimizer clips; DeepSpeed's own default is 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
    }
    if engine.precision != "fp32":
        # torch_autocast, not the bf16 and fp16 sections: those cast the parameters, the teacher and its average too.
        # No module's gradients are reduced in bf16
        ours["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merge(_merge({"zero_optimization": sizes}, engine.deepspeed), ours)


def _merge(given: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    merged = dict(given)
    for key, value in ours.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def build_engine(config: Config, method: Method, device: torch.device, world_size: int) -> Any:
    """Wrap a Method in a DeepSpeed engine with its optimizer. The process group must exist."""
    import deepspeed

    allow_fast_products(device)
    prepare_blocks(method.blocks(), config.engine)
    method.to(device)
    optimizer = build_optimizer(method, config.optim, config.continuing)
    optimizer.merge()
    with _local_rank(device):
        engine, *_ = deepspeed.initialize(
            model=method,
            optimizer=optimizer,
            config=deepspeed_config(config, world_size, sum(p.numel() for p in method.parameters())),
            dist_init_required=False,
        )
    if config.engine.expert_parallel:
        divide_experts(method)  # not before: DeepSpeed brings the first rank's weights to all
    take_over(engine, optimizer)
    return engine


def optimizer_of(engine: Any) -> AdamW:
    """The optimizer that `build_engine` has given the engine."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


@contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes LOCAL_RANK for the number of its GPU, which it is not for a task that sees a single one."""
    before = os.environ.get("LOCAL_RANK")
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    yield
    if before is not None:
        os.environ["LOCAL_RANK"] = before


def whole_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's state dict on the CPU, of parameters that ZeRO 3 partitions, or of which ranks have parts. Collective:
    all ranks call it."""
    import deepspeed

    kept = module.state_dict().keys()
    state = {name: value.detach().cpu() for name, value in module.named_buffers() if name in kept}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = whole(parameter).detach().cpu().clone()
    return state
