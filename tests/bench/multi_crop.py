"""DINO's ten crops (2 x 224 and 8 x 96 px) on one core, decoding included, against the recipe as its authors run it.

Theirs: PIL, torchvision's v1 transforms, float tensors out. Ours: the backends on exactly decoded JPEG, uint8 out, and
the CPU's part where the device does the colours. Beside the pace stands how faithful the same configuration is: PSNR
against PIL and torchvision with the same parameters, median and 5th percentile over crops.

    python tests/bench/multi_crop.py [--data SHARDS] [--turns 7] [--count 64]
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from _photos import jpegs
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as tv

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.jpeg import decode_jpeg
from data_pipelines.transforms.backends import native
from data_pipelines.transforms.backends.base import Backend, CropJob
from data_pipelines.transforms.backends.select import backend
from data_pipelines.transforms.config import Crop, LocalCrops, Views
from data_pipelines.transforms.params import CropParams, draw

COLOURS = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
VIEWS = Views(
    global_crops=(
        Crop(size=224, scale=(0.4, 1), blur=1.0, **COLOURS),
        Crop(size=224, scale=(0.4, 1), blur=0.1, solarise=0.2, **COLOURS),
    ),
    local_crops=LocalCrops(size=96, scale=(0.05, 0.4), count=8, blur=0.5, **COLOURS),
)


class Blur:
    """facebookresearch/dino, utils.py: PIL's Gaussian blur of a radius from .1 to 2, at times."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.prob:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class Solarise:
    """The same file: PIL's solarisation, at times."""

    def __init__(self, prob: float) -> None:
        self.prob = prob

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.prob else image


def authors_recipe() -> Callable[[bytes], list[torch.Tensor]]:
    """facebookresearch/dino, main_dino.py: DataAugmentationDINO at its defaults, with the decoding before it."""
    colours = [
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
    ]
    finish = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

    def crop(
        size: int, scale: tuple[float, float], *others: Callable[[Image.Image], Image.Image]
    ) -> transforms.Compose:
        resized = transforms.RandomResizedCrop(size, scale=scale, interpolation=Image.Resampling.BICUBIC)
        return transforms.Compose([resized, *colours, *others, *finish])

    recipe = [
        crop(224, (0.4, 1.0), Blur(1.0)),
        crop(224, (0.4, 1.0), Blur(0.1), Solarise(0.2)),
        *[crop(96, (0.05, 0.4), Blur(0.5))] * 8,
    ]

    def run(content: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return [transform(image) for transform in recipe]

    return run


class Side(NamedTuple):
    """One of our ways."""

    name: str
    backend: Backend
    padded: bool  # how the JPEG is decoded for it
    colours: bool
    target: float


def sides() -> list[Side]:
    made = [Side("wheels only", backend("opencv"), False, True, 4.5)]
    if native.BUILT:
        made.append(Side("native", backend("native"), True, True, 8))
        made.append(Side("native, colours left to the device", backend("native"), True, False, 10))
    return made


def outputs() -> list[np.ndarray]:
    """What a row of the loader's buffers has, used again for every image."""
    return [*np.zeros((2, 3, 224, 224), np.uint8), *np.zeros((8, 3, 96, 96), np.uint8)]


def make(side: Side, content: bytes, number: int, outs: list[np.ndarray]) -> tuple[np.ndarray, list[CropJob]]:
    """Decode one image and make its crops."""
    picture = decode_jpeg(content, 3, padded=side.padded)
    assert picture is not None
    params = draw(VIEWS, (0, number), picture.pixels.shape[:2])
    if not side.colours:
        params = tuple(CropParams(crop.box, crop.flip) for crop in params)
    jobs = [CropJob(crop, "bicubic", out) for crop, out in zip(params, outs, strict=True)]
    side.backend(picture.pixels, jobs)
    return picture.pixels, jobs


def fidelity(side: Side, contents: list[bytes]) -> tuple[float, float]:
    """PSNR against PIL with the same pixels and parameters in dB: median and 5th percentile."""
    values = []
    outs = outputs()
    for number, content in enumerate(contents):
        _, jobs = make(side, content, number, outs)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        for job in jobs:
            expected = np.asarray(authors_crop(image, job.params, job.out.shape[1:]), dtype=float)
            error = np.square(np.moveaxis(job.out, 0, -1) - expected).mean()
            values.append(10 * np.log10(255**2 / max(error, 1e-3)))
    return float(np.median(values)), float(np.percentile(values, 5))


def authors_crop(image: Image.Image, params: CropParams, size: tuple[int, ...]) -> Image.Image:
    """torchvision's v1 functions on a PIL image, with given parameters."""
    left, top, right, bottom = (int(side) for side in params.box)
    bicubic = transforms.InterpolationMode.BICUBIC
    image = tv.resized_crop(image, top, left, bottom - top, right - left, list(size), bicubic)
    image = tv.hflip(image) if params.flip else image
    for name, factor in params.jitter:
        image = getattr(tv, f"adjust_{name}")(image, factor)
    image = tv.to_grayscale(image, 3) if params.grayscale else image
    if params.blur_radius is not None:
        image = image.filter(ImageFilter.GaussianBlur(params.blur_radius))
    return ImageOps.solarize(image) if params.solarise else image


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards to take instead of built-in photos")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--count", type=int, default=64, help="images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data:
        with open_dataset(arguments.data) as dataset:
            contents = [dataset.read(number).image for number in range(arguments.count)]
        contents = [content for content in contents if decode_jpeg(content, 3) is not None]
    else:
        contents = jpegs(arguments.count)
    theirs = authors_recipe()

    def run_theirs() -> None:
        for content in contents:
            theirs(content)

    def run(side: Side, part: slice = slice(None)) -> None:
        outs = outputs()
        for number, content in list(enumerate(contents))[part]:
            make(side, content, number, outs)

    ours = sides()
    for side in ours:
        run(side)
    times: dict[str, list[float]] = {}
    with ThreadPoolExecutor(2) as pool:

        def two_threads(side: Side) -> None:
            list(pool.map(lambda first: run(side, slice(first, None, 2)), range(2)))

        for _ in range(arguments.turns):
            times.setdefault("theirs", []).append(seconds(run_theirs))
            for side in ours:
                times.setdefault(side.name, []).append(seconds(lambda side=side: run(side)))  # type: ignore[misc]
                times.setdefault(f"{side.name}, two threads", []).append(
                    seconds(lambda side=side: two_threads(side))  # type: ignore[misc]
                )
    median = {name: statistics.median(measured) for name, measured in times.items()}
    size = statistics.mean(len(content) for content in contents) / 1000
    print(f"{len(contents)} images of {size:.0f} KB; theirs {len(contents) / median['theirs']:.0f} images/s")
    for side in ours:
        one, two = median[side.name], median[f"{side.name}, two threads"]
        middle, low = fidelity(side, contents[:24])
        print(
            f"{side.name}: {len(contents) / one:.0f} images/s = {median['theirs'] / one:.2f} x"
            f" (target {side.target:g} x); two threads {one / two:.2f} x one (target 1.8 x);"
            f" PSNR {middle:.1f} dB, 5th percentile {low:.1f} dB",
            flush=True,
        )


if __name__ == "__main__":
    main()
