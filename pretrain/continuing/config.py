"""What becomes of the weights that `init_from` has brought (imports neither torch nor NumPy)."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section


@section
class LoraConfig:
    """Low-rank changes of linear layers in the encoder's attention and MLP (Hu et al. 2022), itself frozen."""

    rank: PositiveInt = 8  # of each change, a product of two matrices so narrow
    alpha: PositiveFloat = 16.0  # what is added is multiplied by alpha / rank
    layers: tuple[str, ...] = ("qkv", "q", "kv", "proj")
    """The names of the linear layers, of those that there are; of the MLP such as fc1, fc2."""


@section
class ContinuingConfig:
    """Released weights, or those of another run, trained on without ruining them."""

    heads: bool = True  # take heads, predictors, decoders along, of a run or checkpoint of the same method
    optimizer: bool = False  # and AdamW's moments, of a run or checkpoint with the same parameters
    heads_first_steps: NonNegativeInt = 0  # optimizer steps in which all but the encoder learns, for heads that are new
    ramp_steps: NonNegativeInt = 0  # steps after these, in which the encoder's rate rises from zero to its own
    train_blocks: PositiveInt | None = None  # only so many of the last blocks are trained; null: all
    lora: LoraConfig | None = None  # train low-rank changes in place of the encoder's weights
    feature_weight: NonNegativeFloat = 0.0  # of the distance of an image's feature from what the start says of it
    gram_weight: NonNegativeFloat = 0.0  # of that of its patches' similarities (Simeoni et al. 2025, section 4)
    measure_every_epochs: PositiveFloat | None = 1.0  # drift from the start, and whether it got worse; null: never
    measure_images: PositiveInt = 256  # of which the drift is taken: held-out ones where there are any

    @model_validator(mode="after")
    def _check(self) -> ContinuingConfig:
        if self.lora is not None and self.train_blocks is not None:
            raise ValueError("lora freezes the encoder and train_blocks trains a part of it: set one of them to null")
        if self.optimizer and not self.heads:
            raise ValueError("optimizer takes the moments of heads too: set heads=true along, or optimizer=false")
        if self.optimizer and (self.lora is not None or self.heads_first_steps):
            raise ValueError(
                "optimizer goes on with moments of the encoder's weights, which lora and heads_first_steps leave "
                "alone: set optimizer=false"
            )
        return self
