"""T2T-ViT's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example, Layout

# dim, depth, heads, hidden width of the MLPs over dim
T2T_SIZES = {
    7: (256, 7, 4, 2.0),
    10: (256, 10, 4, 2.0),
    12: (256, 12, 4, 2.0),
    14: (384, 14, 6, 3.0),
    19: (448, 19, 7, 3.0),
    24: (512, 24, 8, 3.0),
}


@section
class T2tConfig(EncoderSettings):
    """T2T-ViT (Yuan et al. 2021); `size` names dim, depth, heads and mlp_ratio.

    Windows of pixels become tokens in three steps, of which neighbours overlap, with attention between the steps.
    """

    family: Literal["t2t"] = "t2t"
    decisive = ("dim", "depth", "heads", "tokens", "token_dim", "mlp_ratio")
    size: Literal[7, 10, 12, 14, 19, 24] = 14  # blocks as published; names those that are null below
    dim: PositiveInt | None = None  # width of the blocks
    depth: PositiveInt | None = None  # blocks
    heads: PositiveInt | None = None  # of attention
    mlp_ratio: PositiveFloat | None = None  # hidden width of the blocks' MLPs over dim
    tokens: Literal["performer", "transformer"] = "performer"  # attention between the steps: linear in pixels, or full
    token_dim: PositiveInt = 64  # width between the steps
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # in the performers; the authors': .1. Drawn by rank
    pool: Literal["class", "mean"] = "class"  # what stands for the image: class token, or mean of the patch tokens
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, of the last block
    patch = 16
    stride = 16

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, number of blocks, number of attention heads."""
        dim, depth, heads, _ = T2T_SIZES[self.size]
        return self.dim or dim, self.depth or depth, self.heads or heads

    @property
    def hidden(self) -> int:
        """Hidden width of the blocks' MLPs."""
        return round(self.shape[0] * (self.mlp_ratio or T2T_SIZES[self.size][3]))

    @model_validator(mode="after")
    def _check(self) -> Self:
        dim, _, heads = self.shape
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        if dim % 2 or self.token_dim % 2:
            raise ValueError(
                f"dim {dim} and token_dim {self.token_dim} must be even: half sines, half as many features"
            )
        if self.token_dropout and self.tokens != "performer":
            raise ValueError("token_dropout is the performers'; set tokens=performer or token_dropout=0")
        return self


_SMALL = {"dim": 32, "depth": 2, "heads": 2, "token_dim": 8}

SPEC = EncoderSpec(
    name="t2t",
    title="T2T-ViT",
    description="T2T-ViT (Yuan et al. 2021), whose tokens overlap and come about in three steps",
    config=T2tConfig,
    build="pretrain.encoders.t2t.encoder:T2tEncoder",
    drop_layout="any",
    headline=lambda config: "class",
    has_sequence=lambda config: True,
    layouts={"t2t": Layout("pretrain.encoders.t2t.layouts:read_t2t")},
    examples=(
        Example(small=_SMALL),
        Example({"tokens": "transformer"}, _SMALL),
    ),
)
