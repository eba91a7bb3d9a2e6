"""The typed sections of a run's configuration (imports no torch)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from data_pipelines.views import Share, Views, section
from pretrain.combinations import check_combinations

# dim, depth, heads of the published sizes
VIT_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1408, 40, 16),
}
SWIN_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


@section
class DataConfig:
    """Which shards, and how they are read."""

    train: str  # a folder holding train-*.tar, or a path with {000..009} or * in it
    channels: PositiveInt = 3
    mean: tuple[float, ...] | None = None  # per channel, of pixels in 0 .. 1; default: dataset.json's, else ImageNet's
    std: tuple[PositiveFloat, ...] | None = None
    lanes: PositiveInt | None = None  # streams a batch draws from; default: the batch's largest divisor up to 512
    shuffle_window: PositiveInt = 1024  # samples shuffled together within a lane
    threads: PositiveInt | None = None  # default: the cores this process may use
    prefetch: PositiveInt = 2  # batches made ahead
    max_bad_share: Share = 0.01  # unreadable samples are replaced and counted; beyond this share the run stops


@section
class MaskConfig:
    """Which units of an image are hidden."""

    kind: Literal["random", "blockwise", "one_in_2x2"] = "random"
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
class VitConfig:
    """A vision transformer; `size` names dim, depth and heads, each of which may be set by itself."""

    family: Literal["vit"] = "vit"
    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = "base"
    dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    heads: PositiveInt | None = None
    patch: PositiveInt = 16
    positions: Literal["learned", "sincos"] = "learned"
    class_token: bool = True
    registers: NonNegativeInt = 0
    pool: Literal["class", "mean"] = "class"
    stem: Literal["patch", "conv"] = "patch"
    layer_scale: PositiveFloat | None = None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Width, number of blocks, number of attention heads."""
        dim, depth, heads = VIT_SIZES[self.size]
        return self.dim or dim, self.depth or depth, self.heads or heads

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch

    @model_validator(mode="after")
    def _check(self) -> VitConfig:
        dim, _, heads = self.shape
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        if self.positions == "sincos" and dim % 4:
            raise ValueError(f"dim is {dim}; sin-cos positions need a multiple of 4")
        if self.pool == "class" and not self.class_token:
            raise ValueError("pool is 'class' but class_token is false; set pool=mean or class_token=true")
        if self.stem == "conv" and (self.patch & (self.patch - 1) or self.patch < 2):
            raise ValueError(f"patch is {self.patch}; a convolutional stem halves the image, so patch is a power of 2")
        return self


@section
class SwinConfig:
    """A Swin transformer; `size` names dim, depths and heads, each of which may be set by itself."""

    family: Literal["swin"] = "swin"
    size: Literal["tiny", "small", "base", "large"] = "tiny"
    dim: PositiveInt | None = None  # of the first stage
    depths: tuple[PositiveInt, ...] | None = None
    heads: tuple[PositiveInt, ...] | None = None
    patch: PositiveInt = 4
    window: PositiveInt = 7
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def shape(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Width of the first stage, blocks per stage, heads per stage."""
        dim, depths, heads = SWIN_SIZES[self.size]
        return self.dim or dim, self.depths or depths, self.heads or heads

    @property
    def stride(self) -> int:
        """Pixels per output token."""
        return self.patch * 2 ** (len(self.shape[1]) - 1)

    @model_validator(mode="after")
    def _check(self) -> SwinConfig:
        dim, depths, heads = self.shape
        if len(depths) != len(heads):
            raise ValueError(f"depths {depths} name {len(depths)} stages and heads {heads} name {len(heads)}; set both")
        for stage, num_heads in enumerate(heads):
            if dim * 2**stage % num_heads:
                raise ValueError(
                    f"stage {stage} is {dim * 2**stage} wide, which does not divide into {num_heads} heads"
                )
        return self


EncoderConfig = Annotated[VitConfig | SwinConfig, Field(discriminator="family")]


@section
class MaeConfig:
    """Masked autoencoder (He et al. 2022; on pyramids UM-MAE, Li et al. 2022)."""

    name: Literal["mae"] = "mae"
    mask: MaskConfig = MaskConfig()
    decoder_dim: PositiveInt = 512
    decoder_depth: PositiveInt = 8
    decoder_heads: PositiveInt = 16
    norm_pix_loss: bool = True

    @model_validator(mode="after")
    def _check(self) -> MaeConfig:
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"decoder_dim is {self.decoder_dim}; it must be a multiple of 4 "
                f"and of decoder_heads ({self.decoder_heads})"
            )
        if self.mask.kind == "blockwise":
            raise ValueError("MAE drops equally many units from every image; blockwise masks vary: use kind random")
        return self


@section
class MimConfig:
    """Masked image modelling with a mask token (SimMIM, Xie et al. 2022; BEiT, Bao et al. 2022)."""

    name: Literal["mim"] = "mim"
    mask: MaskConfig = MaskConfig(ratio=0.6, unit=32)
    target: Literal["pixels"] = "pixels"

    @model_validator(mode="after")
    def _check(self) -> MimConfig:
        if self.mask.kind == "one_in_2x2":
            raise ValueError(
                "kind one_in_2x2 drops units before the encoder, which is MAE's; MIM takes random or blockwise"
            )
        return self


@section
class DinoConfig:
    """Self-distillation with no labels (Caron et al. 2021)."""

    name: Literal["dino"] = "dino"
    prototypes: PositiveInt = 65536
    head_hidden: PositiveInt = 2048
    head_bottleneck: PositiveInt = 256
    norm_last_layer: bool = True  # fix the prototypes' norm at 1
    freeze_last_layer_epochs: NonNegativeFloat = 1.0
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.04
    warmup_teacher_temperature: PositiveFloat = 0.04
    warmup_teacher_temperature_epochs: NonNegativeInt = 0
    teacher_momentum: Share = 0.996  # rises to 1 over the run on a cosine
    center_momentum: Share = 0.9


MethodConfig = Annotated[MaeConfig | MimConfig | DinoConfig, Field(discriminator="name")]


@section
class OptimConfig:
    """AdamW and its schedules."""

    lr: PositiveFloat  # at `lr_reference_batch`, scaled linearly with the global batch
    lr_reference_batch: PositiveInt = 256
    lr_end: NonNegativeFloat = 0.0  # absolute, not scaled
    warmup_epochs: NonNegativeFloat = 0.0
    warmup: Literal["linear", "linear_inclusive"] = "linear"
    """`linear`: step s of w has s / w of the rate (MAE). `linear_inclusive`: s / (w - 1), as linspace (DINO, BEiT)."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.05
    weight_decay_end: NonNegativeFloat | None = None  # default: constant
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # rate of a layer relative to the one above it
    clip_grad: NonNegativeFloat = 0.0  # global norm; 0 is off


@section
class TrainConfig:
    """How long, and with what batch."""

    epochs: PositiveFloat | None = None
    steps: PositiveInt | None = None  # instead of epochs
    batch_size: PositiveInt = 256  # global: ranks x micro-batch x accumulation
    accumulation: PositiveInt = 1

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; set one of them (the other to null)")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.accumulation} accumulation steps"
            )
        return self


#: DeepSpeed keys that the sections of this file already decide.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim",
    "torch_autocast": "engine.precision",
    "bf16": "engine.precision (DeepSpeed's bf16 section also rounds the teacher, whose slow average then stands still)",
    "fp16": "engine.precision (DeepSpeed's fp16 section also rounds the teacher, whose slow average then stands still)",
    "zero_allow_untested_optimizer": "optim",
}


@section
class EngineConfig:
    """How DeepSpeed runs the model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the arithmetic; parameters, teacher and average stay fp32
    activation_checkpointing: bool = False
    compile: bool = False  # the encoder's blocks
    threads: PositiveInt | None = None  # torch's, per process; default: the cores this process may use
    hang_seconds: PositiveFloat | None = 1800.0  # a step or save that takes longer ends the process with its stacks
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # further DeepSpeed keys, passed through

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        for key, owner in OWNED_DEEPSPEED_KEYS.items():
            if key in self.deepspeed:
                raise ValueError(f"engine.deepspeed.{key} is decided by {owner}; set that instead")
        for key in ("zero_optimization", "elasticity"):
            if not isinstance(self.deepspeed.get(key, {}), dict):
                raise ValueError(f"engine.deepspeed.{key} is {self.deepspeed[key]!r}; DeepSpeed takes a mapping here")
        if self.precision == "fp16":
            raise ValueError(
                "engine.precision fp16 is refused: DeepSpeed leaves autocast's loss scale out of its checkpoints, so a "
                "resumed run would differ; use bf16, which needs no scale, or fp32"
            )
        if "stage" in self.deepspeed.get("zero_optimization", {}):
            raise ValueError(
                "engine.deepspeed.zero_optimization.stage is decided by engine.zero_stage; set that instead"
            )
        if self.deepspeed.get("elasticity", {}).get("enabled"):
            raise ValueError(
                "engine.deepspeed.elasticity changes the batch size with the ranks; the order of data forbids it"
            )
        return self


@section
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 2
    milestone_every_epochs: PositiveInt | None = None  # these are kept for good


@section
class TrackingConfig:
    """What is written down while training."""

    log_every_steps: PositiveInt = 10
    pictures_every_steps: NonNegativeInt = 1000  # 0 is never
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in, else offline
    project: str = "selfsight"
    group: str | None = None
    tags: tuple[str, ...] = ()


@section
class Config:
    """Everything a run depends on."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    runs: str = "runs"  # the run folder is runs/name
    seed: NonNegativeInt = 0
    data: DataConfig
    views: Views
    encoder: EncoderConfig
    method: MethodConfig
    optim: OptimConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_combinations(self)
        return self
