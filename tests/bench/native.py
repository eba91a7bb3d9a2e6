"""Images at their own shape in one sequence, against padding them to the largest of the batch and against squares; and
how evenly their patches fall over ranks.

A training step's forward and backward pass of one NaViT on the same batches, timed in turns. Areas are drawn as in
training, shapes are those of the images: of `--data SHARDS`, by default of seven aspect ratios from 1:2 to 2:1. A
padded image costs as many patches as the batch's largest height and width, a square `--tokens` of them; what is in the
pixels does not matter here, and is noise.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from data_pipelines.balance import balanced
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.decode import decode
from data_pipelines.transforms import native_shape
from data_pipelines.transforms.config import Crop, Views
from pretrain.encoders import build_encoder
from pretrain.encoders.native import Grids, PackedImages, lengths_of
from pretrain.encoders.navit.config import NavitConfig

PATCH, SEED = 16, 0
ASPECTS = (1 / 2, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 2.0)  # height / width


def shapes_of(data: str | None, most: int) -> list[tuple[int, int]]:
    """Height and width of images in px."""
    if data is None:
        return [(round(400 * math.sqrt(aspect)), round(400 / math.sqrt(aspect))) for aspect in ASPECTS]
    with open_dataset(data) as dataset:
        return [decode(dataset.read(sample)).shape[:2] for sample in range(min(most, dataset.num_samples))]


def drawn(shapes: list[tuple[int, int]], tokens: int, batch: int, steps: int) -> tuple[np.ndarray, list[Grids]]:
    """Of each step's images the most patches they may have (steps, batch), known before they are read, and the grids
    that they get."""
    views = Views(global_crops=(Crop(shape="native", patch=PATCH, max_tokens=tokens),))
    numbers = np.arange(steps * batch)
    areas = native_shape.tokens_of(views, SEED, 0, 0, numbers, 0)[0].reshape(steps, batch)
    of_image = np.random.default_rng(SEED).integers(len(shapes), size=(steps, batch))
    grids = [
        tuple(native_shape.grid_of(*shapes[image], area) for image, area in zip(*each, strict=True))
        for each in zip(of_image.tolist(), areas.tolist(), strict=True)
    ]
    return areas, grids


def speed(size: str, tokens: int, grids: list[Grids], turns: int) -> None:
    """Print images and patches that come from images, a second, of the three ways."""
    side = math.isqrt(tokens)
    torch.manual_seed(SEED)
    # a table as long as the longest image is high or wide
    longest = max(max(grid) for step in grids for grid in step) * PATCH
    encoder = build_encoder(NavitConfig(size=size, patch=PATCH, positions="fractional"), (longest, longest)).train()

    def batch_of(rows: int, columns: int, images: int) -> Callable[[], torch.Tensor]:
        pixels = torch.randn(images, 3, rows * PATCH, columns * PATCH)
        return lambda: encoder(pixels).pooled

    def packed(step: Grids) -> Callable[[], torch.Tensor]:
        images = PackedImages(torch.randn(sum(lengths_of(step)), 3 * PATCH**2), step)
        return lambda: encoder(images).pooled

    ways: dict[str, list[Callable[[], torch.Tensor]]] = {
        "packed": [packed(step) for step in grids],
        "padded": [batch_of(max(r for r, _ in step), max(c for _, c in step), len(step)) for step in grids],
        "squashed": [batch_of(side, side, len(step)) for step in grids],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, calls in ways.items():
            began = time.perf_counter()
            for call in calls:
                call().square().mean().backward()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    images = sum(map(len, grids))
    own = sum(sum(lengths_of(step)) for step in grids)
    took = {name: statistics.median(times) for name, times in seconds.items()}
    for name, time_of in took.items():
        patches = images * side**2 if name == "squashed" else own
        spread = f"{images / max(seconds[name]):.1f} to {images / min(seconds[name]):.1f}"
        print(f"{name}: {images / time_of:.1f} images/s ({spread}), {patches / time_of:,.0f} patches of images/s")
    for name in ("padded", "squashed"):
        print(f"packed against {name}: {took[name] / took['packed']:.2f} x the images/s")


def balance(areas: np.ndarray, grids: list[Grids], ranks: tuple[int, ...]) -> None:
    """Print by how much the rank with the most patches exceeds the mean, in balanced order and as the rows come."""
    patches = np.array([lengths_of(step) for step in grids])
    order = np.array([balanced(costs) for costs in areas])
    for count in ranks:
        told = []
        for name, rows in (("balanced", np.take_along_axis(patches, order, axis=1)), ("as they come", patches)):
            of_rank = rows.reshape(len(rows), count, -1).sum(axis=2)
            beyond = 100 * (of_rank.max(axis=1) / of_rank.mean(axis=1) - 1)
            median, high, most = np.percentile(beyond, (50, 95, 100))
            told.append(f"{name} {median:.2f} % ({high:.2f} % in one step of 20, {most:.2f} % at most)")
        print(f"{patches.shape[1]} images over {count} ranks, the fullest beyond the mean: {'; '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards whose images' shapes are taken; default: seven aspect ratios")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--tokens", type=int, default=256, help="the most patches of an image; the square has as many")
    parser.add_argument("--batch", type=int, default=16, help="images of a timed step")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    shapes = shapes_of(asked.data, most=512)
    aspects = np.percentile([height / width for height, width in shapes], (5, 50, 95))
    print(f"{len(shapes)} shapes, height / width {aspects[1]:.2f} ({aspects[0]:.2f} to {aspects[2]:.2f})", flush=True)
    balance(*drawn(shapes, asked.tokens, batch=256, steps=500), ranks=(2, 4, 8, 16, 32))
    speed(asked.size, asked.tokens, drawn(shapes, asked.tokens, asked.batch, asked.steps)[1], asked.turns)


if __name__ == "__main__":
    main()
