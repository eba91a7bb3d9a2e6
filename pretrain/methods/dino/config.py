"""DINO's sections, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import Share, section
from pretrain.methods.dino.auto import resolve
from pretrain.methods.spec import Crops, MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


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
    head_hidden_dim: PositiveInt | None = None  # likewise: width of its layers
    head_bottleneck_dim: PositiveInt | None = None  # likewise: width of its last layer's input

    @model_validator(mode="after")
    def _check(self) -> IbotConfig:
        if not 0 < self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError(f"ratio is {self.ratio[0]:g} .. {self.ratio[1]:g}; it must lie between 0 and 1 and rise")
        for name in ("prototypes", "head_hidden_dim", "head_bottleneck_dim"):
            if getattr(self, name) is not None and not self.separate_head:
                raise ValueError(f"ibot.{name} belongs to a head of its own: set ibot.separate_head=true")
        return self


@section
class GramConfig:
    """Patches' similarities held to those of an earlier teacher (Gram anchoring, Simeoni et al. 2025, section 4).

    What that teacher sees: the crops of views.teacher_crops, in DINOv3's recipe twice as large as the global ones and
    without colours; without them the student's own.
    """

    weight: PositiveFloat = 2.0  # of this loss beside DINO's
    start_step: NonNegativeInt = 0  # optimizer steps before it counts
    teacher: str | None = None
    """Whose patches: a run, checkpoint or encoder folder of the same encoder; null: the run's own teacher at
    start_step, which at 0 is what init_from has brought."""
    refresh_every_steps: PositiveInt | None = 10_000  # from start_step on: the run's teacher of then; null: never
    max_refreshes: PositiveInt | None = 3  # so often; null: to the end
    normalise: bool = True  # similarities are cosines; false: products
    negatives: Literal["keep", "clip", "clip_teacher"] = "keep"
    """Similarities below zero: kept, clipped to zero on both sides, or in the teacher alone."""


@section
class DinoConfig:
    """Self-distillation with no labels (Caron et al. 2021), with DINOv2's additions (Oquab et al. 2024) as options.

    `auto` is chosen from the number of training images and printed, see `auto.py` beside this.
    """

    name: Literal["dino"] = "dino"
    prototypes: PositiveInt | Literal["auto"] = 65536  # outputs of the head
    head_hidden_dim: PositiveInt = 2048  # width of its layers
    head_bottleneck_dim: PositiveInt = 256  # width of its last layer's input
    last_layer: Literal["weight_norm", "plain"] = "weight_norm"  # plain: as in DINOv3
    norm_last_layer: bool = True  # fix the prototypes' norm at 1, with last_layer weight_norm
    freeze_last_layer_epochs: NonNegativeFloat = 1.0  # at the start
    student_temperature: PositiveFloat = 0.1  # of its softmax
    teacher_temperature: PositiveFloat | Literal["auto"] = 0.04  # after its warm-up
    warmup_teacher_temperature: PositiveFloat = 0.04  # at the start
    warmup_teacher_temperature_epochs: NonNegativeInt = 0  # until the full one
    teacher_temperature_warmup: Literal["stairs", "linear"] = "stairs"  # one an epoch as in DINO, or each step a bit
    teacher_momentum: Share | Literal["auto"] = 0.996  # at the start
    teacher_momentum_schedule: Literal["cosine", "constant"] = "cosine"  # rises to 1 over the run, or stays
    center_momentum: Share = 0.9  # of the slow average that is subtracted
    centering: Literal["center", "sinkhorn"] = "center"  # sinkhorn: Sinkhorn-Knopp over the micro-batch of all ranks
    sinkhorn_iterations: PositiveInt = 3  # with centering sinkhorn
    local_weight: NonNegativeFloat = 1.0  # of the pairs of local crops in DINO's loss; .5 in DINOv3's last stages
    koleo_weight: NonNegativeFloat = 0.0  # spreads class features; DINOv2: .1
    koleo_neighbours: PositiveInt = 1  # nearest ones that each is drawn away from
    koleo_over: Literal["micro_batch", "batch"] = "micro_batch"
    """Whose features are neighbours: those of a rank's micro-batch, or of all images of the step, on all ranks. Then of
    several micro-batches each is encoded twice, first without gradients."""
    sigreg_weight: NonNegativeFloat = 0.0  # draws those of the micro-batch of all ranks to a normal cloud
    sigreg_slices: PositiveInt = 256  # random directions a step, with sigreg_weight
    ibot: IbotConfig | None = None  # null: the loss on patch tokens is off
    gram: GramConfig | None = None  # null: patches' similarities are free

    @model_validator(mode="after")
    def _check(self) -> DinoConfig:
        if self.last_layer == "plain" and self.norm_last_layer:
            raise ValueError("norm_last_layer fixes the norms of last_layer=weight_norm; with plain set it to false")
        return self


def _needs(section: DinoConfig) -> Needs:
    return Needs(
        replaces_tokens=None if section.ibot is None else "method.ibot masks tokens; set method.ibot=null",
        token_map=None if section.gram is None else "method.gram compares patches of a map; set method.gram=null",
        several_sizes="Use local crops of the global size (views.local_crops.size=[{h}, {w}]), or none "
        "(views.local_crops=null)",
    )


def _check(config: Config, tokens: Tokens | None) -> None:
    ibot, size = config.method.ibot, config.views.global_size
    _check_gram(config, tokens)
    if ibot is None:
        return
    unit = ibot.unit or getattr(config.encoder, "stride", None)
    if unit is None:
        if tokens is not None:
            raise ValueError(f"set method.ibot.unit for this encoder; a token of it is {tokens.stride} px")
        return
    if tokens is not None and unit % tokens.stride:
        raise ValueError(
            f"method.ibot.unit is {unit} px; the teacher's tokens are {tokens.stride} px, so it must be a multiple of "
            "that (null: one token)"
        )
    for side in size:
        if side % unit:
            raise ValueError(f"method.ibot.unit is {unit} px and does not divide the image's side of {side} px")
    for sizes in config.views.mixed_sizes if tokens is not None else ():
        for side, most in zip(sizes.global_crops, size, strict=True):
            if side // tokens.stride % (most // unit):
                raise ValueError(
                    f"method.ibot.unit is {unit} px of {most} px, {most // unit} units, which are no whole tokens of "
                    f"{tokens.stride} px in views.mixed_sizes of {side} px; take a larger unit"
                )
    from pretrain.methods.dino.masks import check_ibot_counts

    check_ibot_counts(ibot, unit, size)


def _check_gram(config: Config, tokens: Tokens | None) -> None:
    gram, teacher = config.method.gram, config.views.teacher_crops
    if gram is None:
        return
    if config.train.steps is not None and gram.start_step >= config.train.steps:
        raise ValueError(
            f"method.gram.start_step is {gram.start_step} and train.steps {config.train.steps:g}, so that it never "
            "counts; set it lower, or method.gram=null"
        )
    if teacher is not None and tokens is not None and any(side % tokens.stride for side in teacher.size):
        raise ValueError(
            f"views.teacher_crops are {teacher.size[0]}x{teacher.size[1]} px and the encoder's tokens {tokens.stride} "
            "px: each side must be a multiple of that"
        )


def _check_batch(config: Config, rows: int) -> None:
    weight, neighbours = config.method.koleo_weight, config.method.koleo_neighbours
    if not weight:
        return
    if config.method.koleo_over == "batch":
        rows = config.train.batch_size
    if rows == 1:
        raise ValueError(
            f"method.koleo_weight is {weight:g}, which spreads the images of a micro-batch, and train.batch_size "
            f"{config.train.batch_size} leaves one in each of every rank and accumulation step; give each two or more, "
            "or set method.koleo_over=batch or method.koleo_weight=0"
        )
    if neighbours >= rows:
        raise ValueError(
            f"method.koleo_neighbours is {neighbours}, and an image has {rows - 1} others beside it; set it lower, or "
            "method.koleo_over=batch"
        )


def _draw_native(section: DinoConfig, batch_size: int) -> DrawFields | None:
    """The hidden patches of a row's global crops."""
    if section.ibot is None:
        return None
    from pretrain.methods.dino.masks import native_ibot_masks

    return native_ibot_masks(section.ibot, batch_size)


def _draw(section: DinoConfig, image_size: tuple[int, int], stride: int | None, batch_size: int) -> DrawFields | None:
    if section.ibot is None:
        return None
    from pretrain.methods.dino.masks import ibot_masks

    return ibot_masks(section.ibot, image_size, stride, batch_size)


SPEC = MethodSpec(
    name="dino",
    title="DINO",
    config=DinoConfig,
    build="pretrain.methods.dino.method:build",
    example={
        "prototypes": 64,
        "head_hidden_dim": 32,
        "head_bottleneck_dim": 16,
        "teacher_momentum": 0.9,
        "freeze_last_layer_epochs": 0.1,
    },
    headline="class",
    crops=lambda section: Crops(num_global=2, local=True, mixed=True, teacher="encoder" if section.gram else None),
    needs=_needs,
    native=lambda section: section.gram is None,
    native_with="method.gram=null: the anchor's similarities are those of crops of one size",
    draw_native=_draw_native,
    check=_check,
    stacks=True,
    check_batch=_check_batch,
    resolve=resolve,
    draw=_draw,
    sources="pretrain.methods.dino.anchor:check_teacher",
    alarms="pretrain.methods.dino.alarms:alarms",
    loss_falls=False,  # its target moves
    metrics={
        "dino": Metric("DINO loss"),
        "ibot": Metric("iBOT loss"),
        "koleo": Metric("KoLeo loss"),
        "gram": Metric("Gram loss (patches' similarities)"),
        "sigreg": Metric("SIGReg (distance from a normal cloud)"),
        "teacher_entropy": Metric("teacher entropy (nats)", "Diagnostics"),
        "momentum": Metric("teacher momentum", "Schedules"),
        "teacher_temperature": Metric("teacher temperature", "Schedules"),
    },
    guessing={"loss": "prototypes", "dino": "prototypes", "teacher_entropy": "prototypes"},
    shown="prototypes",
)
