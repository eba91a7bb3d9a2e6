"""MAE's section, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.registry import family_of
from pretrain.methods.mask_counts import mask_grid
from pretrain.methods.masks import MaskConfig, check_mask
from pretrain.methods.spec import MethodSpec, Needs, Tokens

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


@section
class MaeConfig:
    """Masked autoencoder (He et al. 2022; on pyramids UM-MAE, Li et al. 2022)."""

    name: Literal["mae"] = "mae"
    mask: MaskConfig = MaskConfig()  # what is hidden
    decoder_dim: PositiveInt = 512  # width
    decoder_depth: PositiveInt = 8  # blocks
    decoder_heads: PositiveInt = 16  # attention heads
    norm_pix_loss: bool = True  # predict each patch standardised
    position_order: Literal["own", "um_mae"] = "own"
    """`um_mae` gives the tokens the positions that UM-MAE's code gives them, which are another token's for most: it
    reads positions in raster order and tokens in the order of their 2x2 quads. For comparison only."""

    @model_validator(mode="after")
    def _check(self) -> MaeConfig:
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"decoder_dim is {self.decoder_dim}; it must be a multiple of 4 "
                f"and of decoder_heads ({self.decoder_heads})"
            )
        if self.mask.kind == "blockwise":
            raise ValueError("MAE drops equally many units from every image; blockwise masks vary: use kind random")
        if self.position_order == "um_mae" and self.mask.kind != "one_in_2x2":
            raise ValueError(f"position_order um_mae belongs to mask kind one_in_2x2, not {self.mask.kind}")
        return self


def _check(config: Config, tokens: Tokens | None) -> None:
    mask, encoder = config.method.mask, config.encoder
    check_mask(mask, config.views.global_size, tokens)
    assert encoder is not None
    if tokens is not None and family_of(encoder).drop_layout == "one_in_2x2" and mask.kind != "one_in_2x2":
        raise ValueError(
            f"MAE on {encoder.family} needs method.mask.kind=one_in_2x2, not {mask.kind}: "
            "the visible units must form a dense map"
        )


def _draw(section: MaeConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields:
    from pretrain.stream.masking import draw_units, mask_stream, with_secondary

    mask, grid = section.mask, mask_grid(section.mask, image_size)
    if not mask.secondary:
        return lambda *place: {"drop_mask": draw_units(mask_stream(*place), mask, grid)}

    def both(seed: int, step: int, row: int) -> dict[str, np.ndarray]:
        dropped, replaced = with_secondary(mask_stream(seed, step, row), mask, grid)
        return {"drop_mask": dropped, "token_mask": replaced}

    return both


def _draw_native(section: MaeConfig, batch_size: int) -> DrawFields:
    """The hidden patches of a row's crop."""
    from pretrain.stream.masking import draw_patches, mask_stream

    return lambda *place: {"drop_mask": [draw_patches(mask_stream(*place[:3]), section.mask, place[3][0].tolist())]}


SPEC = MethodSpec(
    name="mae",
    title="MAE",
    config=MaeConfig,
    build="pretrain.methods.mae.method:build",
    example={"mask": {"unit": 4}, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    needs=lambda section: Needs(drops_units="`selfsight encoders` shows which go with MAE"),
    check=_check,
    stacks=True,
    draw=_draw,
    native=lambda section: section.mask.kind == "random",
    native_with="method.mask.kind=random: the other masks are drawn on the grid of one size of image",
    draw_native=_draw_native,
    alarms="pretrain.methods.mae.alarms:alarms",
    start="pretrain.encoders.base:xavier_initialise",
)
