"""Settings for one's own images, chosen from their number, size, channels and depth and from the device (imports no
torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_pipelines.wording import counted

if TYPE_CHECKING:
    from data_pipelines.packing.inspect_images import ImagesSummary

Device = Literal["cpu", "cuda"]
PRESETS = {"mae": "mae_own_data", "dino": "dino_own_data"}
FEW_FOR_DINO = 5_000  # images; of fewer, self-distillation easily learns nothing
#: Samples that a run is shown, and the epochs between which that is kept.
SAMPLES: Mapping[Device, int] = {"cpu": 300_000, "cuda": 10_000_000}
EPOCHS: Mapping[Device, tuple[int, int]] = {"cpu": (10, 200), "cuda": (100, 800)}
LARGEST_CROP: Mapping[Device, int] = {"cpu": 96, "cuda": 224}  # px
LARGEST_BATCH = {("mae", "cuda"): 512, ("dino", "cuda"): 256, ("mae", "cpu"): 64, ("dino", "cpu"): 64}
BATCHES_AN_EPOCH = 4  # at least, where the images are few
MOST_SHRUNK = 4  # times that an image's short side may be larger than the crop that is made of it
#: DINO's jitter moves an image's mean level by a deviation of about .11 of white. Photographs of many things differ by
#: .13 (ImageNet, CIFAR); images that differ by less than half of the jitter lose in it what tells them apart.
LEAST_TONE_SPREAD = 0.055
_JITTER = {"jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8, "grayscale": 0.2}
#: The crops of Caron et al. 2021, but for their sizes and numbers.
_DINO_CROPS: Mapping[str, Mapping[str, Any]] = {
    "global_crops.0": {"scale": [0.4, 1.0], **_JITTER, "blur": 1.0},
    "global_crops.1": {"scale": [0.4, 1.0], **_JITTER, "blur": 0.1, "solarise": 0.2},
    "local_crops": {"scale": [0.05, 0.4], **_JITTER, "blur": 0.5},
}
_TIMM_VIT = re.compile(r"timm:vit_(tiny|small|base|large)_patch(\d+)_(\d+)")


@dataclass(frozen=True)
class Start:
    """What a run that goes on from other weights must keep of them."""

    encoder: dict[str, Any]  # settings of the section `encoder`
    image_size: int  # px
    patch: int  # px


@dataclass(frozen=True)
class Choice:
    """Settings by their keys, to come before what the user sets, and a line on each decision."""

    preset: str
    settings: dict[str, Any]
    reasons: list[str]


def choose_method(images: ImagesSummary, device: Device) -> tuple[Literal["mae", "dino"], str]:
    """The method for such images, and why."""
    if device == "cpu":
        return "mae", "a CPU: MAE encodes a quarter of each image, DINO ten crops of it"
    if images.number < FEW_FOR_DINO:
        return "mae", f"{images.number:,} images: of fewer than {FEW_FOR_DINO:,}, DINO easily learns nothing"
    if set(images.channels) - {1, 3}:
        return "mae", "channels that are not RGB: DINO's changes of colour are made for RGB"
    return "dino", f"{images.number:,} images and a GPU: DINO's features serve k-NN and linear probes as they are"


def choose(
    images: ImagesSummary,
    device: Device,
    method: Literal["mae", "dino"],
    world_size: int = 1,
    start: Start | None = None,
    patch: int | None = None,
) -> Choice:
    """Batch, crops, epochs, encoder, channels and depth for a run on `images` by `method`.

    patch: px, where it is given; what hangs on it follows.
    """
    settings, reasons = _pixels(images)
    crop, patch = (start.image_size, start.patch) if start else _crop_and_patch(images.short_side.low, device, patch)
    settings |= {f"views.global_crops.{number}.size": crop for number in range(1 if method == "mae" else 2)}
    why = (
        "as init_from has it"
        if start
        else f"three of four images have a short side of {images.short_side.low} px or more"
    )
    reasons.append(
        f"crops of {crop} px: {why}"
        + ("" if start or device == "cuda" else f", and a CPU gets {LARGEST_CROP['cpu']} px at most")
    )
    if start:
        settings |= {"encoder": start.encoder}
        reasons.append("the encoder: that of init_from")
    else:
        settings |= {"encoder.patch": patch} | ({"encoder.size": "tiny", "encoder.depth": 6} if device == "cpu" else {})
        small = "tiny with 6 blocks" if device == "cpu" else "small"
        reasons.append(f"encoder: a ViT, {small}, patches of {patch} px, {(crop // patch) ** 2} of them")
    if method == "mae":
        settings["method.mask.unit"] = patch
    else:
        settings["views.local_crops.size"] = max(round(crop * 96 / 224 / patch), 1) * patch
        colours, reason = _colours(images, settings["data.channels"])
        settings |= colours
        reasons.append(reason)
    if device == "cpu":
        settings |= {"engine.precision": "fp32"}
        settings |= (
            {"method.decoder_dim": 96, "method.decoder_depth": 2, "method.decoder_heads": 3}
            if method == "mae"
            else {"method.head_hidden_dim": 512, "method.head_bottleneck_dim": 128, "views.local_crops.count": 2}
        )
    batch, epochs = _batch(images.number, LARGEST_BATCH[method, device], world_size), _epochs(images.number, device)
    steps = max(images.number // batch, 1) * epochs
    settings |= {
        "train.batch_size": batch,
        "train.epochs": epochs,
        "optim.warmup_epochs": epochs // 10,
        "checkpoint.every_steps": min(max(steps // 5, 50), 1000),
        "tracking.log_every_steps": min(max(steps // 100, 1), 20),
        "tracking.pictures_every_steps": max(steps // 10, 1),
    }
    reasons.append(f"{epochs} epochs in batches of {batch}, about {steps:,} steps: for {images.number:,} images")
    return Choice(PRESETS[method], settings, reasons)


def start_of_timm(name: str) -> Start | None:
    """What `init_from=timm:NAME` tells of a plain ViT by its name."""
    found = _TIMM_VIT.match(name)
    if found is None:
        return None
    size, patch, side = found[1], int(found[2]), int(found[3])
    return Start({"family": "vit", "size": size, "patch": patch}, side, patch)


def warnings_of(images: ImagesSummary, crop: int, channels: int, bits: int) -> list[str]:
    """What a run on crops of `crop` px, of so many channels and bits, does not see of `images`."""
    from data_pipelines.images.depth import depth_warning

    lines = []
    side = images.short_side.median
    if side > MOST_SHRUNK * crop:
        lines.append(
            f"half of the images have a short side of {side:,} px or more, and crops are {crop} px: the encoder sees "
            f"them at 1/{side // crop} of their size, and small things vanish. Larger crops (image_size={2 * crop}) "
            "cost time; smaller pieces at full size are cut by views.global_crops.scale=[0.02,0.2]"
        )
    lost = depth_warning(images.bits_stored, images.largest_level, bits)
    if lost is not None:
        lines.append(lost)
    elif images.bits_stored == 16 and images.bits_used < 16:
        lines.append(
            f"the files have 16 bits a channel and use {images.bits_used} of them (largest level "
            f"{images.largest_level:,}); no level is lost, and packing has measured mean and deviation"
        )
    for count, number in images.channels.items():
        told = f"{number} of {images.looked_at} have {counted(count, 'channel')}"
        if count != channels and {count, channels} <= {1, 3}:
            lines.append(f"images become {'RGB' if channels == 3 else 'grey'}: {told}")
        elif count != channels:
            lines.append(f"{told}, which a run of {channels} cannot use: each counts as a bad image; pack them apart")
    return lines


def _pixels(images: ImagesSummary) -> tuple[dict[str, Any], list[str]]:
    kinds = sorted(images.channels)
    channels = (
        kinds[0]
        if len(kinds) == 1
        else 3
        if set(kinds) <= {1, 3}
        else max(images.channels, key=lambda n: images.channels[n])
    )
    settings = {"data.channels": channels, "data.bits": images.bits_stored}
    named = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    return settings, [f"{named}, {images.bits_stored} bits a channel: as the files are"]


def _colours(images: ImagesSummary, channels: int) -> tuple[dict[str, Any], str]:
    """DINO's own crops where the images differ enough for them; else those of the preset, without colour operations."""
    if channels != 3:
        return {}, "crops without colour operations, as those are made for RGB"
    differ = f"the images' mean levels differ by {images.tone_spread:.3f} of white (deviation)"
    if images.tone_spread < LEAST_TONE_SPREAD:
        return {}, f"crops without colour operations, which would hide what tells the images apart: {differ}"
    crops = {f"views.{view}.{key}": value for view, its in _DINO_CROPS.items() for key, value in its.items()}
    return crops, f"crops with DINO's colour operations and shares: {differ}"


def _crop_and_patch(side: int, device: Device, patch: int | None) -> tuple[int, int]:
    side = min(max(side, 32), LARGEST_CROP[device])
    patch = patch or (16 if side >= 160 else 8 if side >= 64 else 4)
    return max(side // patch, 1) * patch, patch


def _batch(number: int, largest: int, world_size: int) -> int:
    """A power of two that leaves some batches an epoch, made a multiple of the ranks."""
    wanted = max(number // BATCHES_AN_EPOCH, min(number, 2), 1)
    batch = min(1 << (wanted.bit_length() - 1), largest)
    return max(batch // world_size, 1) * world_size


def _epochs(number: int, device: Device) -> int:
    least, most = EPOCHS[device]
    return min(max(round(SAMPLES[device] / number), least), most)
