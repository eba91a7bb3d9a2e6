"""What of a configuration goes with what, across its sections; refused in words (imports no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.encoders.registry import family_of
from pretrain.methods.registry import spec_of
from pretrain.methods.spec import Tokens

if TYPE_CHECKING:
    from pretrain.config import Config


def check_combinations(config: Config) -> None:
    """Raise ValueError for the first combination that can't run, naming both sides and what is allowed."""
    _check_channels(config)
    _check_schedule(config)
    _check_encoder(config)
    _check_continuing(config)
    _check_frames(config)
    _check_views(config)
    _check_native(config)
    _check_sizes(config)
    _check_experts(config)
    encoder = config.encoder
    known = hasattr(encoder, "stride")  # a timm model's tokens are known when it is built: encoders/supported.py
    spec_of(config.method).check(config, Tokens(encoder.stride, encoder.patch) if known else None)


def _check_experts(config: Config) -> None:
    if not config.engine.expert_parallel:
        return
    if getattr(config.encoder, "experts", None) is None:
        family = "no encoder" if config.encoder is None else f"encoder {config.encoder.family}"
        raise ValueError(
            f"engine.expert_parallel divides experts over ranks, and {family} has none; set it to false, or take "
            "encoder.family=swin_moe"
        )
    if config.engine.zero_stage:
        raise ValueError(
            f"engine.expert_parallel is with engine.zero_stage=0, and it is {config.engine.zero_stage}: ZeRO divides "
            "states and parameters by itself, of experts too; set one of them"
        )


def _check_channels(config: Config) -> None:
    data, shown = config.data, config.tracking.picture_channels
    if len(shown) not in (1, 3) or (data.channels not in (1, 3) and max(shown) >= data.channels):
        raise ValueError(
            f"tracking.picture_channels is {list(shown)}; name one or three of the channels 0 .. {data.channels - 1}"
        )
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != data.channels:
            raise ValueError(f"data.{name} has {len(values)} values for data.channels = {data.channels}")
    if config.train.batch_size % data.repeated_augmentation:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} is no multiple of "
            f"data.repeated_augmentation = {data.repeated_augmentation}, "
            "the rows that each sample fills"
        )
    if (data.mean is None) != (data.std is None):
        raise ValueError("data.mean and data.std go together: set both or neither")


def _check_schedule(config: Config) -> None:
    epochs, warmup = config.train.epochs, config.optim.warmup_epochs
    if epochs is not None and warmup > epochs:
        raise ValueError(
            f"optim.warmup_epochs is {warmup:g}, more than train.epochs = {epochs:g}; set it along, such as "
            f"optim.warmup_epochs={epochs / 10:g}"
        )
    steps = config.optim.step_epochs
    if epochs is not None and steps and steps[-1] >= epochs:
        raise ValueError(
            f"optim.step_epochs ends with {steps[-1]:g}, which train.epochs = {epochs:g} never reaches; "
            "move the steps with the length of the run"
        )


def _check_encoder(config: Config) -> None:
    name, encoder = config.method.name, config.encoder
    if spec_of(config.method).stride is not None:
        if encoder is not None:
            raise ValueError(f"{name} has a network of its own: set encoder=null")
        optim = config.optim
        for key, value, without in (
            ("optim.layer_decay", optim.layer_decay, 1.0),
            ("optim.patch_embed_lr_scale", optim.patch_embed_lr_scale, 1.0),
        ):
            if value != without:
                raise ValueError(f"{key} is about an encoder's blocks, and {name} has none: set {key}={without}")
    elif encoder is None:
        raise ValueError(f"{name} needs an encoder; set encoder.family=vit, for example")


def _check_continuing(config: Config) -> None:
    continuing, steps = config.continuing, config.train.steps
    if continuing is None:
        return
    if config.init_from is None:
        raise ValueError(
            "continuing says what becomes of weights, and init_from is null: name a run, a checkpoint, an imported "
            "folder or timm:NAME in init_from, or set continuing=null"
        )
    if spec_of(config.method).exports != "encoder":
        raise ValueError(f"{config.method.name} leaves no encoder to be continued: set continuing=null")
    if config.method.name == "finetune" and (continuing.lora is not None or continuing.train_blocks is not None):
        raise ValueError(
            "fine-tuning has lora and train_blocks of its own: set method.lora or method.train_blocks, and "
            "continuing.lora=null continuing.train_blocks=null"
        )
    first = continuing.heads_first_steps + continuing.ramp_steps
    if steps is not None and first >= steps:
        raise ValueError(
            f"continuing.heads_first_steps {continuing.heads_first_steps} and ramp_steps {continuing.ramp_steps} take "
            f"{first} steps of train.steps = {steps:g}, and the encoder shall learn after them; set them lower"
        )
    height, width = (0, 0) if config.views.native else config.views.global_size
    if continuing.measure_every_epochs is not None and (height != width or config.views.native):
        shown = "of their own shape" if config.views.native else f"{height}x{width} px"
        raise ValueError(
            f"continuing.measure_every_epochs compares squares, and views.global_crops are {shown}: set it to null"
        )
    if continuing.feature_weight or continuing.gram_weight:
        if config.views.native:
            raise ValueError(
                "continuing.feature_weight and gram_weight compare images of one size, and with shape=native each has "
                "its own; set both to 0"
            )
        if config.engine.expert_parallel:
            raise ValueError("continuing.feature_weight and gram_weight go with engine.expert_parallel=false")


def _check_frames(config: Config) -> None:
    frames, of_encoder = config.data.frames, getattr(config.encoder, "frames", None)
    if of_encoder is not None and of_encoder != frames:
        raise ValueError(
            f"data.frames is {frames} and encoder.frames is {of_encoder}: {config.encoder.family} sees stacks of the "
            f"frames that it is built for; set data.frames={of_encoder}, or encoder.frames={frames}"
        )
    if frames == 1:
        return
    if not spec_of(config.method).stacks:
        raise ValueError(
            f"data.frames is {frames}, and {config.method.name} takes single images; set data.frames=1, where of a "
            "stack the first frame is shown, or take dino, mae or mim"
        )
    if getattr(config.encoder, "spatial_transformer", None) is not None:
        raise ValueError(f"data.frames is {frames}, and a spatial transformer straightens images; set it to null")
    if config.views.native:
        raise ValueError(f"data.frames is {frames}, and crops of their own shape are of images; set shape=fixed")
    if config.data.backend == "device":
        raise ValueError(
            f"data.frames is {frames}, and data.backend=device does the colours of images; set data.backend=auto"
        )


def _check_views(config: Config) -> None:
    views, name, crops = config.views, config.method.name, spec_of(config.method).crops(config.method)
    if len(views.global_crops) != crops.num_global:
        raise ValueError(f"{name} takes {crops.num_global} in views.global_crops, not {len(views.global_crops)}")
    if views.local_crops is not None and not crops.local:
        raise ValueError(f"{name} sees no local crops; remove views.local_crops")
    if crops.target is not None and views.target_crop is None:
        raise ValueError(f"method {name} as it is set needs views.target_crop: {crops.target}")
    if views.target_crop is not None and crops.target is None:
        raise ValueError(f"method {name} as it is set reads no views.target_crop; remove it")
    if views.teacher_crops is not None and crops.teacher is None:
        raise ValueError(f"method {name} as it is set reads no views.teacher_crops; remove it")
    if views.mixed_sizes and not crops.mixed:
        raise ValueError(f"method {name} takes crops of the same sizes in all steps; remove views.mixed_sizes")


def _check_native(config: Config) -> None:
    """What crops of their own shape go with."""
    views, encoder = config.views, config.encoder
    if not views.native:
        if config.train.max_tokens is not None:
            raise ValueError("train.max_tokens bounds crops of their own shape; set it to null, or shape=native")
        return
    method = spec_of(config.method)
    if not method.native(config.method):
        advice = f"set {method.native_with}" if method.native_with else "leave shape=native out"
        raise ValueError(
            f"method {config.method.name} as it is set takes no crops of their own shape (shape=native); {advice}"
        )
    if encoder is None or not family_of(encoder).native(encoder):
        name = "no encoder" if encoder is None else f"encoder {encoder.family}"
        raise ValueError(
            f"{name} takes no crops of their own shape (shape=native); set encoder.family=navit, vit with its "
            "encoder.stem=patch and positions of learned, sincos or rotary, or dinov3 without local_class_norm"
        )
    patch = views.global_crops[0].patch
    if encoder.patch != patch:
        raise ValueError(f"views are cut into patches of {patch} px and the encoder's are {encoder.patch} px")
    mask = getattr(config.method, "mask", None)
    if mask is not None and mask.unit != patch:
        raise ValueError(f"method.mask.unit is {mask.unit} px; with shape=native it is one patch: set it to {patch}")
    ibot = getattr(config.method, "ibot", None)
    if ibot is not None and ibot.unit not in (None, patch):
        raise ValueError(
            f"method.ibot.unit is {ibot.unit} px; with shape=native it is one patch: set it to {patch}, or null"
        )
    if config.data.backend == "device":
        raise ValueError("data.backend=device makes crops of one size; for shape=native set data.backend=auto")
    if config.engine.compile:
        raise ValueError(
            "engine.compile compiles for lengths, and with shape=native every step has others; set engine.compile=false"
        )


def check_tokens(config: Config, rows: int) -> None:
    """Raise ValueError where a micro-batch of so many rows may have more patches than `train.max_tokens`."""
    bound, most = config.train.max_tokens, rows * config.views.most_tokens
    if bound is not None and most > bound:
        raise ValueError(
            f"a micro-batch of {rows} rows may have {most:,} patches, {config.views.most_tokens} a row, and "
            f"train.max_tokens is {bound:,}; take more train.grad_accum_steps, or smaller max_tokens of the views"
        )


def _check_sizes(config: Config) -> None:
    own = spec_of(config.method).stride
    if own is None and not hasattr(config.encoder, "stride"):
        return  # what a timm model takes is known when it is built: encoders/supported.py
    who = "the encoder" if own is None else config.method.name
    stride = config.encoder.stride if own is None else own(config.method)
    named = [("views.global_crops", config.views.global_size)]
    if config.views.local_crops is not None:
        named.append(("views.local_crops", config.views.local_crops.size))
    for number, sizes in enumerate(config.views.mixed_sizes):
        named.append((f"views.mixed_sizes.{number}.global_crops", sizes.global_crops))
        if sizes.local_crops is not None:
            named.append((f"views.mixed_sizes.{number}.local_crops", sizes.local_crops))
    for where, size in named:
        for side in size:
            if side % stride:
                below = side // stride * stride
                raise ValueError(
                    f"{where} is {size[0]}x{size[1]} px; {who}'s stride is {stride}, "
                    f"so each side must be a multiple of it, such as {below or stride} or {below + stride}"
                )
