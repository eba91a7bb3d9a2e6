"""Trouble named while it happens: values that are not finite, and the ways DINO collapses."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pretrain.schema import Config, DinoConfig, DvaeConfig, VqkdConfig


class NonFiniteError(ValueError):
    """The loss or the gradient is not a finite number; training on would destroy the weights."""


def check_finite(loss_by_rank: list[float], grad_norm: float | None, step: int, last_checkpoint: str | None) -> None:
    """Raise NonFiniteError on every rank alike, naming the step, the rank and the checkpoint to go back to.

    A gradient norm that is not finite counts too: DeepSpeed would skip such steps in silence.
    """
    bad = [rank for rank, loss in enumerate(loss_by_rank) if not math.isfinite(loss)]
    if not bad and (grad_norm is None or math.isfinite(grad_norm)):
        return
    if bad:
        what = f"loss became {loss_by_rank[bad[0]]} on rank {bad[0]} in step {step}"
    else:
        what = f"the gradient norm became {grad_norm} in step {step} (every rank's loss is finite)"
    where = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "there is no checkpoint yet"
    raise NonFiniteError(
        f"{what}; {where}. The same command would meet the same batches with the same weights: start a run of its own "
        "(name=...) with a lower optim.lr, with optim.clip_grad, or with engine.precision=fp32"
    )


def alarms(config: Config, metrics: Mapping[str, float], epoch: float) -> list[str]:
    """What looks wrong in a step's metrics. Early steps are spared: every DINO run starts at ln K."""
    if isinstance(config.method, DvaeConfig | VqkdConfig):
        return _codebook_alarms(config.method, metrics, epoch)
    if not isinstance(config.method, DinoConfig) or epoch < max(1.0, config.method.freeze_last_layer_epochs):
        return []
    found = []
    uniform = math.log(int(config.method.prototypes))
    loss = metrics.get("dino", metrics["loss"])  # without DINOv2's further terms
    if loss > 0.99 * uniform and metrics["teacher_entropy"] > 0.99 * uniform:
        found.append(
            f"loss {loss:.2f} stands at ln K = {uniform:.2f}: the teacher says the same of every image "
            "(collapse to uniform). Lower method.teacher_temperature or optim.lr"
        )
    if metrics["teacher_entropy"] < 0.01 * uniform and loss < 0.01 * uniform:
        found.append(
            f"teacher entropy is {metrics['teacher_entropy']:.3f}: it gives every image the same prototype "
            "(collapse to one). Raise method.teacher_temperature or lower method.center_momentum"
        )
    if metrics["feature_std"] < 0.05:
        found.append(f"feature_std is {metrics['feature_std']:.3f} (1 is spread evenly): the features point one way")
    return found


def _codebook_alarms(method: DvaeConfig | VqkdConfig, metrics: Mapping[str, float], epoch: float) -> list[str]:
    used = metrics.get("codes_used", 1.0)
    if epoch < 1 or used >= 0.05:
        return []
    advice = (
        "Lower method.divergence_weight or method.vocabulary, or set method.start=spread"
        if isinstance(method, DvaeConfig)
        else "Raise method.restart_below, or lower method.codes or optim.lr"
    )
    perplexity = metrics["code_perplexity"]
    return [f"only {used:.1%} of the codes were used in the last step (perplexity {perplexity:.1f}). {advice}"]
