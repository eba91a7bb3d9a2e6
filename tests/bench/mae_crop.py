"""MAE's crop on one core: JPEG bytes to 224 px, against PIL and torchvision's v1 transforms to float tensors.

Also four views of each decoded image (`data.repeated_augmentation=4`). `--data SHARDS` takes other photos
than the built-in ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _compare import compare
from _pipelines import bench_shards, loader_rows, one_by_one
from torchvision import transforms

from data_pipelines.transforms.config import Crop, Views

MAE = Views(global_crops=(Crop(size=224, scale=(0.2, 1.0)),))
RECIPE = transforms.Compose(  # facebookresearch/mae: main_pretrain.py
    [
        transforms.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def main() -> None:
    torch.set_num_threads(1)
    with bench_shards() as dataset:
        contents = [dataset.read(sample).image for sample in range(128)]
        theirs = one_by_one(contents, RECIPE)

        def ours(repeats: int) -> Callable[[], None]:
            return loader_rows(dataset, MAE, rows=len(contents), repeats=repeats)

        count = len(contents)
        compare("MAE crop, one core", "images", count, ours(1), theirs, target=2.5)
        compare("MAE crop, four views per decode", "views", count, ours(4), theirs, target=6)


if __name__ == "__main__":
    main()
