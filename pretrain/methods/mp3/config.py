"""MP3's section, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from data_pipelines.transforms.config import section
from pretrain.methods.spec import MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


@section
class Mp3Config:
    """Masked patch position prediction (Zhai et al. 2022): tokens are told no position, and asked for it."""

    name: Literal["mp3"] = "mp3"
    unseen_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.75  # share of tokens that no token attends to
    placeless_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of tokens whose position is left out, and asked for; the others have theirs. 1, as published: all."""
    keys: Literal["updated", "embedded"] = "updated"
    """What is attended to: the seen tokens as the blocks before left them, or, in every block, as they were embedded
    (lucidrains' reading)."""


def counts(section: Mp3Config, tokens: int) -> tuple[int, int]:
    """Of so many tokens of an image, how many are unseen (rounded down) and how many without position (up)."""
    unseen, placeless = (round(tokens * share, 6) for share in (section.unseen_ratio, section.placeless_ratio))
    return math.floor(unseen), math.ceil(placeless)


def _check(config: Config, tokens: Tokens | None) -> None:
    if tokens is None or tokens.stride is None:
        return
    height, width = config.views.global_size
    if (height // tokens.stride) * (width // tokens.stride) < 2:
        raise ValueError(
            f"an image of {height}x{width} px has one token of {tokens.stride} px, so that there is one position only; "
            "take a smaller encoder.patch or larger views.global_crops"
        )


def _draw(section: Mp3Config, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields | None:
    from pretrain.stream.masking import mask_stream, random_units

    if stride is None:
        return None
    grid = (image_size[0] // stride, image_size[1] // stride)
    unseen, placeless = counts(section, grid[0] * grid[1])

    def both(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        stream = mask_stream(seed, step, row)
        return {
            "unseen_mask": random_units(stream, grid, unseen),
            "placeless_mask": random_units(stream, grid, placeless),
        }

    return both


SPEC = MethodSpec(
    name="mp3",
    title="MP3",
    config=Mp3Config,
    build="pretrain.methods.mp3.method:build",
    example={},
    needs=lambda section: Needs(placeless="`selfsight encoders` shows which go with MP3"),
    check=_check,
    draw=_draw,
    alarms="pretrain.methods.mp3.alarms:alarms",
    metrics={"position_accuracy": Metric("positions found", "Diagnostics", percent=True)},
    shown="unseen_ratio",
)
