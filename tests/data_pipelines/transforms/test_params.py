"""Parameters are drawn as torchvision draws them, and each view has its own stream."""

from __future__ import annotations

import hashlib
import math
import random

import numpy as np
import pytest
from scipy.stats import chisquare, ks_2samp, kstest, uniform
from torch import manual_seed
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.functional import to_pil_image

from data_pipelines.rng import PythonStream, Stream
from data_pipelines.transforms.config import Crop, LocalCrops, Views
from data_pipelines.transforms.params import JITTER_OPERATIONS, draw, draw_crop, random_resized_box


@pytest.mark.parametrize(("height", "width"), [(40, 60), (32, 32), (20, 200)])
def test_boxes_are_distributed_like_torchvisions(height: int, width: int) -> None:
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    boxes = [random_resized_box(Stream(0, number), (height, width), scale, ratio) for number in range(3000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
    ours = np.array([(top, left, bottom - top, right - left) for left, top, right, bottom in boxes])
    manual_seed(0)
    image = to_pil_image(np.zeros((height, width, 3), dtype=np.uint8))
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(3000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


def test_the_whole_image_when_asked_for() -> None:
    assert random_resized_box(Stream(1), (32, 32), (1, 1), (1, 1)) == (0, 0, 32, 32)
    assert random_resized_box(Stream(1), (100, 10), (1, 1), (3 / 4, 4 / 3)) == (0, 43, 10, 56)  # centred fallback


def test_shares_and_ranges() -> None:
    crop = Crop(size=8, flip=0.3, jitter=(0.4, 0.3, 0.2, 0.1), jitter_prob=0.8, grayscale=0.2, blur=0.5, solarise=0.1)
    drawn = [draw_crop(crop, Stream(5, number), (30, 40)) for number in range(4000)]
    shares = {
        "flip": np.mean([params.flip for params in drawn]),
        "jitter": np.mean([bool(params.jitter) for params in drawn]),
        "grayscale": np.mean([params.grayscale for params in drawn]),
        "blur": np.mean([params.blur_radius is not None for params in drawn]),
        "solarise": np.mean([params.solarise for params in drawn]),
    }
    for name, expected in {"flip": 0.3, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarise": 0.1}.items():
        assert abs(shares[name] - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    radii = [params.blur_radius for params in drawn if params.blur_radius is not None]
    assert 0.1 <= min(radii) < 0.12
    assert 1.98 < max(radii) <= 2.0
    factors = {"brightness": (0.6, 1.4), "contrast": (0.7, 1.3), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in factors.items():
        values = [dict(params.jitter)[name] for params in drawn if params.jitter]
        assert low <= min(values) < low + 0.01
        assert high - 0.01 < max(values) <= high
    orders = {tuple(name for name, _ in params.jitter) for params in drawn if params.jitter}
    assert len(orders) == 24


def test_jitter_is_distributed_like_torchvisions() -> None:
    crop = Crop(size=8, jitter=(0.4, 0.4, 0.2, 0.1))
    ours = [draw_crop(crop, Stream(11, number), (30, 40)).jitter for number in range(4000)]
    manual_seed(0)
    ranges = [[0.6, 1.4], [0.6, 1.4], [0.8, 1.2], [-0.1, 0.1]]
    theirs = [ColorJitter.get_params(*ranges) for _ in range(4000)]
    for operation, name in enumerate(JITTER_OPERATIONS):
        factors = [dict(jitter)[name] for jitter in ours]
        assert ks_2samp(factors, [params[1 + operation] for params in theirs]).pvalue > 1e-3
        # each operation is as often at each place of the order as any other
        places = np.bincount([[step for step, _ in jitter].index(name) for jitter in ours], minlength=4)
        assert chisquare(places).pvalue > 1e-3
    numbers = [[JITTER_OPERATIONS.index(name) for name, _ in jitter] for jitter in ours]
    _, counts = np.unique(numbers, axis=0, return_counts=True)
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-3


def test_blur_radii_are_uniform_and_choices_independent() -> None:
    crop = Crop(size=8, flip=0.5, jitter=(0.4, 0, 0, 0), jitter_prob=0.5, grayscale=0.5, blur=0.5, solarise=0.5)
    drawn = [draw_crop(crop, Stream(12, number), (30, 40)) for number in range(4000)]
    radii = [params.blur_radius for params in drawn if params.blur_radius is not None]
    assert kstest(radii, uniform(0.1, 1.9).cdf).pvalue > 1e-3
    choices = np.array(
        [(p.flip, bool(p.jitter), p.grayscale, p.blur_radius is not None, p.solarise) for p in drawn], dtype=float
    )
    correlations = np.corrcoef(choices.T) - np.eye(5)
    assert np.abs(correlations).max() < 4.5 / math.sqrt(4000)


def test_what_is_drawn_never_changes() -> None:
    """The numbers of the first release: runs go on under any later one, with a kernel or without."""
    colours = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
    views = Views(
        global_crops=(
            Crop(size=224, scale=(0.4, 1), blur=1.0, **colours),
            Crop(size=224, scale=(0.4, 1), blur=0.1, solarise=0.2, **colours),
        ),
        local_crops=LocalCrops(size=96, scale=(0.05, 0.4), count=8, blur=0.5, **colours),
    )
    for stream in (Stream, PythonStream):
        digest = hashlib.sha256()
        for sample in range(300):
            size = (375 + sample % 7, 500 - sample % 50)
            crops = [*views.global_crops, *[views.local_crops] * 8]
            for view, crop in enumerate(crops):
                params = draw_crop(crop, stream(5, 3, 0, 2, sample, view), size)
                digest.update(repr(tuple(params)).encode())
        assert digest.hexdigest()[:16] == "f7b63ca0ed3b900c"


def test_only_the_operations_asked_for() -> None:
    params = draw_crop(Crop(size=8, jitter=(0.4, 0.4, 0.4, 0)), Stream(1), (20, 20))
    assert sorted(name for name, _ in params.jitter) == ["brightness", "contrast", "saturation"]
    assert draw_crop(Crop(size=8), Stream(1), (20, 20)).jitter == ()


def test_each_view_has_its_own_stream() -> None:
    crop = Crop(size=8)
    one, two = Views(global_crops=(crop,)), Views(global_crops=(crop, crop), local_crops=LocalCrops(size=4, count=3))
    identity = (0, 1, 2, 3)
    many = draw(two, identity, (50, 50))
    assert len(many) == 5
    assert len({params.box for params in many[:2]}) == 2
    assert draw(one, identity, (50, 50)) == many[:1]
    assert draw(one, (0, 1, 2, 4), (50, 50)) != many[:1]


def test_any_generator_will_do() -> None:
    for rng in (random.Random(0), np.random.default_rng(0)):
        assert draw_crop(Crop(size=8), rng, (20, 20)).box[2] <= 20
