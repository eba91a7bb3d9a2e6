"""What of a configuration goes with what, across its sections; refused in words (imports no torch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.config.mask_counts import check_ibot_counts, check_mask_counts

if TYPE_CHECKING:
    from pretrain.config import Config


def check_combinations(config: Config) -> None:
    """Raise ValueError for the first combination that can't run, naming both sides and what is allowed."""
    _check_channels(config)
    _check_schedule(config)
    _check_encoder(config)
    _check_views(config)
    _check_sizes(config)
    _check_mask(config)
    _check_ibot(config)
    _check_aggregation(config)


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
    method, encoder = config.method, config.encoder
    if method.name == "dvae":
        if encoder is not None:
            raise ValueError("dvae is a convolutional network of its own: set encoder=null")
        engine, optim = config.engine, config.optim
        for name, value, without in (
            ("engine.activation_checkpointing", engine.activation_checkpointing, False),
            ("engine.compile", engine.compile, False),
            ("optim.layer_decay", optim.layer_decay, 1.0),
            ("optim.patch_embed_lr_scale", optim.patch_embed_lr_scale, 1.0),
        ):
            if value != without:
                raise ValueError(f"{name} is about an encoder's blocks, and dvae has none: set {name}={without}")
    elif encoder is None:
        raise ValueError(f"{method.name} needs an encoder; set encoder.family=vit, for example")


def _check_views(config: Config) -> None:
    views, method = config.views, config.method
    if method.name == "dino":
        if len(views.global_crops) != 2:
            raise ValueError(f"DINO takes 2 views.global_crops, not {len(views.global_crops)}")
    else:
        if len(views.global_crops) != 1:
            raise ValueError(f"{method.name} takes 1 entry in views.global_crops, not {len(views.global_crops)}")
        if views.local_crops is not None:
            raise ValueError(f"{method.name} sees no local crops; remove views.local_crops")
    wanted = method.name == "mim" and method.target == "codes"
    if wanted and views.target_crop is None:
        raise ValueError("target codes needs views.target_crop, the crop that the tokenizer sees")
    if views.target_crop is not None and not wanted:
        raise ValueError(
            "views.target_crop is for method.target=codes; the other targets are read from the global crop"
        )


def _check_sizes(config: Config) -> None:
    if config.encoder is not None and config.encoder.family == "timm":
        return  # what it takes is known when it is built: encoders/supported.py
    if config.method.name == "dvae":
        who, stride = "the dVAE", 2 ** (config.method.groups - 1)
    else:
        assert config.encoder is not None
        who, stride = "the encoder", config.encoder.stride
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


def _check_mask(config: Config) -> None:
    method, encoder = config.method, config.encoder
    if method.name not in ("mae", "mim"):
        return
    assert encoder is not None
    mask, size = method.mask, config.views.global_size
    for side in size:
        if side % mask.unit:
            raise ValueError(f"method.mask.unit is {mask.unit} px and does not divide the image's side of {side} px")
    check_mask_counts(mask, size)
    if encoder.family == "timm":
        return
    check_units(mask.unit, encoder.stride, encoder.patch)
    finest = max(mask.unit, encoder.stride)
    if method.name == "mae" and encoder.family not in ("vit", "beit") and mask.kind != "one_in_2x2":
        raise ValueError(
            f"MAE on {encoder.family} needs method.mask.kind=one_in_2x2, not {mask.kind}: "
            "the visible units must form a dense map"
        )
    if mask.kind == "one_in_2x2":
        for side in size:
            if side % (2 * finest):
                raise ValueError(
                    f"the image's side is {side} px; with one visible unit in 2x2 it must be a multiple of "
                    f"{2 * finest} px (twice the larger of mask unit {mask.unit} and encoder stride {encoder.stride})"
                )


def _check_ibot(config: Config) -> None:
    method, encoder = config.method, config.encoder
    if method.name != "dino" or method.ibot is None or (encoder.family == "timm" and method.ibot.unit is None):
        return  # of timm, encoders/supported.py asks for it
    unit = method.ibot.unit or encoder.stride
    if encoder.family != "timm" and unit % encoder.stride:
        raise ValueError(
            f"method.ibot.unit is {unit} px; the teacher's tokens are {encoder.stride} px, so it must be a multiple of "
            "that (null: one token)"
        )
    for side in config.views.global_size:
        if side % unit:
            raise ValueError(f"method.ibot.unit is {unit} px and does not divide the image's side of {side} px")
    check_ibot_counts(method.ibot, unit, config.views.global_size)


def _check_aggregation(config: Config) -> None:
    method, encoder = config.method, config.encoder
    if method.name != "mim" or method.aggregation is None:
        return
    if method.target != "codes":
        raise ValueError(f"method.aggregation is BEiT v2's head for target codes, not {method.target}")
    if encoder.family not in ("vit", "beit") or not getattr(encoder, "class_token", True):
        raise ValueError(
            "method.aggregation goes through the class token, so it needs family vit or beit with one; "
            f"the encoder is {encoder.family}" + (" without" if encoder.family in ("vit", "beit") else "")
        )
    depth, layer = encoder.shape[1], method.aggregation.layer
    if layer >= depth:
        raise ValueError(f"method.aggregation.layer is {layer}; it must lie below the last of the {depth} blocks")


def check_units(unit: int, stride: int, patch: int) -> None:
    """Raise ValueError unless mask units fit an encoder's input tokens of `patch` px and output tokens of `stride`."""
    if unit % patch:
        raise ValueError(f"method.mask.unit is {unit} px; it must be a multiple of the encoder's patch ({patch} px)")
    if unit % stride and stride % unit:
        raise ValueError(f"method.mask.unit {unit} px and the encoder's stride {stride} px: one must divide the other")
