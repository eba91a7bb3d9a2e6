"""What of a configuration goes with what, across its sections; refused in words (imports no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.methods.registry import spec_of
from pretrain.methods.spec import Tokens

if TYPE_CHECKING:
    from pretrain.config import Config


def check_combinations(config: Config) -> None:
    """Raise ValueError for the first combination that can't run, naming both sides and what is allowed."""
    _check_channels(config)
    _check_schedule(config)
    _check_encoder(config)
    _check_frames(config)
    _check_views(config)
    _check_sizes(config)
    encoder = config.encoder
    known = hasattr(encoder, "stride")  # a timm model's tokens are known when it is built: encoders/supported.py
    spec_of(config.method).check(config, Tokens(encoder.stride, encoder.patch) if known else None)


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


def _check_sizes(config: Config) -> None:
    own = spec_of(config.method).stride
    if own is None and not hasattr(config.encoder, "stride"):
        return  # what a timm model takes is known when it is built: encoders/supported.py
    who = "the encoder" if own is None else config.method.name
    stride = config.encoder.stride if own is None else own(config.method)
    named = [("views.global_crops", config.views.global_size)]
    if config.views.local_crops is not None:
        named.append(("views.local_crops", config.views.local_crops.size))
    for where, size in named:
        for side in size:
            if side % stride:
                below = side // stride * stride
                raise ValueError(
                    f"{where} is {size[0]}x{size[1]} px; {who}'s stride is {stride}, "
                    f"so each side must be a multiple of it, such as {below or stride} or {below + stride}"
                )
