"""A frozen encoder as it is run on a data set: crops in, rows of features and perhaps patch tokens out, in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from eval.base import Change
from eval.store.layout import Layout, layout, rows_of
from eval.store.precision import Arithmetic
from pretrain.encoders.base import Features
from pretrain.encoders.native import PackedFeatures, PackedImages, lengths_of, mean_of_each, sequences
from pretrain.encoders.patches import patchify

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from pretrain.encoders import Encoder

#: Of a sequence of images at their own shape.
MOST_TOKENS = 8192


@dataclass(frozen=True)
class Crops:
    """Centre crops of `size` px, as `center_crops` makes them, normalised by mean and std of pixels in 0 .. 1; of
    stacks those of several `frames`, see `Frames`.

    native: whole images at their own shape instead, of at most as many patches as such a square has.
    """

    size: int
    channels: int
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frames: int = 1
    frame_stride: int | None = None
    native: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; those of images say nothing of frames."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        if self.frames == 1:
            del plain["frames"], plain["frame_stride"]
        if not self.native:
            del plain["native"]
        return plain


class Batch(NamedTuple):
    """Features of b images.

    rows: (b, dim) float32. tokens: (b, t, d) float32, where they were asked for; of images at their own shape (t, d),
    one image's behind the other's. labels: (b,) int64, -1 where unknown. samples: (b,) int64 numbers in the data set.
    digests: (b,) int64, equal where the pixels of the crops are. grids: (b, 2) int64 rows and columns of the tokens of
    each image at its own shape.
    """

    rows: np.ndarray
    tokens: np.ndarray | None
    labels: np.ndarray
    samples: np.ndarray
    digests: np.ndarray
    grids: np.ndarray | None = None


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
        if crops.native:
            if change is not None:
                raise ValueError("corruptions are of crops of one size, and these images keep their own shape")
            yield from self._whole(dataset, samples, batch_size)
            return
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

    def _whole(self, dataset: Dataset, samples: Sequence[int] | np.ndarray, batch_size: int) -> Iterator[Batch]:
        """`batches` of images at their own shape."""
        from data_pipelines.eval_loader import whole_images

        crops, patch = self.crops, self.encoder.patch
        tokens = (crops.size // patch) ** 2
        for images, labels, numbers in whole_images(
            dataset, tokens, patch, batch_size=batch_size, channels=crops.channels, bits=crops.bits, samples=samples
        ):
            rows, kept = self.of_images([torch.from_numpy(image) for image in images])
            digests = np.concatenate([digests_of(image[None]) for image in images])
            grids = np.array([image.shape[1:] for image in images], dtype=np.int64) // patch
            yield Batch(
                rows.numpy(), None if kept is None else kept.numpy(), labels.numpy(), numbers.numpy(), digests, grids
            )

    @torch.no_grad()
    def of_images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(b, dim) rows and perhaps (t, d) tokens, float32 on the CPU, of images (c, h, w) of any sides that are
        multiples of the patch; as many in a sequence as make up to `MOST_TOKENS`."""
        patch, rows, tokens = self.encoder.patch, [], []
        grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
        for group in sequences(lengths_of(grids), MOST_TOKENS):
            parts = []
            for number in group:
                pixels = images[number][None].to(self.device, non_blocking=True).float()
                pixels = pixels.div_(torch.iinfo(images[number].dtype).max).sub_(self._shift).div_(self._scale)
                parts.append(patchify(pixels, patch)[0])
            packed = PackedImages(torch.cat(parts), tuple(grids[number] for number in group))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arithmetic == "bf16"):
                features: PackedFeatures = self.encoder(packed, layers=self._earlier)
            rows.append(rows_of(summarised(features), self.layout).cpu())
            if self.with_tokens:
                tokens.append(features.tokens.float().cpu())
        return torch.cat(rows), torch.cat(tokens) if tokens else None


def summarised(features: PackedFeatures) -> Features:
    """Features whose only patch token is the mean of each image's (b, 1, d)."""
    mean = rearrange(mean_of_each(features.tokens, features.lengths), "b d -> b 1 d")
    layers = tuple(summarised(layer) for layer in features.layers)
    return Features(mean, features.prefix_tokens, None, None, features.pooled, layers)


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
