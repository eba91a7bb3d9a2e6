"""Shards to batches of 64 on two cores, DINO's multi-crop of 2 x 224 and 8 x 96 px: the whole path.

Against WebDataset, the recipe as its authors run it (PIL, torchvision v1, float out) and a DataLoader of two workers;
against the same with albumentations in 8 bits, where `pip install "albumentations<2"` was run; and two of our threads
against one. `--data SHARDS` takes other photos than the built-in ones.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import webdataset as wds
from _compare import compare
from _pipelines import bench_shards, loader_rows
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.transforms.config import Crop, LocalCrops, Views

ROWS, BATCH, WORKERS = 512, 64, 2
COLOUR = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
DINO = Views(
    global_crops=(
        Crop(size=224, scale=(0.4, 1.0), blur=1.0, **COLOUR),
        Crop(size=224, scale=(0.4, 1.0), blur=0.1, solarise=0.2, **COLOUR),
    ),
    local_crops=LocalCrops(size=96, count=8, scale=(0.05, 0.4), blur=0.5, **COLOUR),
)


class Blur:
    """facebookresearch/dino: utils.py, GaussianBlur."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, image: Image.Image) -> Image.Image:
        blurred = random.random() <= self.share
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if blurred else image


class Solarise:
    """facebookresearch/dino: utils.py, Solarization."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < 0.2 else image


def chain(size: int, scale: tuple[float, float], *after: Any) -> Callable[[Image.Image], torch.Tensor]:
    """facebookresearch/dino: main_dino.py, DataAugmentationDINO."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(p=0.5),
            jitter,
            transforms.RandomGrayscale(p=0.2),
            *after,
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


class Authors:
    """JPEG bytes to ten float crops."""

    def __init__(self) -> None:
        self.views = [chain(224, (0.4, 1.0), Blur(1.0)), chain(224, (0.4, 1.0), Blur(0.1), Solarise())]
        self.views += [chain(96, (0.05, 0.4), Blur(0.5))] * 8

    def __call__(self, content: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        return [view(image) for view in self.views]


class Albumentations:
    """JPEG bytes to ten crops in 8 bits, by OpenCV."""

    def __init__(self) -> None:
        import albumentations
        import cv2

        cv2.setNumThreads(0)
        self.views = []
        for size, scale, blur, solarise in [
            (224, (0.4, 1.0), 1.0, 0.0),
            (224, (0.4, 1.0), 0.1, 0.2),
            *[(96, (0.05, 0.4), 0.5, 0.0)] * 8,
        ]:
            operations = [
                albumentations.RandomResizedCrop(size=(size, size), scale=scale, interpolation=cv2.INTER_CUBIC),
                albumentations.HorizontalFlip(p=0.5),
                albumentations.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
                albumentations.ToGray(p=0.2),
                albumentations.GaussianBlur(blur_limit=(3, 9), sigma_limit=(0.1, 2.0), p=blur),
                albumentations.Solarize(threshold=128, p=solarise),
            ]
            self.views.append(albumentations.Compose(operations))
        self.cv2 = cv2

    def __call__(self, content: bytes) -> list[torch.Tensor]:
        pixels = self.cv2.imdecode(np.frombuffer(content, np.uint8), self.cv2.IMREAD_COLOR)
        pixels = self.cv2.cvtColor(pixels, self.cv2.COLOR_BGR2RGB)
        return [torch.from_numpy(view(image=pixels)["image"]).permute(2, 0, 1) for view in self.views]


def stock(dataset: Dataset, augment: Callable[[bytes], list[torch.Tensor]]) -> Callable[[], None]:
    """WebDataset and DataLoader. Its workers stay, but prepare nothing between calls, when we are timed."""
    shards = [str(shard) for shard in dataset.shards]
    samples = wds.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None).repeat().shuffle(100)
    batches = samples.to_tuple("jpg", "cls").map_tuple(augment, int).with_epoch(ROWS // WORKERS)
    loader = DataLoader(batches, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)

    def call() -> None:
        assert sum(len(labels) for _, labels in loader) == ROWS

    return call


def main() -> None:
    torch.set_num_threads(1)
    with bench_shards() as dataset:
        ours = loader_rows(dataset, DINO, rows=ROWS, threads=WORKERS)
        for name, make, target in (("albumentations, uint8", Albumentations, 1.8), ("the authors' recipe", Authors, 8)):
            try:
                theirs = stock(dataset, make())
            except ImportError:
                print(f"against {name}: left out, it is not installed")
                continue
            compare(f"shards to batches, against {name}", "images", ROWS, ours, theirs, turns=3, target=target)
            del theirs
        one = loader_rows(dataset, DINO, rows=ROWS, threads=1)
        compare("two threads against one", "images", ROWS, ours, one, target=1.8)


if __name__ == "__main__":
    main()
