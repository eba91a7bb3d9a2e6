"""The typed sections of a run's configuration that are neither encoder nor method (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from data_pipelines.transforms.config import BackendName, Share, Views, section
from pretrain.config.combinations import check_combinations
from pretrain.config.deepspeed_keys import check_deepspeed
from pretrain.config.diagnostics import DiagnosticsConfig
from pretrain.config.wandb_names import check_name, check_wandb_names
from pretrain.continuing.config import ContinuingConfig
from pretrain.encoders.registry import EncoderConfig
from pretrain.methods.registry import MethodConfig


@section
class CacheConfig:
    """Where shards from elsewhere are kept on this machine, for all its processes and jobs."""

    dir: str | None = None  # default: SELFSIGHT_CACHE, else ~/.cache/selfsight; to stage: SLURM_TMPDIR, else TMPDIR
    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(200 * 10**9)  # a number, or such as 500GB; the oldest go
    prefetch_steps: NonNegativeInt = 1000  # steps of which the shards are fetched before they are read
    tries: PositiveInt = 8  # of a source that fails, with growing waits between them
    timeout_seconds: PositiveFloat = 60.0  # without a byte, after which a connection has failed


@section
class SourceConfig:
    """One of several data sets that are mixed."""

    path: str  # as `data.train`
    weight: PositiveFloat | None = None  # its share of the rows, by ratio; default for all: their numbers of samples
    name: str | None = None  # in messages; default: the last part of the path


@section
class DataConfig:
    """Which shards, and how they are read."""

    train: str | tuple[SourceConfig, ...]
    """A folder holding train-*.tar, or a path with {000..009} or * in it, here or at a URL; or several of these:
    [{path: a, weight: 2}, ...]."""
    adopt: Literal["next_epoch"] | None = None
    """Of data that changed since the run began: `next_epoch` goes over to them at the present epoch's end."""
    stage: bool = False  # copy local shards through the cache: their file system is slow
    cache: CacheConfig = Field(default_factory=CacheConfig)
    channels: PositiveInt = 3  # of the crops: 3 is RGB, 1 grey; other files are made so where they can be
    bits: Literal[8, 16] = 8  # of a channel
    frames: Annotated[int, Field(ge=1, le=4096)] = 1  # with several, samples are stacks, of which so many are shown
    frame_stride: PositiveInt | None = None
    """From one frame shown to the next, from a first one that is drawn; null: one from each of `frames` equal parts."""
    mean: tuple[float, ...] | None = None  # per channel, of pixels in 0 .. 1; default: dataset.json's, else ImageNet's
    std: tuple[PositiveFloat, ...] | None = None  # likewise
    lanes: PositiveInt | None = None  # streams a batch draws from; default: the batch's largest divisor up to 512
    shuffle_window: PositiveInt = 1024  # samples shuffled together within a lane
    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Processes that make the batches of each rank, out of reach of the training's interpreter lock; 0: threads of the
    training process do. `auto`: one for each core that a rank may use where images are thumbnails, else one for four
    cores."""
    threads: PositiveInt | None = None  # of each process that makes batches; default: the cores that this is one of
    prefetch: PositiveInt = 2  # batches made ahead
    repeated_augmentation: PositiveInt = 1  # rows of a batch that show the same sample, decoded once
    backend: BackendName = "auto"  # who makes the crops; auto: native where it is built, else opencv
    partial_decode: bool = True  # of a JPEG only what its crops touch; the crops are the same
    dct_scaling: bool = True  # a large JPEG at 1/2, 1/4 or 1/8 where its crops have px to spare
    max_bad_share: Share = 0.01  # unreadable samples are replaced and counted; beyond this share the run stops

    @property
    def planes(self) -> int:
        """Channels of the crops: of a stack those of all its frames, side by side."""
        return self.channels * self.frames

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.frame_stride is not None and self.frames == 1:
            raise ValueError(f"frame_stride is {self.frame_stride} and frames is 1: set frames along, or remove it")
        if not self.train:
            raise ValueError("train names no data; give a folder of shards, or a list of several")
        if not isinstance(self.train, str):
            weighted = [source.weight is not None for source in self.train]
            if any(weighted) and not all(weighted):
                raise ValueError(
                    "train gives some data sets a weight and others none; give it to all of them or to none"
                )
            names = [source.name for source in self.train if source.name is not None]
            if len(set(names)) < len(names):
                raise ValueError(f"train names its data sets {', '.join(names)}; give each a name of its own")
        return self


@section
class OptimConfig:
    """AdamW and its schedules."""

    lr: PositiveFloat  # learning rate at its peak, for a batch of `lr_reference_batch`; scaled with the global batch
    lr_reference_batch: PositiveInt = 256  # global batch at which the rate is `lr`
    lr_scaling: Literal["linear", "sqrt"] = "linear"  # how the rate follows the batch; sqrt: DINOv2's rule
    lr_end: NonNegativeFloat = 0.0  # absolute, not scaled
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """After the warm-up: to `lr_end` on a cosine, as it is, or times `step_factor` at each of `step_epochs`."""
    step_epochs: tuple[PositiveFloat, ...] = ()  # with schedule steps
    step_factor: PositiveFloat = 0.1  # with schedule steps
    warmup_epochs: NonNegativeFloat = 0.0  # from warmup_start up to the full rate
    warmup_start: NonNegativeFloat = 0.0  # absolute, not scaled
    warmup: Literal["linear", "linear_inclusive"] = "linear"
    """`linear`: step s of w has s / w of the rate (MAE). `linear_inclusive`: s / (w - 1), as linspace (DINO, BEiT)."""
    betas: tuple[Share, Share] = (0.9, 0.999)  # AdamW's averages of the gradient and its square
    eps: PositiveFloat = 1e-8  # AdamW's
    weight_decay: NonNegativeFloat = 0.05  # AdamW's; biases and norms have none
    weight_decay_end: NonNegativeFloat | None = None  # default: constant
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # rate of a layer relative to the one above it
    patch_embed_lr_scale: Annotated[float, Field(gt=0)] = 1.0  # on top of layer_decay; DINOv2: .2
    clip_grad: NonNegativeFloat = 0.0  # global norm; 0 is off

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if (self.schedule == "steps") != bool(self.step_epochs):
            raise ValueError(f"schedule is {self.schedule} and step_epochs {self.step_epochs}; they go together")
        if list(self.step_epochs) != sorted(set(self.step_epochs)):
            raise ValueError(f"step_epochs {self.step_epochs} must rise")
        if self.schedule != "cosine" and self.lr_end:
            raise ValueError(f"lr_end is {self.lr_end:g}, which belongs to schedule cosine; remove it")
        if self.step_epochs and self.warmup_epochs > self.step_epochs[0]:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} go beyond the first of step_epochs {self.step_epochs}"
            )
        return self


@section
class TrainConfig:
    """How long, and with what batch; `schedules.Timeline` says how lengths become whole steps."""

    epochs: PositiveFloat | None = None  # passes over the data
    steps: PositiveInt | PositiveFloat | None = None  # instead of epochs; 1.5e3 is a number, too
    batch_size: PositiveInt = 256  # global: ranks x micro-batch x accumulation
    grad_accum_steps: PositiveInt = 1  # micro-batches of a rank that make one step
    max_tokens: PositiveInt | None = None  # of shape=native: patches that a micro-batch may have at most; null: any

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; set one of them (the other to null)")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.grad_accum_steps} accumulation steps"
            )
        return self


def _refuse_fp16(given: Any) -> Any:
    if given == "fp16":
        raise ValueError(
            "fp16 is refused: DeepSpeed leaves autocast's loss scale out of its checkpoints, so a resumed run would "
            "differ; use bf16, which needs no scale, or fp32"
        )
    return given


@section
class EngineConfig:
    """How DeepSpeed runs the model."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    zero_stage: Literal[0, 1, 2, 3] = 0  # DeepSpeed's; from 1 on, ranks share optimizer states, gradients, parameters
    expert_parallel: bool = False  # ranks divide the experts of an encoder that has them; under ZeRO 0
    precision: Annotated[Literal["fp32", "bf16"], BeforeValidator(_refuse_fp16)] = "fp32"
    """Of the arithmetic; parameters, teacher and average stay fp32."""
    activation_checkpointing: bool = False  # computes the blocks twice, to save memory
    compile: bool = False  # the blocks, those of teachers and decoders too
    threads: PositiveInt | None = None  # torch's, per process; default: the cores this process may use
    hang_seconds: PositiveFloat | None = 1800.0  # what takes longer ends the job, with stacks; null: nothing does
    hang_factor: Annotated[float, Field(gt=1)] = 20.0  # and so does a step of so many times the median
    hang_floor_seconds: PositiveFloat = 180.0  # but not before
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # further DeepSpeed keys, passed through

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        check_deepspeed(self.deepspeed, self.zero_stage)
        return self


@section
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: PositiveInt = 1000  # a checkpoint each so many steps
    every_epochs: PositiveFloat | None = None  # and at the end of each so many epochs
    keep_last: PositiveInt = 2  # so many of the newest are kept
    milestone_every_epochs: PositiveFloat | None = None  # these are kept for good
    asynchronous: bool = True  # written while training goes on, from a copy in host memory; else training waits
    on_failure: Literal["continue", "stop"] = "continue"  # when none can be written, as on a full disk


@section
class TrackingConfig:
    """What is written down while training."""

    log_every_steps: PositiveInt = 10  # a line, and a row of metrics.jsonl
    pictures_every_steps: NonNegativeInt = 1000  # 0 is never
    picture_channels: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Of images that are neither grey nor RGB, the channels that pictures show: one, or red, green and blue."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: online when logged in, else offline
    project: str = "selfsight"  # in wandb
    entity: str | None = None  # wandb's user or team; default: that of who is logged in
    group: str | None = None  # in wandb
    job_type: str = "pretrain"  # in wandb; a sweep's runs are of another
    tags: tuple[str, ...] = ()  # in wandb
    notes: str | None = None  # in wandb; default: the description and the settings in a sentence
    system_every_seconds: NonNegativeFloat = 15.0  # how the machines of all nodes do; 0 is never
    peak_tflops: PositiveFloat | None = None  # of a device at the run's precision, for mfu; default: by its name
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """The first and last step of a trace in RUN/profile, such as [10, 12], counted from each start of the run."""

    @model_validator(mode="after")
    def _check(self) -> TrackingConfig:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)} must rise: the first step, then the last")
        check_wandb_names(self.project, self.entity, self.group, self.job_type, self.tags)
        return self


@section
class Config:
    """Everything a run depends on."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # default: the preset's
    description: str = ""  # in words, for lists and reports
    runs: str = "runs"  # the run folder is runs/name
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of every random draw: crops, masks, weights, order
    data: DataConfig
    views: Views
    encoder: EncoderConfig | None = None  # null for a method with a network of its own, such as dvae
    init_from: str | None = None  # start from these weights: a run, a checkpoint, an imported folder, or timm:NAME
    continuing: ContinuingConfig | None = None  # what becomes of these weights; null: they are only begun with
    method: MethodConfig
    optim: OptimConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_name(self.name)
        check_combinations(self)
        return self
