"""Distillation's section, and what is known of the method (imports neither torch nor NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from data_pipelines.transforms.config import section
from pretrain.methods.mask_counts import mask_grid
from pretrain.methods.masks import MaskConfig, check_mask
from pretrain.methods.spec import Crops, MethodSpec, Metric, Needs, Tokens

if TYPE_CHECKING:
    from data_pipelines.rng import DrawFields
    from pretrain.config import Config


@section
class DistillConfig:
    """An encoder learns to say of images what a frozen one says, without labels (Beyer et al. 2022's patient and
    consistent teacher on features)."""

    name: Literal["distill"] = "distill"
    teacher: str  # a run, a checkpoint or an encoder folder, or timm:NAME
    image_weight: NonNegativeFloat = 1.0  # of the loss on features of whole images
    image_loss: Literal["queue", "cosine", "mse"] = "queue"
    """`queue`: which of the teacher's features of earlier images an image is like, as the teacher has it. `cosine`,
    `mse`: the teacher's feature itself."""
    queue_size: PositiveInt = 8192  # earlier images that are compared with
    temperature: PositiveFloat = 0.07  # of the softmax over them
    patch_weight: NonNegativeFloat = 1.0  # of the loss on features of patches
    patch_loss: Literal["cosine", "mse", "similarity"] = "cosine"
    """`cosine`, `mse`: the teacher's features of patches. `similarity`: how alike the patches of an image are to each
    other (as in Gram anchoring), which asks for no features of its width."""
    head_hidden_dim: PositiveInt | None = None  # width between two layers to the teacher's width; null: one layer
    mixup: bool = False  # blends the images of two rows, for the teacher too
    mask: MaskConfig | None = None  # units that the student, not the teacher, sees replaced; null: it sees all

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if not self.image_weight and not self.patch_weight:
            raise ValueError("image_weight and patch_weight are 0, so that nothing is learned: set one of them")
        if self.mask is not None and self.mask.kind == "one_in_2x2":
            raise ValueError("mask.kind one_in_2x2 drops units before the encoder; distillation replaces them: random "
                             "or blockwise")  # fmt: skip
        return self


def _needs(section: DistillConfig) -> Needs:
    return Needs(
        replaces_tokens=None if section.mask is None else "method.mask replaces tokens; set method.mask=null",
        token_map="Set method.patch_weight=0, and features of whole images alone are learned"
        if section.patch_weight
        else None,
    )


def _check(config: Config, tokens: Tokens | None) -> None:
    if config.method.mask is not None:
        check_mask(config.method.mask, config.views.global_size, tokens)


def _check_batch(config: Config, rows: int) -> None:
    block = 2 * config.data.repeated_augmentation
    if config.method.mixup and rows % block:
        raise ValueError(
            f"method.mixup pairs rows within {block} of the global batch, and a micro-batch has {rows}: let it be a "
            f"multiple of {block} (train.batch_size / ranks / train.grad_accum_steps), or set method.mixup=false"
        )


def _draw(
    section: DistillConfig, image_size: tuple[int, int], stride: int | None, batch_size: int
) -> DrawFields | None:
    if section.mask is None:
        return None
    from pretrain.stream.masking import draw_units, mask_stream

    mask, grid = section.mask, mask_grid(section.mask, image_size)
    return lambda *place: {"token_mask": draw_units(mask_stream(*place), mask, grid)}


SPEC = MethodSpec(
    name="distill",
    title="distillation",
    config=DistillConfig,
    build="pretrain.methods.distill.method:build",
    example={"teacher": "timm:vit_tiny_patch16_224", "queue_size": 24},
    headline="class",
    crops=lambda section: Crops(teacher="other"),
    needs=_needs,
    check=_check,
    check_batch=_check_batch,
    draw=_draw,
    sources="pretrain.methods.distill.teacher:check",
    alarms="pretrain.methods.distill.alarms:alarms",
    metrics={
        "image_loss": Metric("loss of image features"),
        "patch_loss": Metric("loss of patch features"),
        "image_cosine": Metric("cosine to the teacher's image features", "Diagnostics"),
        "teacher_std": Metric("deviation of the teacher's features over images", "Diagnostics"),
    },
    shown="teacher",
)
