"""NaViT's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import VitShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout

_Rate = Annotated[float, Field(ge=0, lt=1)]


@section
class NavitConfig(VitShape):
    """NaViT (Dehghani et al. 2023): a vision transformer of images at their own shape, many in one sequence."""

    family: Literal["navit"] = "navit"
    decisive = ("dim", "depth", "heads", "positions")
    positions: Literal["absolute", "fractional"] = "absolute"  # row and column by number, or by their share of the side
    pool: Literal["mean", "attention"] = "mean"  # what stands for the image: mean of its tokens, or a query's attention
    mlp_ratio: PositiveFloat = 4.0  # hidden width of the MLPs over dim
    token_drop: _Rate = 0.0  # share of an image's tokens left out in training, where no mask is drawn
    token_drop_sizes: tuple[
        tuple[PositiveInt, _Rate], ...
    ] = ()  # the share by tokens of the image: [[64, 0], [256, .5]]

    def drop_rate(self, tokens: int) -> float:
        """The share of its tokens that an image of so many loses in training: linear between those given."""
        known = self.token_drop_sizes
        if not known:
            return self.token_drop
        if tokens <= known[0][0]:
            return known[0][1]
        for (low, first), (high, last) in pairwise(known):
            if tokens <= high:
                return first + (last - first) * (tokens - low) / (high - low)
        return known[-1][1]

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = [tokens for tokens, _ in self.token_drop_sizes]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"token_drop_sizes names images of {sizes} tokens; name each once, the smallest first")
        if sizes and self.token_drop:
            raise ValueError("token_drop and token_drop_sizes both say how many tokens are left out; set one of them")
        return self


SPEC = EncoderSpec(
    name="navit",
    title="NaViT",
    description="NaViT (Dehghani et al. 2023): images at their own shape, packed one behind the other",
    config=NavitConfig,
    build="pretrain.encoders.navit.encoder:NavitEncoder",
    drop_layout="any",
    headline=lambda config: None if config.pool == "attention" else "mean",
    native=lambda config: True,
    why_not_naflex="norms no patches before they are embedded, nor queries and keys by a gain of each head, as NaViT",
    layouts={"navit": Layout("pretrain.encoders.navit.layouts:read_navit")},
    examples=(Example(small={"dim": 32, "depth": 2, "heads": 2, "patch": 16}),),
)
