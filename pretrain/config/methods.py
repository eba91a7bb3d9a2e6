"""The methods a configuration can name, and their masks (imports no torch)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import Share, section


@section
class MaskConfig:
    """Which units of an image are hidden."""

    kind: Literal["random", "blockwise", "one_in_2x2"] = "random"
    """`blockwise`: rectangles (BEiT). `one_in_2x2`: one visible unit in each 2x2 (UM-MAE)."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of hidden units
    unit: PositiveInt = 16  # px
    min_block: PositiveInt = 16  # blockwise: units in the smallest block
    min_aspect: Annotated[float, Field(gt=0, le=1)] = 0.3  # blockwise: aspect is log-uniform in a .. 1/a
    secondary: Annotated[float, Field(ge=0, lt=1)] = 0.0  # one_in_2x2: share of VISIBLE units that become a mask token

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if self.kind == "one_in_2x2" and not math.isclose(self.ratio, 0.75):
            raise ValueError(f"mask ratio is {self.ratio:g}; one visible unit in 2x2 hides exactly 0.75")
        if self.secondary and self.kind != "one_in_2x2":
            raise ValueError(f"secondary masking goes with kind one_in_2x2, not {self.kind}")
        return self


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


@section
class IbotConfig:
    """Masked prediction of the teacher's patch tokens beside DINO's loss (iBOT, Zhou et al. 2022; in DINOv2)."""

    weight: PositiveFloat = 1.0  # of this loss beside DINO's
    masked_share: Annotated[float, Field(gt=0, le=1)] = 0.5  # of the global crops
    ratio: tuple[Share, Share] = (0.1, 0.5)  # hidden share of a masked crop, stratified over the batch
    min_block: PositiveInt = 4  # units in the smallest block
    min_aspect: Annotated[float, Field(gt=0, le=1)] = 0.3  # aspect is log-uniform in a .. 1/a
    unit: PositiveInt | None = None  # px; default: the encoder's stride
    separate_head: bool = False  # of its own, not shared with the class token
    prototypes: PositiveInt | None = None  # of a separate head; default: those of the class head

    @model_validator(mode="after")
    def _check(self) -> IbotConfig:
        if not 0 < self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError(f"ratio is {self.ratio[0]:g} .. {self.ratio[1]:g}; it must lie between 0 and 1 and rise")
        if self.prototypes is not None and not self.separate_head:
            raise ValueError("ibot.prototypes belong to a head of its own: set ibot.separate_head=true")
        return self


@section
class DinoConfig:
    """Self-distillation with no labels (Caron et al. 2021), with DINOv2's additions (Oquab et al. 2024) as options.

    `auto` is chosen from the number of training images and printed, see `pretrain/config/auto_hparams.py`.
    """

    name: Literal["dino"] = "dino"
    prototypes: PositiveInt | Literal["auto"] = 65536  # outputs of the head
    head_hidden_dim: PositiveInt = 2048  # width of its layers
    head_bottleneck_dim: PositiveInt = 256  # width of its last layer's input
    norm_last_layer: bool = True  # fix the prototypes' norm at 1
    freeze_last_layer_epochs: NonNegativeFloat = 1.0  # at the start
    student_temperature: PositiveFloat = 0.1  # of its softmax
    teacher_temperature: PositiveFloat | Literal["auto"] = 0.04  # after its warm-up
    warmup_teacher_temperature: PositiveFloat = 0.04  # at the start
    warmup_teacher_temperature_epochs: NonNegativeInt = 0  # until the full one, linear
    teacher_momentum: Share | Literal["auto"] = 0.996  # rises to 1 over the run on a cosine
    center_momentum: Share = 0.9  # of the slow average that is subtracted
    centering: Literal["center", "sinkhorn"] = "center"  # sinkhorn: Sinkhorn-Knopp over the micro-batch of all ranks
    sinkhorn_iterations: PositiveInt = 3  # with centering sinkhorn
    koleo_weight: NonNegativeFloat = 0.0  # spreads the class features of each rank's micro-batch; DINOv2: .1
    ibot: IbotConfig | None = None  # null: the loss on patch tokens is off


@section
class DvaeConfig:
    """A discrete variational autoencoder (Ramesh et al. 2021, appendix A): the tokenizer of BEiT v1.

    Schedules are shares of the run, the published ones at 3 million updates being 150,000 for the temperature and
    5,000 for the weight of the divergence.
    """

    name: Literal["dvae"] = "dvae"
    vocab_size: PositiveInt = 8192  # codes
    hidden: PositiveInt = 256  # width
    blocks_per_group: PositiveInt = 2  # of encoder and decoder
    groups: Annotated[int, Field(ge=1)] = 4  # resolutions; the code map is the image / 2^(groups - 1)
    temperature: PositiveFloat = 1.0  # of Gumbel-softmax, at the start
    temperature_end: PositiveFloat = 0.0625  # and from temperature_share on
    temperature_share: Share = 0.05  # of the run until temperature_end, on a cosine
    kl_weight: NonNegativeFloat = 6.6  # of the divergence from a uniform use of the codes
    kl_share: Share = 0.0017  # of the run until the full weight, linear
    average_momentum: Share = 0.999  # of the weights that are saved
    start: Literal["published", "spread"] = "published"
    """`spread`: places differ in their codes from the first step. As published they begin nearly alike, and a run of
    some thousand steps ends with a handful of codes in use."""


@section
class VqkdConfig:
    """Vector-quantised knowledge distillation (Peng et al. 2022): the tokenizer of BEiT v2."""

    name: Literal["vqkd"] = "vqkd"
    teacher: str  # a run, a checkpoint or an encoder folder, or timm:NAME
    vocab_size: PositiveInt = 8192  # of the codebook
    code_dim: PositiveInt = 32  # length of a code
    momentum: Share = 0.99  # of the codebook's slow average
    commitment: NonNegativeFloat = 1.0  # weight of the loss that draws tokens to their codes
    decoder_depth: PositiveInt = 3  # blocks
    decoder_dim: PositiveInt | None = None  # default: the encoder's width
    decoder_heads: PositiveInt | None = None  # default: one for 64 of the width, at least 1
    kmeans_iterations: PositiveInt = 10  # that put the codes on the first batch
    restart_below: NonNegativeFloat = 0.0  # of its even share: a code used less is put on a token; 0: none, as theirs


MethodConfig = Annotated[MaeConfig | MimConfig | DinoConfig | DvaeConfig | VqkdConfig, Field(discriminator="name")]
