"""A frozen encoder as it is run on a data set: crops in, rows of features and perhaps patch tokens out, in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from eval.base import Change
from eval.store.layout import Layout, layout, rows_of
from eval.store.precision import Arithmetic

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from pretrain.encoders import Encoder, Features


@dataclass(frozen=True)
class Crops:
    """Centre crops of `size` px, as `center_crops` makes them, normalised by mean and std of pixels in 0 .. 1; of
    stacks those of several `frames`, see `Frames`."""

    size: int
    channels: int
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 1
    frame_stride: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; those of images say nothing of frames."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.frames == 1:
            del plain["frames"], plain["frame_stride"]
        return plain


class Batch(NamedTuple):
    """Features of b images.

    rows: (b, dim) float32. tokens: (b, t, d) float32, where they were asked for. labels: (b,) int64, -1 where unknown.
    samples: (b,) int64 numbers in the data set. digests: (b,) int64, equal where the pixels of the crops are.
    """

    rows: np.ndarray
    tokens: np.ndarray | None
    labels: np.ndarray
    samples: np.ndarray
    digests: np.ndarray


class FrozenEncoder:
    """An encoder in evaluation mode on its device.

    layout: of its rows, found on one image.
    """

    def __init__(
        self,
        encoder: Encoder,
        crops: Crops,
        *,
        device: torch.device | str = "cpu",
        arithmetic: Arithmetic = "fp32",
        last_blocks: int = 4,
        tokens: bool = False,
    ) -> None:
        """Of the `last_blocks` those count whose width is that of the output: in a pyramid that is the last stage.

        Raises ValueError where tokens are asked for and do not form a map of the image.
        """
        self.encoder, self.crops, self.device = encoder.eval().to(device), crops, torch.device(device)
        self.arithmetic, self.with_tokens = arithmetic, tokens
        self._shift, self._scale = (
            repeat(torch.tensor(values, device=device), "c -> 1 (t c) 1 1", t=crops.frames)
            for values in (crops.mean, crops.std)
        )
        self._earlier = tuple(range(-min(last_blocks, len(encoder.blocks())), -1))
        planes = crops.channels * crops.frames
        noise = torch.randn(1, planes, crops.size, crops.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():  # in fp32: which of the outputs are the same is not for rounding to say
            self.layout: Layout = layout(self.encoder(noise.to(device), layers=self._earlier))
        if tokens and self.layout.grid is None:
            raise ValueError("this encoder's patch tokens form no map of the image, so that none can be kept")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, dim) rows and perhaps (b, t, d) tokens, float32 on the CPU, of (b, c, h, w) uint8 or uint16 crops."""
        # integers until here: a quarter of the transfer
        pixels = images.to(self.device, non_blocking=True).float().div_(torch.iinfo(images.dtype).max)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arithmetic == "bf16"):
            features: Features = self.encoder(pixels.sub_(self._shift).div_(self._scale), layers=self._earlier)
        tokens = features.tokens.float().cpu() if self.with_tokens else None
        return rows_of(features, self.layout).cpu(), tokens

    def batches(
        self, dataset: Dataset, samples: Sequence[int] | np.ndarray, batch_size: int = 256, change: Change | None = None
    ) -> Iterator[Batch]:
        """The features of these samples, in their order; those that cannot be read are left out, logged.

        `change`: what is done to the crops before they are normalised; the digests are of what they were before.
        """
        from data_pipelines.eval_loader import center_crops

        crops = self.crops
        for images, labels, numbers in center_crops(
            dataset, crops.size, batch_size=batch_size, channels=crops.channels, bits=crops.bits, samples=samples,
            frames=crops.frames, frame_stride=crops.frame_stride,
        ):  # fmt: skip
            digests = digests_of(images.numpy())
            rows, tokens = self(images if change is None else change(images, numbers))
            yield Batch(
                rows.numpy(),
                None if tokens is None else tokens.numpy(),
                labels.numpy(),
                numbers.numpy(),
                digests,
            )


def digests_of(images: np.ndarray) -> np.ndarray:
    """(b,) int64, of each image's pixels; a fraction of the time of decoding them."""
    found = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images)
    return np.array([int.from_bytes(digest, "big", signed=True) for digest in found], dtype=np.int64)


def encoder_digest(encoder: Encoder, architecture: dict[str, Any]) -> str:
    """SHA-256 of an encoder's weights, of their names and shapes, and of what it is built like."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, value in encoder.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def unreadable(dataset: Dataset, channels: int, number: int) -> str:
    """What is wrong with a data set of which none of this `number` of images can be read."""
    return (
        f"none of the {number} samples can be read as an image of {channels} channels, as the encoder "
        f"takes them; `selfsight verify {dataset.shards[0].parent}` says what they are"
    )
