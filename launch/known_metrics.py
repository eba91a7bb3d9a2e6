"""The metrics of a run in words and groups, for the report and for wandb's workspace."""

from __future__ import annotations

from typing import Final

from pretrain.encoders.registry import FAMILIES
from pretrain.encoders.spec import EncoderSpec
from pretrain.methods.registry import METHODS
from pretrain.methods.spec import Group, MethodSpec, Metric

#: By metric, that which is its standard error; and numbers for the run itself, or for another's error bars.
ERRORS = {"knn_top1": "knn_standard_error", "few_shot_5": "few_shot_5_standard_error"}
HIDDEN = {"step", "epoch", "ids_digest", "teacher_sum", *ERRORS.values()}


LOSS: Final = "Loss"
DIAGNOSTICS: Final = "Diagnostics"
SCHEDULES: Final = "Schedules"
SPEED: Final = "Speed and memory"
_SHARED = {
    "loss": Metric("loss", LOSS),
    "grad_norm": Metric("gradient norm", DIAGNOSTICS),
    "feature_std": Metric("feature deviation (1 is spread evenly)", DIAGNOSTICS),
    "knn_top1": Metric("online k-NN, top-1", DIAGNOSTICS, percent=True),
    "few_shot_5": Metric("online nearest mean of 5 images a class, top-1", DIAGNOSTICS, percent=True),
    "held_out_rankme": Metric("RankMe of held-out images", DIAGNOSTICS),
    "held_out_alpha_req": Metric("alpha-ReQ of held-out images (near 1 is best)", DIAGNOSTICS),
    "held_out_uniformity": Metric("uniformity of held-out images (lower is more even)", DIAGNOSTICS),
    "drift_weights": Metric("drift from the start: relative distance of weights", DIAGNOSTICS, percent=True),
    "drift_cka": Metric("likeness to the start's features: linear CKA (1 is none lost)", DIAGNOSTICS),
    "drift_patches": Metric("drift from the start: patches' similarities", DIAGNOSTICS),
    "slice_rankme": Metric("RankMe of the images that drift is measured on", DIAGNOSTICS),
    "slice_patch_rank": Metric("effective rank of their patches", DIAGNOSTICS),
    "start_features": Metric("loss: distance of features from the start's", LOSS),
    "start_gram": Metric("loss: patches' similarities against the start's", LOSS),
    "rankme": Metric("RankMe (effective rank)", DIAGNOSTICS),
    "rankme_share": Metric("RankMe, share of the possible", DIAGNOSTICS, percent=True),
    "lr": Metric("learning rate", SCHEDULES),
    "weight_decay": Metric("weight decay", SCHEDULES),
    "images_per_second": Metric("images per second", SPEED),
    "tokens_per_second": Metric("tokens per second, given to the encoder's first block", SPEED),
    "teraflops": Metric("the model's TFLOP/s, of all ranks", SPEED),
    "mfu": Metric("MFU, the model's FLOP/s of the devices' peak", SPEED, percent=True),
    "data_share": Metric("of a step: fetching data (rank 0)", SPEED, percent=True),
    "forward_share": Metric("of a step: forward (rank 0)", SPEED, percent=True),
    "backward_share": Metric("of a step: backward (rank 0)", SPEED, percent=True),
    "optimizer_share": Metric("of a step: optimizer (rank 0)", SPEED, percent=True),
    "average_share": Metric("of a step: slow averages (rank 0)", SPEED, percent=True),
    "waiting_share": Metric("of a step: waiting for the ranks (rank 0)", SPEED, percent=True),
    "data_wait": Metric("waiting for data", SPEED, percent=True),
    "memory_gb": Metric("memory (GB, peak of rank 0)", SPEED),
    "knn_share": Metric("time spent on online measures", SPEED, percent=True),
    "knn_seconds": Metric("seconds of the online measures", SPEED),
    "bad_samples": Metric("bad samples met", SPEED),
}
_SPECS: tuple[MethodSpec | EncoderSpec, ...] = (*METHODS.values(), *FAMILIES.values())
KNOWN = {"loss": _SHARED["loss"]} | {n: m for spec in _SPECS for n, m in spec.metrics.items()} | _SHARED
GROUPS = (LOSS, DIAGNOSTICS, SCHEDULES, SPEED)
#: Parts of names that tell where a metric belongs that has no words of its own here.
_HINTS: tuple[tuple[Group, tuple[str, ...]], ...] = (
    (DIAGNOSTICS, ("spikes", "alarm")),
    (LOSS, ("loss",)),
    (SPEED, ("second", "memory", "fetch", "cache", "wait", "bytes", "throughput", "share_of_time")),
    (SCHEDULES, ("schedule", "learning_rate")),
)


def known_as(name: str) -> Metric:
    """What is known of a metric, or can be told from its name."""
    if name in KNOWN:
        return KNOWN[name]
    group: Group = next((group for group, parts in _HINTS if any(part in name for part in parts)), DIAGNOSTICS)
    words = name.replace("/", ": ").replace("_", " ")
    return Metric(words, group, percent=name.endswith(("_share", "top1", "accuracy")))
