"""The metrics of a run in words and groups, for the report and for wandb's workspace."""

from __future__ import annotations

from typing import NamedTuple

#: Numbers for the run itself, or for another's error bars.
HIDDEN = {"step", "epoch", "ids_digest", "teacher_sum", "knn_standard_error"}


class Known(NamedTuple):
    """What is known of a metric: its words, the group it is in, and whether it is a share shown in percent."""

    title: str
    group: str
    percent: bool = False


LOSS, DIAGNOSTICS, SCHEDULES, SPEED = "Loss", "Diagnostics", "Schedules", "Speed and memory"
KNOWN = {
    "loss": Known("loss", LOSS),
    "dino": Known("DINO loss", LOSS),
    "ibot": Known("iBOT loss", LOSS),
    "koleo": Known("KoLeo loss", LOSS),
    "aggregation_loss": Known("loss of the aggregation", LOSS),
    "likelihood": Known("negative log-likelihood", LOSS),
    "divergence": Known("divergence to uniform", LOSS),
    "distillation": Known("distillation loss", LOSS),
    "commitment": Known("commitment loss", LOSS),
    "accuracy": Known("accuracy at hidden units", LOSS, percent=True),
    "grad_norm": Known("gradient norm", DIAGNOSTICS),
    "teacher_entropy": Known("teacher entropy (nats)", DIAGNOSTICS),
    "feature_std": Known("feature deviation (1 is spread evenly)", DIAGNOSTICS),
    "knn_top1": Known("online k-NN, top-1", DIAGNOSTICS, percent=True),
    "rankme": Known("RankMe (effective rank)", DIAGNOSTICS),
    "rankme_share": Known("RankMe, share of the possible", DIAGNOSTICS, percent=True),
    "codes_used": Known("codes used", DIAGNOSTICS, percent=True),
    "codes_alive": Known("codes alive", DIAGNOSTICS, percent=True),
    "code_perplexity": Known("code perplexity", DIAGNOSTICS),
    "lr": Known("learning rate", SCHEDULES),
    "weight_decay": Known("weight decay", SCHEDULES),
    "momentum": Known("teacher momentum", SCHEDULES),
    "teacher_temperature": Known("teacher temperature", SCHEDULES),
    "temperature": Known("temperature", SCHEDULES),
    "kl_weight": Known("weight of the divergence", SCHEDULES),
    "images_per_second": Known("images per second", SPEED),
    "data_wait": Known("waiting for data", SPEED, percent=True),
    "memory_gb": Known("memory (GB, peak of rank 0)", SPEED),
    "knn_share": Known("time spent on online k-NN", SPEED, percent=True),
    "knn_seconds": Known("seconds of an online k-NN", SPEED),
    "bad_samples": Known("bad samples met", SPEED),
}
GROUPS = (LOSS, DIAGNOSTICS, SCHEDULES, SPEED)
#: Parts of names that tell where a metric belongs that has no words of its own here.
_HINTS = (
    (DIAGNOSTICS, ("spikes", "alarm")),
    (LOSS, ("loss",)),
    (SPEED, ("second", "memory", "fetch", "cache", "wait", "bytes", "throughput", "share_of_time")),
    (SCHEDULES, ("schedule", "learning_rate")),
)


def known_as(name: str) -> Known:
    """What is known of a metric, or can be told from its name."""
    if name in KNOWN:
        return KNOWN[name]
    group = next((group for group, parts in _HINTS if any(part in name for part in parts)), DIAGNOSTICS)
    words = name.replace("/", ": ").replace("_", " ")
    return Known(words, group, percent=name.endswith(("_share", "top1", "accuracy")))
