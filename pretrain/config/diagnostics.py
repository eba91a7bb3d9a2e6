"""What a run watches about itself while it trains (imports no torch)."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from data_pipelines.transforms.config import section

#: Every alarm by its stable name, as it stands in the log, in metrics as `alarm/NAME` and in the run's history.
AlarmName = Literal[
    "non_finite",  # a loss or a gradient that is no number; always stops the run
    "loss_at_ln_k",  # the loss stands where guessing would put it: ln of the prototypes, or of the codes
    "ibot_at_ln_k",  # the same of DINO's loss on patch tokens
    "loss_at_mean",  # a reconstruction loss of 1: the mean of each standardised patch is predicted
    "loss_at_zero",  # there is nothing to predict
    "loss_stalled",  # no new lowest loss for long
    "loss_spikes",
    "gradient_spikes",
    "teacher_uniform",  # DINO: the teacher says the same of every image
    "teacher_one_prototype",  # DINO: it gives every image the same prototype
    "teacher_still",  # DINO, dVAE: the slow average does not move
    "teacher_is_student",  # or is no average, but the network itself
    "features_one_way",  # the features of all images point one way
    "rank_collapsed",  # they fill few dimensions (RankMe)
    "dead_codes",  # a tokenizer uses few of its codes
    "weights_grow",
    "worse_than_start",  # what `init_from` has brought was better, see `continuing`
    "rate_zero",  # nothing is learned at this learning rate
    "data_bound",  # much of the time goes into waiting for data
    "slow",  # the run is much slower than it was
    "bad_samples_rise",  # more samples can't be read than before
]
ALARMS: tuple[str, ...] = get_args(AlarmName)
#: What is measured beside k-NN, of the features that it has read.
OnlineName = Literal["few_shot", "rankme", "alpha_req", "uniformity"]


@section
class DiagnosticsConfig:
    """Collapse and trouble named while they happen; what of it ends a run; k-NN accuracy while it trains."""

    stop_on: tuple[AlarmName, ...] = ()
    """Alarms that end the run with exit code 87, after `patience`, without a checkpoint. `non_finite` always does."""
    patience: PositiveInt = 10  # log lines on which an alarm must stand before it ends the run
    skip_non_finite: NonNegativeInt = 0  # steps in all that are left out for their gradients before the run ends
    inspect_every_steps: NonNegativeInt = 1000  # RankMe, deviation of features, norm of weights; 0 is never
    knn_every_epochs: PositiveFloat | None = 5.0  # k-NN accuracy of the frozen encoder on labelled data; null is never
    knn_data: str | None = None  # labelled shards, or a folder of val-*.tar; default: the val split beside data.train
    knn_bank: PositiveInt = 2000  # samples of it that vote; of 1,000 classes take 20000
    knn_queries: PositiveInt = 1000  # samples of it that are classified
    knn_k: PositiveInt = 20  # neighbours that vote
    online: tuple[OnlineName, ...] = ("few_shot", "rankme", "alpha_req", "uniformity")
    """Measures beside k-NN, whenever it runs, of the same features: with five labelled images a class, and without."""
