"""The section of a text tower (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from data_pipelines.transforms.config import section


@section
class TextConfig:
    """A transformer over the tokens of a caption (Radford et al. 2021)."""

    dim: PositiveInt = 512  # width
    depth: PositiveInt = 12  # blocks
    heads: PositiveInt = 8  # attention heads
    context: Annotated[int, Field(ge=3)] = 77  # tokens of a caption, with its start and end; what is longer is cut off
    causal: bool = True  # a token sees those before it
    pool: Literal["end", "first", "last"] = "end"  # the token that stands for the caption
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # quick_gelu: x sigmoid(1.702 x), of OpenAI's weights
    vocabulary: Literal["trained", "clip"] = "trained"
    """`trained`: byte pairs found in the run's own captions. `clip`: OpenAI's 49,408, which the package open_clip_torch
    brings."""
    vocab_size: Annotated[int, Field(ge=300)] = 8192  # trained: at most so many

    @model_validator(mode="after")
    def _check(self) -> TextConfig:
        if self.dim % self.heads:
            raise ValueError(f"text dim is {self.dim}; it must be a multiple of heads ({self.heads})")
        if self.causal and self.pool == "first":
            raise ValueError("a causal text tower's first token sees no other: set pool=end, or causal=false")
        return self
