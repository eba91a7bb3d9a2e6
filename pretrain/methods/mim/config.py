"""The sections of masked image modelling, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.registry import family_of
from pretrain.methods.mask_counts import mask_grid
from pretrain.methods.masks import MaskConfig, check_mask
from pretrain.methods.spec import Crops, MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


@section
class AggregationConfig:
    """BEiT v2's head: the class token of the last block and the patch tokens of an earlier one predict once more."""

    layer: PositiveInt = 9  # whose patch tokens, counted from 1; 21 for L
    depth: PositiveInt = 2  # blocks of the head


@section
class MimConfig:
    """Masked image modelling with a mask token (SimMIM, Xie et al. 2022; BEiT, Bao et al. 2022)."""

    name: Literal["mim"] = "mim"
    mask: MaskConfig = MaskConfig(ratio=0.6, unit=32)  # what is hidden
    target: Literal["pixels", "normalised_pixels", "hog", "codes"] = "pixels"
    """`pixels`: L1 (SimMIM). `normalised_pixels`: squared error of each unit standardised (as MAE's). `hog`: histograms
    of gradients (MaskFeat). `codes`: those that `tokenizer` gives to the target crop (BEiT)."""
    tokenizer: str | None = None  # with target codes: a run of method dvae or vqkd, or its tokenizer/ folder
    aggregation: AggregationConfig | None = None  # BEiT v2's second head

    @model_validator(mode="after")
    def _check(self) -> MimConfig:
        if self.mask.kind == "one_in_2x2":
            raise ValueError(
                "kind one_in_2x2 drops units before the encoder, which is MAE's; MIM takes random or blockwise"
            )
        if (self.target == "codes") != (self.tokenizer is not None):
            raise ValueError(
                f"target is {self.target} and tokenizer is {self.tokenizer!r}; target codes needs the run of a "
                "tokenizer (tokenizer=runs/NAME), the other targets take none"
            )
        if self.target == "hog" and self.mask.unit % 8:
            raise ValueError(f"mask.unit is {self.mask.unit} px; hog has cells of 8 px, so it must be a multiple of 8")
        return self


def _check(config: Config, tokens: Tokens | None) -> None:
    method, encoder = config.method, config.encoder
    check_mask(method.mask, config.views.global_size, tokens)
    if config.data.frames > 1 and method.target == "codes":
        raise ValueError(
            f"data.frames is {config.data.frames}, and method.target=codes predicts what a tokenizer says of one "
            "image; take pixels, normalised_pixels or hog"
        )
    if method.aggregation is None:
        return
    assert encoder is not None
    if method.target != "codes":
        raise ValueError(f"method.aggregation is BEiT v2's head for target codes, not {method.target}")
    if not family_of(encoder).has_sequence(encoder):
        raise ValueError(
            "method.aggregation goes through the class token, so it needs an encoder that carries one beside the patch "
            f"tokens, such as family vit or beit; {encoder.family} has none as it is set"
        )
    depth, layer = encoder.shape[1], method.aggregation.layer
    if layer >= depth:
        raise ValueError(f"method.aggregation.layer is {layer}; it must lie below the last of the {depth} blocks")


def _draw(section: MimConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields:
    from pretrain.stream.masking import draw_units, mask_stream

    mask, grid = section.mask, mask_grid(section.mask, image_size)
    return lambda *place: {"token_mask": draw_units(mask_stream(*place), mask, grid)}


def _draw_native(section: MimConfig, batch_size: int) -> DrawFields:
    """The hidden patches of a row's crop."""
    from pretrain.stream.masking import draw_patches, mask_stream

    return lambda *place: {"token_mask": [draw_patches(mask_stream(*place[:3]), section.mask, place[3][0].tolist())]}


SPEC = MethodSpec(
    name="mim",
    title="masked image modelling",
    config=MimConfig,
    build="pretrain.methods.mim.method:build",
    example={"mask": {"kind": "blockwise", "ratio": 0.5, "unit": 4, "min_block": 4}},
    crops=lambda section: Crops(target="the tokenizer sees it" if section.target == "codes" else None),
    needs=lambda section: Needs(replaces_tokens="`selfsight encoders` shows which encoders do"),
    check=_check,
    stacks=True,
    draw=_draw,
    native=lambda section: section.target != "codes",
    native_with="method.target=pixels, normalised_pixels or hog: the tokenizer of codes sees a crop of one size",
    draw_native=_draw_native,
    sources="pretrain.tokenizers.card:check_codes",
    alarms="pretrain.methods.mim.alarms:alarms",
    metrics={
        "aggregation_loss": Metric("loss of the aggregation"),
        "accuracy": Metric("accuracy at hidden units", percent=True),
    },
    shown="target",
)
