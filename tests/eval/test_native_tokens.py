"""Patch tokens and maps of images at their own shape: as of each image by itself, and as of images of one size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from making import encode, write_tar
from patchwork import InMemory, blocks, features, store
from test_attentive import SETTINGS, hidden
from test_depth import planes
from test_native_probe import data, save  # noqa: F401
from torch import Tensor

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.eval_loader import whole_images
from data_pipelines.eval_maps import WholeMaps
from eval.base import IGNORED, FeatureSet, NativeMasks, NativeTokens, Store
from eval.dense import NativePixelTokens
from eval.embed import embed
from eval.pooling import FORMS, build
from eval.probe import run_probe
from eval.probes import attentive, depth, label_free, segmentation
from eval.probes.attentive import shown
from eval.store.encoding import Crops, FrozenEncoder
from eval.store.native_tokens import GrowingNativeTokens, StoredNativeTokens
from eval.store.reading import open_store
from eval.target import open_target
from pretrain.encoders.patches import patchify

pytestmark = pytest.mark.filterwarnings("ignore:k = ")


class Own:
    """Tokens and masks, of one size or not, as of images at their own shape."""

    def __init__(self, values: list[Tensor], grids: list[tuple[int, int]] | None = None) -> None:
        self.values, self.dim, self.rows = values, values[0].shape[-1], torch.arange(len(values))
        self.grids = torch.tensor(grids or [(1, len(each)) for each in values])

    def __len__(self) -> int:
        return len(self.values)

    def images(self, rows: Tensor) -> list[Tensor]:
        return [self.values[row] for row in rows.tolist()]


def of(tokens: InMemory, masks: Tensor | None = None, depths: Tensor | None = None) -> FeatureSet:
    """The same as `features` of these, each image by itself."""
    ids = torch.arange(len(tokens))
    own = Own(list(tokens.values), [tokens.grid] * len(tokens))
    assert isinstance(own, NativeTokens)
    assert isinstance(own, NativeMasks)
    maps = [None if values is None else Own(list(values)) for values in (masks, depths)]
    return FeatureSet({}, "", torch.empty(0), ids, ids, tokens=own, masks=maps[0], depths=maps[1])


def without(result: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in keys}


def test_probes_of_pixels_say_the_same_of_images_of_one_size() -> None:
    train, val = (blocks(40, 4, 4, 3, 8, 0.3, seed) for seed in (1, 2))
    settings = segmentation.SegmentationSettings(patches=300, bank=90, strengths=(1e-2, 1e-4), ks=(3, 10))
    plain = segmentation.run(store(features(*train), features(*val)), settings)
    own = segmentation.run(store(of(*train), of(*val)), settings)
    assert own["native"] == 16
    for name in ("linear", "knn"):
        for number in ("iou", "pixels"):
            assert own[name][number]["value"] == pytest.approx(plain[name][number]["value"], abs=1e-6)
        assert own[name]["of_class"] == pytest.approx(plain[name]["of_class"], abs=1e-6)
    assert "3 classes at their own shape from up to 16 patches" in segmentation.notes(own, settings)[0]
    (train, far), (val, near) = planes(60, 300, 1), planes(40, 300, 2)
    plain = depth.run(store(features(train, depths=far), features(val, depths=near)), depth.DepthSettings(patches=400))
    own = depth.run(store(of(train, depths=far), of(val, depths=near)), depth.DepthSettings(patches=400))
    assert own["r2"]["value"] == pytest.approx(plain["r2"]["value"], abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_classifiers_see_each_image_as_by_itself(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 16, generator=generator) for count in (3, 7, 1)]
    heads = build(form, 16, 4, (0, 1)).eval()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    together = heads(*shown(Own(images), torch.arange(3), "cpu"))
    for place, image in enumerate(images):
        torch.testing.assert_close(together[:, place], heads(image[None])[:, 0], rtol=1e-4, atol=1e-5)


def test_an_attentive_probe_reads_images_of_unlike_length() -> None:
    """Some more tokens, which say nothing, change nothing of what is found."""

    def longer(num: int, seed: int) -> FeatureSet:
        plain = hidden(num, seed)
        values = plain.tokens.values
        more = [torch.cat([each, each.new_zeros(row % 5, each.shape[1])]) for row, each in enumerate(values)]
        return FeatureSet(plain.inputs, plain.pooled_as, plain.labels, plain.ids, plain.digests, tokens=Own(more))

    settings = dataclasses.replace(SETTINGS, forms=("efficient",))
    found = attentive.run(Store(longer(400, 0), longer(100, 1), 3, "mean", seeds=(0,)), settings)
    assert found["efficient"]["top1"] > 0.9
    assert found["efficient"]["top1"] > found["mean"]["top1"] + 3 * found["mean"]["standard_error"]


def test_ranks_of_tokens_are_those_of_images_of_one_size() -> None:
    tokens, _ = blocks(20, 4, 4, 3, 8, 0.3, seed=1)
    inputs = {"mean": tokens.values.mean(dim=1)}
    ranks = []
    for made in (features(tokens), of(tokens)):
        train = FeatureSet(inputs, "mean", made.labels, made.ids, made.digests, tokens=made.tokens)
        ranks.append(label_free.run(Store(train, train, 0, "mean"), label_free.LabelFreeSettings()))
    for name in ("patch_rank", "patch_rank_within"):
        assert ranks[0][name]["value"] == pytest.approx(ranks[1][name]["value"], rel=1e-5)


def test_maps_are_cut_as_their_images(tmp_path: Path) -> None:
    files = []
    for number, (height, width) in enumerate(((37, 90), (64, 31), (20, 20))):
        levels = np.add.outer(2 * np.arange(height), np.arange(width)).astype(np.uint8)
        files += [
            (f"{number}.png", encode(levels[..., None].repeat(3, axis=2))),
            (f"{number}.mask.png", encode(levels)),
        ]
    write_tar(tmp_path / "train-000000.tar", files)
    with open_dataset(tmp_path) as dataset:
        maps = WholeMaps(dataset, range(3), 24, 4)
        (images, _, _) = next(whole_images(dataset, 24, 4))
        for image, mask in zip(images, maps.images(torch.arange(3)), strict=True):
            assert image.shape[1:] == mask.shape
            error = np.abs(image[0].astype(int) - mask.numpy())[1:-1, 1:-1]  # at the border bicubic weights are cut
            assert error.max() <= 3
        assert IGNORED not in maps.images([0])[0]
        seen: Any = SimpleNamespace(native=True, channels=3, bits=8, most_patches=24, encoder=SimpleNamespace(patch=4))
        grids = torch.tensor([[image.shape[1] // 4, image.shape[2] // 4] for image in images])
        tokens = NativePixelTokens(dataset, torch.arange(3), grids, seen).images(torch.tensor([2, 0]))
        for found, number in zip(tokens, (2, 0), strict=True):
            pixels = torch.from_numpy(images[number])[None].float() / 255
            torch.testing.assert_close(found, rearrange(patchify(pixels, 4)[0], "t (n c) -> t (c n)", c=3))


def test_a_store_of_tokens(data: Path, tmp_path: Path) -> None:  # noqa: F811
    target, folder = str(save(tmp_path / "encoder")), tmp_path / "store"
    embed(target, str(data), folder, native=True, tokens=True, progress=False, say=lambda line: None)
    subject = open_target(target, native=True)
    crops = Crops(16, 3, 8, subject.mean, subject.std, native=True)
    frozen = FrozenEncoder(subject.encoder, crops, tokens=True)
    stored = open_store(folder)["train"]
    with open_dataset(data) as dataset:
        (batch,) = frozen.batches(dataset, range(24))
    assert batch.grids is not None
    assert batch.tokens is not None
    tokens = stored.feature_set().tokens
    assert isinstance(tokens, NativeTokens)
    assert len(set(map(tuple, tokens.grids.tolist()))) > 4
    assert tokens.grids.tolist() == batch.grids.tolist()
    known = torch.from_numpy(batch.tokens).split(batch.grids.prod(axis=1).tolist())
    some = stored.feature_set(np.array([3, 4, 9])).tokens
    assert isinstance(some, NativeTokens)
    for places, found, rows in (([23, 0], tokens, [23, 0]), ([2, 0], some, [9, 3])):
        for image, row in zip(found.images(torch.tensor(places)), rows, strict=True):
            torch.testing.assert_close(image, known[row], rtol=1e-3, atol=1e-3)
    asked = {"device": "cpu", "seeds": (0,), "only": ("segmentation", "depth", "label_free"), "progress": False}
    computed = run_probe(target, str(data), native=True, **asked)
    assert computed["rows"] == run_probe(str(folder), str(data), **asked)["rows"]
    rows = computed["rows"]
    assert rows["pretrained"]["segmentation"]["native"] == rows["pixels"]["segmentation"]["native"] == 16
    assert rows["pixels"]["depth"]["r2"]["value"] > 0.5  # what is behind each pixel is in the pixels
    assert rows["pretrained"]["label_free"]["patch_rank"]["value"] > 1
    with pytest.raises(ValueError, match="robustness reads crops of one size"):
        run_probe(target, str(data), native=True, only=("robustness",), progress=False)


def test_growing_tokens_go_on_where_they_were_kept(tmp_path: Path) -> None:
    grids = np.array([[2, 3], [1, 1], [4, 2]])
    values = np.random.default_rng(0).random((15, 4)).astype(np.float16)
    first = GrowingNativeTokens(tmp_path, 4, np.dtype(np.float16))
    first.append(values[:6], grids[:1])
    first.keep()
    first.append(values[:1] + 1, grids[1:2])  # of a process that ended before it kept these
    first.close()
    second = GrowingNativeTokens(tmp_path, 4, np.dtype(np.float16), rows=1)
    second.append(values[6:], grids[1:])
    second.keep()
    second.close()
    found = StoredNativeTokens(tmp_path)
    assert found.grids.tolist() == grids.tolist()
    assert torch.equal(torch.cat(found.images(torch.arange(3))), torch.from_numpy(values).float())
    with pytest.raises(OSError, match=r"token_ends\.npy"):
        GrowingNativeTokens(tmp_path / "none", 4, np.dtype(np.float16), rows=1)
