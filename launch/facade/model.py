"""A pretrained encoder, with what turns an image into its input."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from torch import Tensor

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.eval_loader import cropped
from data_pipelines.images.decode import DAMAGE, TURNS, BadSampleError, decode, orientation_of
from data_pipelines.images.sample import Sample
from data_pipelines.packing.scan import scan
from data_pipelines.packing.sources.opening import open_source
from data_pipelines.packing.spec import holds_images
from eval.probe import device_named
from eval.store.layout import layout, rows_of
from eval.target import open_target

from .features import Embedding

if TYPE_CHECKING:
    from PIL.Image import Image

    from pretrain.encoders import Encoder

_SPLITS = ("train", "val", "test")
#: Of Pillow's modes, those that a PNG cannot hold, and what holds the same.
_AS_PNG = {
    **dict.fromkeys(("CMYK", "YCbCr", "HSV", "LAB", "RGBX"), "RGB"),
    **dict.fromkeys(("PA", "RGBa"), "RGBA"),
    "La": "LA",
}


def load(target: str | Path, *, image_size: int | None = None, device: str = "auto") -> Model:
    """The encoder that `target` names: a run, a checkpoint, an imported or exported folder or .safetensors file, or
    `timm:NAME`.

    Args:
        target: See above.
        image_size: Side in px of its images; default: what it was trained on.
        device: `cpu`, `cuda`, one GPU of several as `cuda:1`, or `auto`: a GPU where there is one.

    Raises:
        FileNotFoundError: There is no encoder; the message says what there is.
        ValueError: A name that timm does not know, a size that the encoder cannot take, or a device that is not here.
    """
    device = device_named(device)
    found = open_target(str(target), image_size)
    transform = Transform(found.image_size, found.channels, found.bits, found.mean, found.std)
    return Model(found.name, found.encoder.eval().to(device), transform, found.headline, device)


@dataclass(frozen=True)
class Transform:
    """From an image to an encoder's input, as probes do it: short side to 256/224 of `size`, centre crop, normalised.

    mean, std: a value a channel, of pixels in 0 .. 1 of their full depth.
    """

    size: int
    channels: int
    bits: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: str | Path | bytes | np.ndarray | Image) -> Tensor:
        """(c, size, size) float32 of a file, its bytes, a Pillow image, or an array (h, w) or (h, w, c) of uint8 or
        uint16.

        A Pillow image becomes what its file would: turned upright as its EXIF says, transparent pixels black; the
        levels of mode I are 16 bits.

        Raises ValueError for what is no image, has other channels than the encoder takes, or levels whose full scale
        is not known: Pillow's mode F, or I beyond 16 bits.
        """
        return self.normalise(torch.from_numpy(self.crop(_encoded(image)))[None])[0]

    def crop(self, content: bytes, name: str = "image") -> np.ndarray:
        """(c, size, size) uint8 or uint16, not normalised, of an image file's bytes; BadSampleError for a bad one."""
        return cropped(decode(Sample(name, Path(), content, None), self.channels, self.bits), self.size)

    def normalise(self, crops: Tensor) -> Tensor:
        """(b, c, h, w) uint8 or uint16 to float32 as the encoder takes it, on the same device."""
        mean, std = (
            rearrange(torch.tensor(value, device=crops.device), "c -> 1 c 1 1") for value in (self.mean, self.std)
        )
        return crops.float().div_(torch.iinfo(crops.dtype).max).sub_(mean).div_(std)


class Model:
    """A frozen encoder.

    transform: from an image to its input.
    encoder: the module; `encoder(images)` of (b, c, h, w) float32 has `tokens` (b, n, d) and `pooled` (b, d).
    feature: what `embed` gives unless another is asked for, such as `class` or `mean`; None: the pooled feature.
    """

    def __init__(self, name: str, encoder: Encoder, transform: Transform, feature: str | None, device: str) -> None:
        self.name, self.encoder, self.transform, self.feature, self.device = name, encoder, transform, feature, device

    def __repr__(self) -> str:
        size, channels = self.transform.size, self.transform.channels
        return f"Model({self.name!r}, images of {channels} x {size} x {size}, on {self.device})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(b, d) pooled features of (b, c, h, w) float32 images, as `transform` makes them."""
        pooled: Tensor = self.encoder(images.to(self.device)).pooled
        return pooled

    def embed(
        self,
        data: str | Path,
        *,
        split: str | None = None,
        feature: str | None = None,
        batch_size: int = 64,
        say: Callable[[str], None] = print,
    ) -> Embedding:
        """Features of all images of a folder (or of what else `selfsight pack` takes), or of shards; writes nothing.

        Args:
            data: Images, or a folder of shards.
            split: Only of this one; default: of all there are.
            feature: `class`, `mean`, `class + mean`, `pooled` and so on; default: the model's own.
            batch_size: Images at a time.
            say: Gets a line on images that cannot be read, which are left out.

        Raises:
            FileNotFoundError: There is no image, or no such split.
            ValueError: No image can be read, or the encoder has no such feature.
        """
        rows = _of_images(data, split) if holds_images(data) else _of_shards(data, split)
        classes = next(rows)
        values: list[np.ndarray] = []
        beside: list[tuple[str, int, str]] = []
        crops: list[np.ndarray] = []
        bad: list[str] = []
        chosen = feature or self.feature
        told = ""

        def forward() -> None:
            nonlocal told
            batch, name = self._features(np.stack(crops), chosen)
            told = name
            values.append(batch)
            crops.clear()

        for key, label, of_split, content in rows:
            try:
                crops.append(self.transform.crop(content(), key))
            except (*DAMAGE, BadSampleError) as error:
                bad.append(str(error))
                continue
            beside.append((key, label, of_split))
            if len(crops) == batch_size:
                forward()
        if crops:
            forward()
        if bad:
            say(f"{len(bad):,} images are left out, as they cannot be read; the first: {bad[0]}")
        if not values:
            raise ValueError(f"none of the images of {data} can be read" + (f"; the first: {bad[0]}" if bad else ""))
        keys, labels, splits = zip(*beside, strict=True)
        return Embedding(
            np.concatenate(values), np.array(keys), np.array(labels, dtype=np.int64), np.array(splits), classes, told
        )

    @torch.no_grad()
    def _features(self, crops: np.ndarray, chosen: str | None) -> tuple[np.ndarray, str]:
        """(b, d) float32 of (b, c, h, w) crops, and which feature it is."""
        images = self.transform.normalise(torch.from_numpy(crops).to(self.device))
        found = self.encoder(images)
        named = layout(found)
        chosen = named.pooled_as if chosen is None or (chosen == "pooled" and chosen not in named.inputs) else chosen
        if chosen not in named.inputs:
            raise ValueError(f"feature is {chosen!r}; this encoder has {', '.join(named.inputs)}")
        return named.views(rows_of(found, named).cpu())[chosen].numpy(), chosen


def _encoded(image: Any) -> bytes:
    """An image's file, or a lossless one made of its pixels."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, Path)):
        return Path(image).expanduser().read_bytes()
    file = io.BytesIO()
    if isinstance(image, PIL.Image.Image):
        turn = TURNS.get(orientation_of(image))
        image = image if turn is None else image.transpose(turn)
        if image.mode == "I;16" or not image.mode.startswith(("I", "F")):
            image = image.convert(_AS_PNG[image.mode]) if image.mode in _AS_PNG else image
            image.save(file, "PNG")
            return file.getvalue()
        image = _levels(image)
    np.save(file, np.asarray(image))
    return file.getvalue()


def _levels(image: Image) -> np.ndarray:
    """(h, w) uint16 of a Pillow image of whole numbers; ValueError where that does not hold them."""
    levels = np.asarray(image)
    advice = "give an array of uint8 (0 .. 255) or uint16 (0 .. 65535), scaled as the images that it was trained on"
    if image.mode == "F":
        raise ValueError(f"an image of Pillow's mode F does not say which level is white; {advice}")
    if levels.size and not 0 <= levels.min() <= levels.max() <= 65535:
        raise ValueError(
            f"an image of Pillow's mode {image.mode} has levels {levels.min()} .. {levels.max()}; {advice}"
        )
    return levels.astype(np.uint16)


def _of_images(data: str | Path, split: str | None) -> Iterator[Any]:
    """The names of the classes; then key, label, split and a function that gives the bytes, for each image."""
    with tempfile.TemporaryDirectory() as spool:
        source = open_source(data, Path(spool))
        try:
            catalogue = scan(source)
            yield catalogue.classes
            if split is not None and split not in catalogue.splits:
                raise FileNotFoundError(f"{data} has no split {split!r}; it has {', '.join(catalogue.splits)}")
            for name, members in catalogue.splits.items():
                if split not in (None, name):
                    continue
                numbers = members.tolist()
                for number, content in zip(numbers, source.contents(numbers), strict=True):
                    path = source.listing.entry(number).path
                    yield path, int(catalogue.labels[number]), name, lambda content=content: content().image
        finally:
            source.close()


def _of_shards(data: str | Path, split: str | None) -> Iterator[Any]:
    """The same of shards."""
    folder = Path(data).expanduser()
    there = [name for name in _SPLITS if folder.is_dir() and any(folder.glob(f"{name}-*.tar"))]
    wanted = [split] if split is not None else there or ["train"]
    datasets = {name: open_dataset(data, name) for name in wanted}
    yield next(iter(datasets.values())).classes
    for name, dataset in datasets.items():
        with dataset:
            for number in range(dataset.num_samples):
                sample = dataset.read(number)
                yield sample.key, int(dataset.labels[number]), name, lambda sample=sample: sample.image
