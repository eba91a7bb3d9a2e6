"""Fine-tuning's section, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import Share, section
from pretrain.continuing.config import LoraConfig
from pretrain.methods.spec import MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    from pretrain.config import Config

#: Of a Beta distribution: beyond it, the draw takes long and nobody publishes.
Alpha = Annotated[float, Field(ge=0, le=2)]


@section
class RandAugmentConfig:
    """Some changes of shape and colour on each image (Cubuk et al. 2020), at timm's strengths."""

    ops: PositiveInt = 2  # drawn for each image, one after the other
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0  # of 10
    magnitude_std: NonNegativeFloat = 0.5  # its deviation from image to image
    prob: Share = 0.5  # of each op that is drawn to be done
    increasing: bool = True  # posterise, solarise and enhance more at a higher magnitude; false: as in the paper's code


#: Why a task goes without what `FinetuneConfig.unfit` names.
_WITHOUT = {
    "segmentation": "learns from masks, which say nothing to",
    "numbers": "learns from numbers, which have no classes and no parts of an image, as have",
}


@section
class FinetuneConfig:
    """An encoder trained on with labels."""

    name: Literal["finetune"] = "finetune"
    task: Literal["one_label", "several_labels", "numbers", "segmentation"] = "one_label"
    """What an image's label is: one class, none to several classes, a number or several of them, or (segmentation) a
    class for each pixel, its .mask.png."""
    label: str | None = None  # a field of each sample's .json; default: its .cls
    val_data: str | None = None  # held-out shards to measure on; default: the val split beside data.train
    val_every_epochs: PositiveFloat = 1.0  # when that is measured, and at the end
    val_resize: PositiveInt | None = None  # short side in px before the centre crop; default: its size * 256 / 224
    pool: Literal["class", "mean"] | None = None
    """What the head reads; default: what stands for the image, encoder.pool."""
    fc_norm: bool = False  # the norm comes after the mean, and anew, instead of before it (MAE, BEiT)
    head_init_std: NonNegativeFloat = 0.02  # of the head's weights
    train_blocks: NonNegativeInt | None = None  # only so many of the last blocks are trained; 0: the head alone
    lora: LoraConfig | None = None  # train low-rank changes in place of the encoder's weights
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of a label that all classes divide
    mixup: Alpha = 0.0  # of the Beta distribution that mixes two images; 0 is off
    cutmix: Alpha = 0.0  # of that which cuts a box of one into the other; 0 is off
    mix_prob: Share = 1.0  # of mixing at all
    mix_switch_prob: Share = 0.5  # of cutmix where both are on
    mix_mode: Literal["batch", "row"] = "batch"  # drawn once for the global batch, or for each image
    rand_augment: RandAugmentConfig | None = None
    erasing: Share = 0.0  # probability of a box of noise (Zhong et al. 2020)
    erasing_area: tuple[PositiveFloat, PositiveFloat] = (0.02, 1 / 3)  # share of the image
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # momentum of a slow average of the weights; null: none

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        wrong = []
        if self.task not in ("one_label", "segmentation") and self.label is None:
            wrong.append(f"task {self.task} reads a field of each sample's .json: name it, method.label=FIELD")
        if (unfit := self.unfit()) and self.task in _WITHOUT:
            said = " and ".join([", ".join([*unfit][:-1]), [*unfit][-1]] if len(unfit) > 1 else unfit)
            advice = " ".join(f"method.{key}={written}" for key, written in unfit.items())
            wrong.append(f"task {self.task} {_WITHOUT[self.task]} {said}: set {advice}")
        if self.lora is not None and self.train_blocks is not None:
            wrong.append(
                "lora freezes the encoder and train_blocks trains a part of it: set one of them to null "
                "(method.lora=null)"
            )
        if self.fc_norm and self.pool == "class":
            wrong.append("fc_norm is the norm after a mean; with pool class set method.fc_norm=false")
        low, high = self.erasing_area
        if not low <= high <= 1:
            wrong.append(f"erasing_area is {low:g} .. {high:g}; it must rise, to 1 at most")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def unfit(self, task: str | None = None) -> dict[str, str]:
        """The settings that say nothing to a task, by default `task`, and what each is to be set to."""
        task, off = task or self.task, dict[str, Any]()
        if task == "segmentation":
            off = {"label": None, "pool": None, "fc_norm": False, "label_smoothing": 0, "mixup": 0, "cutmix": 0}
            off |= {"rand_augment": None, "erasing": 0}
        elif task == "numbers":
            off = {"label_smoothing": 0, "cutmix": 0}
        written = {key: "null" if value is None else str(value).lower() for key, value in off.items()}
        return {key: written[key] for key, value in off.items() if getattr(self, key) != value}

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool((self.mixup or self.cutmix) and self.mix_prob)


def _check(config: Config, tokens: Tokens | None) -> None:
    method, data = config.method, config.data
    if method.fc_norm and not _has_sequence(config):
        raise ValueError(
            f"method.fc_norm needs the tokens before the last norm, which {config.encoder.family} does not give: "
            "set method.fc_norm=false"
        )
    if method.rand_augment is not None and (data.channels, data.bits) != (3, 8):
        raise ValueError(
            f"method.rand_augment is made for RGB of 8 bits, and data has {data.channels} channels of {data.bits}: "
            "set method.rand_augment=null"
        )
    if data.adopt is not None:
        raise ValueError("fine-tuning reads all labels at its start, so data must not grow: set data.adopt=null")
    if not isinstance(data.train, str) and len(data.train) > 1 and method.val_data is None:
        raise ValueError("of several data sets none is the one to measure on: set method.val_data")
    height, width = config.views.global_size
    if height != width:
        raise ValueError(f"views.global_crops are {height}x{width} px, and fine-tuning measures on squares")
    if config.engine.zero_stage == 3:
        raise ValueError("fine-tuning measures the whole model while it trains: set engine.zero_stage to 2 at most")
    if config.engine.expert_parallel:
        raise ValueError("fine-tuning measures the whole model while it trains: set engine.expert_parallel=false")


def _has_sequence(config: Config) -> bool:
    from pretrain.encoders.registry import family_of

    return family_of(config.encoder).has_sequence(config.encoder)


def _check_batch(config: Config, rows: int) -> None:
    block = 2 * config.data.repeated_augmentation
    if config.method.mixes and rows % block:
        raise ValueError(
            f"mixing pairs rows within {block} of the global batch, and a micro-batch has {rows}: let it be a "
            f"multiple of {block} (train.batch_size / ranks / train.grad_accum_steps), or set method.mixup=0 "
            "method.cutmix=0"
        )


_MAP = "A class for each pixel needs a map of tokens: `selfsight encoders` shows which have one"

SPEC = MethodSpec(
    name="finetune",
    title="Fine-tuning",
    config=FinetuneConfig,
    build="pretrain.methods.finetune.method:build",
    example={"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "ema": 0.9},
    headline="class",
    needs=lambda section: Needs(token_map=_MAP) if section.task == "segmentation" else Needs(),
    masks=lambda section: section.task == "segmentation",
    check=_check,
    check_batch=_check_batch,
    learns_from="pretrain.methods.finetune.labels:are_labelled",
    left_out="pretrain.methods.finetune.labels:left_out",
    sources="pretrain.methods.finetune.labels:check_labels",
    metrics={
        "train_top1": Metric("of the training batch, top-1 (of the label that weighs more)", percent=True),
        "val_loss": Metric("held-out loss"),
        "val_top1": Metric("held-out top-1", percent=True),
        "val_top5": Metric("held-out top-5", percent=True),
        "val_map": Metric("held-out mAP", percent=True),
        "val_r2": Metric("held-out R2"),
        "val_mae": Metric("held-out mean absolute error"),
        "val_miou": Metric("held-out mIoU", percent=True),
        "val_pixel_accuracy": Metric("held-out pixels right", percent=True),
        "ema_miou": Metric("held-out mIoU, averaged weights", percent=True),
        "ema_pixel_accuracy": Metric("held-out pixels right, averaged weights", percent=True),
        "ema_loss": Metric("held-out loss, averaged weights"),
        "ema_top1": Metric("held-out top-1, averaged weights", percent=True),
        "ema_top5": Metric("held-out top-5, averaged weights", percent=True),
        "ema_map": Metric("held-out mAP, averaged weights", percent=True),
        "ema_r2": Metric("held-out R2, averaged weights"),
        "ema_mae": Metric("held-out mean absolute error, averaged weights"),
        "val_seconds": Metric("seconds of a measurement on held-out images", "Speed and memory"),
    },
)
