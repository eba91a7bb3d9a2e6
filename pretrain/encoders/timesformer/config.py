"""TimeSformer's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import VitShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout


@section
class TimesformerConfig(VitShape):
    """TimeSformer (Bertasius et al. 2021): a vision transformer over the frames of a stack."""

    family: Literal["timesformer"] = "timesformer"
    decisive = ("dim", "depth", "heads", "attention")
    frames: PositiveInt = 8  # of a stack; positions in time are learned for so many
    attention: Literal["divided", "joint", "space_only"] = "divided"
    """`divided`: over time at each place, then over each frame. `joint`: over all places of all frames. `space_only`:
    over each frame, whose tokens are averaged at the end."""
    mlp_ratio: PositiveInt = 4  # hidden width of the MLPs by the encoder's
    pool: Literal["class", "mean"] = "class"  # what stands for the stack: class token, or mean of the patch tokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.frames > 4096:
            raise ValueError(f"frames is {self.frames}; at most 4096 are taken as one stack")
        return self


_SMALL = {"dim": 24, "depth": 2, "heads": 2, "patch": 16, "frames": 1}

SPEC = EncoderSpec(
    name="timesformer",
    title="TimeSformer",
    description="a vision transformer over stacks of frames (Bertasius et al. 2021)",
    config=TimesformerConfig,
    build="pretrain.encoders.timesformer.encoder:TimesformerEncoder",
    drop_layout="any",
    headline=lambda config: "class",
    layouts={"timesformer": Layout("pretrain.encoders.timesformer.layouts:read_timesformer")},
    examples=(
        Example(small=_SMALL),
        Example({"attention": "joint"}, _SMALL),
    ),
)
