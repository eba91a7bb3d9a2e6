"""What is measured beside k-NN while a run trains, of the features that it has read: a fraction of a second."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eval import label_free
from eval.probes.few_shot import HEADLINE_SHOTS, FewShotSettings, few_shot_right, prepared, scored_over_draws

SEED = 0  # of the draws: the same images in every run, so that runs compare
_OF_SPECTRUM = {
    "rankme": label_free.rankme,
    "alpha_req": label_free.alpha_req,
    "uniformity": label_free.uniformity,
}


def measured(
    names: Sequence[str], bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor
) -> dict[str, float]:
    """The measures of these names, as metrics: `few_shot_5` and its standard error, of the queries by the nearest mean
    of five of the bank a class; `held_out_rankme` and the like, of the bank.

    bank, queries: (n, d) and (m, d); what is not finite gives nothing, as the next loss says it with the layer.
    """
    if not bank.isfinite().all() or not queries.isfinite().all():
        return {}
    found: dict[str, float] = {}
    if "few_shot" in names:
        settings = FewShotSettings(shots=(HEADLINE_SHOTS,))
        train, val = prepared(bank, queries)
        right = few_shot_right(
            train, bank_labels, val, query_labels, settings=settings, seed=SEED, methods=("mean",)
        )  # fmt: skip
        score = scored_over_draws(dict(right)[HEADLINE_SHOTS]["mean"])
        found[f"few_shot_{HEADLINE_SHOTS}"] = score["top1"]
        found[f"few_shot_{HEADLINE_SHOTS}_standard_error"] = score["standard_error"]
    for name, number in _OF_SPECTRUM.items():
        if name in names and (score_of := number(bank)) is not None:
            found[f"held_out_{name}"] = score_of["value"]
    return found
