"""BEiT's two views on one core: 224 px for the encoder, 112 px for the tokenizer, against PIL and torchvision v1.

`--data SHARDS` takes other photos than the built-in ones.
"""

from __future__ import annotations

import random

import torch
from _compare import compare
from _pipelines import bench_shards, loader_rows, one_by_one
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as tv

from data_pipelines.transforms.config import Crop, TargetCrop, Views

BEIT = Views(
    global_crops=(Crop(size=224, scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0)),), target_crop=TargetCrop(size=112)
)
JITTER = transforms.ColorJitter(0.4, 0.4, 0.4)
NORMALISE = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])


def recipe(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """microsoft/unilm: beit/datasets.py, DataAugmentationForBEiT."""
    image = JITTER(image)
    image = tv.hflip(image) if random.random() < 0.5 else image
    box = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    patches = tv.resized_crop(image, *box, [224, 224], transforms.InterpolationMode.BICUBIC)
    tokens = tv.resized_crop(image, *box, [112, 112], transforms.InterpolationMode.LANCZOS)
    return NORMALISE(patches), tv.to_tensor(tokens)


def main() -> None:
    torch.set_num_threads(1)
    with bench_shards() as dataset:
        contents = [dataset.read(sample).image for sample in range(128)]
        theirs = one_by_one(contents, recipe)

        ours = loader_rows(dataset, BEIT, rows=len(contents))
        compare("BEiT's two views, one core", "images", len(contents), ours, theirs, target=3)


if __name__ == "__main__":
    main()
