"""What `selfsight probe TARGET` names: an encoder, how its images are normalised, and where results belong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from eval.sliding import Sliding
from pretrain.config import EncoderConfig
from pretrain.encoder_folder import TIMM_PREFIX, find_encoder
from pretrain.encoders import Encoder
from pretrain.encoders.load import load_any
from pretrain.text.saved import TextSide, has_text, load_text


@dataclass(frozen=True)
class Target:
    """An encoder to probe.

    image_size: side in px of the square crops that are probed.
    headline: the feature the headline k-NN reads; None: the model's own pooled feature.
    fresh: builds the same encoder untrained, its weights drawn from torch's current seed.
    architecture: JSON values that say which encoder `fresh` builds.
    run: the run folder the encoder came from, where it came from one.
    trained_size: height and width of the images that it was trained on. window: side of the windows in px that slide
        over larger images, where they do. native: whether images keep their own shape, see `eval.store.encoding.Crops`.
    """

    name: str
    encoder: Encoder
    fresh: Callable[[], Encoder]
    architecture: dict[str, Any]
    image_size: int
    channels: int
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    headline: str | None
    method: str
    step: int | None
    epoch: float | None
    run: Path | None
    results: Path
    trained_size: tuple[int, int]
    window: int | None = None
    frames: int = 1  # of a stack, see `Frames`
    frame_stride: int | None = None
    native: bool = False
    text: TextSide | None = None  # of an encoder that learned from captions

    @property
    def most_patches(self) -> int:
        """Of an image at its own shape: as many as a square of `image_size` has."""
        return int((self.image_size // self.encoder.patch) ** 2)

    def how_larger(self) -> str | None:
        """How images of another size than the encoder's are seen, in words; None of its own size."""
        if self.native:
            return f"images are seen whole and at their own shape, in at most {self.most_patches} patches"
        if (self.image_size, self.image_size) == self.trained_size:
            return None
        height, width = self.trained_size
        if self.window is None:
            return f"crops of {self.image_size} px are seen whole, by an encoder trained on {width}x{height} px"
        return (
            f"crops of {self.image_size} px are seen through windows of {self.window} px, as the encoder was trained "
            "on, at steps of half a window; what several say of a patch is averaged, and so are a linear layer's logits"
        )

    def untrained(self, seed: int) -> Encoder:
        """The same encoder with the fresh weights of `seed`; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.fresh()


def open_target(target: str, image_size: int | None = None, windows: bool = False, native: bool = False) -> Target:
    """What TARGET names: a run folder (its final encoder, or else its latest checkpoint's), a checkpoint, an encoder
    folder, an exported .safetensors file, or timm:NAME.

    `image_size` is the side of the images to probe, by default what the encoder was trained on. `windows`: larger ones
    are seen through windows of the size that it was trained on, see `Sliding`. `native`: images keep their own shape.

    Raises FileNotFoundError where there is no encoder, saying what there is; ValueError for a name timm does not
    know or that has no weights to load, for a size the encoder cannot take, and for windows over images that are not
    larger than they.
    """
    if native:
        if windows:
            raise ValueError("windows slide over squares, and native images keep their shape; leave out one of them")
        own = open_target(target, image_size)
        if not own.encoder.native:
            raise ValueError(f"{own.name} takes no images of their own shape; leave out native")
        return replace(own, native=True)
    if windows:
        return _with_windows(open_target(target), image_size)
    if target.startswith(TIMM_PREFIX):
        return _open_timm(target.removeprefix(TIMM_PREFIX), image_size)
    from pretrain.encoders.saved import fresh_encoder, load_encoder

    folder = find_encoder(Path(target).expanduser())
    encoder, card = load_encoder(folder)
    config, size, channels = card.encoder, card.image_size, card.channels
    run = run_of(folder)
    if folder.is_file():  # beside it may lie others
        results = folder.parent / "eval" / f"probe-{folder.stem}-{card.step}.json"
    else:
        results = (run or folder) / "eval" / f"probe-{card.step}.json"
    return Target(
        name=card.run,
        encoder=encoder,
        fresh=lambda: fresh_encoder(card),
        architecture={
            "built_for": size,
            "method": card.method,
            **({"frames_of_data": card.frames} if card.frames > 1 else {}),
            **TypeAdapter(EncoderConfig).dump_python(config, mode="json"),
        },
        image_size=_side(image_size, size, encoder.stride),
        channels=channels,
        bits=card.bits,
        mean=tuple(card.mean),
        std=tuple(card.std),
        headline=card.headline,
        method=card.method,
        step=card.step,
        epoch=card.epoch,
        run=run,
        results=results,
        trained_size=size,
        frames=card.frames,
        frame_stride=card.frame_stride,
        text=load_text(folder) if has_text(folder) else None,
    )


def _with_windows(own: Target, image_size: int | None) -> Target:
    """The target on images of `image_size` px, seen through windows of its own size."""
    window = own.image_size
    if image_size is None or image_size <= window:
        told = "none is given" if image_size is None else f"image_size is {image_size}"
        raise ValueError(
            f"windows of {window} px, which the encoder was trained on, slide over larger images, and {told}; give a "
            f"larger one, such as image_size {2 * window}"
        )
    return replace(
        own,
        encoder=Sliding(own.encoder, window),
        fresh=lambda: Sliding(own.fresh(), window),
        architecture={**own.architecture, "windows": window},
        image_size=_side(image_size, (window, window), own.encoder.stride),
        window=window,
    )


def run_of(encoder_folder: Path) -> Path | None:
    """The run folder of RUN/encoder or RUN/checkpoints/step-N/encoder; None for an encoder that stands alone."""
    parents = encoder_folder.resolve().parents
    for candidate in (parents[0], parents[2] if len(parents) > 2 else parents[0]):
        if (candidate / "config.yaml").is_file():
            return candidate
    return None


def _side(wanted: int | None, trained: tuple[int, int], stride: int) -> int:
    """The side of the square crops: as asked, or as the encoder was trained."""
    if wanted is None and trained[0] != trained[1]:
        raise ValueError(
            f"the encoder was trained on {trained[0]}x{trained[1]} px and a probe crops squares; "
            f"give image_size, such as {min(trained)}"
        )
    side = wanted or trained[0]
    if side < stride or side % stride:
        below = max(side // stride, 1) * stride
        raise ValueError(
            f"image_size is {side}; the encoder's stride is {stride} px, so it must be a multiple of that, "
            f"such as {below} or {below + stride}"
        )
    return side


def _open_timm(name: str, image_size: int | None) -> Target:
    from pretrain.encoders.timm.encoder import TimmEncoder

    size = None if image_size is None else (image_size, image_size)
    loaded = load_any(TIMM_PREFIX + name, size)
    return Target(
        name=f"timm:{name}",
        encoder=loaded.encoder,
        fresh=lambda: TimmEncoder(name, pretrained=False, image_size=size),
        architecture={"timm": name, "built_for": loaded.image_size},
        image_size=_side(image_size, loaded.image_size, 1),
        channels=loaded.channels,
        bits=8,
        mean=loaded.mean,
        std=loaded.std,
        headline=None,
        method="timm",
        step=None,
        epoch=None,
        run=None,
        results=Path("probes") / f"{name}.json",
        trained_size=loaded.image_size,
    )
