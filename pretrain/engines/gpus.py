"""Which GPU a rank takes (imports no torch)."""

from __future__ import annotations

from pretrain.config.load import ConfigError


def gpu_of(local_rank: int, visible: int) -> int:
    """Which of the visible GPUs a rank takes: its own where it sees all of its node, the only one where it is bound to
    one (`--gpus-per-task`, or a wrapper that sets CUDA_VISIBLE_DEVICES).

    Raises ConfigError where this machine runs more ranks than that.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise ConfigError(
            f"this machine has {visible} GPUs and more ranks than that (this is number {local_rank}, counted from 0); "
            f"start one a GPU: --ntasks-per-node={visible} --gpus-per-node={visible}, or --nproc {visible}"
        )
    return local_rank
