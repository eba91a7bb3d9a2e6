from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from making import encode, write_tar
from PIL import Image

from data_pipelines.checks.dedupe import Found, NearByHash, dedupe
from data_pipelines.checks.fingerprint import (
    MIRROR_BITS,
    Fingerprints,
    correlations,
    perceptual_hashes,
    reduce_grey,
    take_fingerprints,
)
from data_pipelines.checks.neighbours import Pairs
from data_pipelines.datasets.dataset import Dataset
from data_pipelines.images.decode import decode


def scene(seed: int, side: int = 96) -> np.ndarray:
    """An image with detail at all scales, as photographs have: (side, side, 3) uint8."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for size in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=float) / size
    total -= total.min()
    return (total * (255 / total.max())).astype(np.uint8)


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def distance(one: np.ndarray, other: np.ndarray) -> int:
    hashes, textured = perceptual_hashes(np.stack([reduce_grey(one), reduce_grey(other)]))
    assert textured.all()
    return int(np.bitwise_count(hashes[0] ^ hashes[1]).sum())


def opened(path: Path, images: dict[str, bytes]) -> Dataset:
    return Dataset([write_tar(path, list(images.items()))])


def left_out(found: Found) -> dict[str, tuple[str, str]]:
    """By key the kind and the key of what it duplicates."""
    names = found.splits.describe
    return {names(d.number)["key"]: (d.kind, names(d.of)["key"]) for d in found.duplicates}


def run(near: NearByHash | None = None, **splits: Dataset) -> Found:
    return dedupe(splits, near or NearByHash(), progress=False)


@pytest.mark.parametrize(
    ("change", "at_most"),
    [
        (lambda x: np.asarray(Image.open(io.BytesIO(encode(x, "JPEG", quality=40)))), 16),
        (lambda x: resized(x, 40), 8),
        (lambda x: resized(x, 300), 4),
        (lambda x: resized(x, 20), 16),  # smaller than what is hashed
        (lambda x: np.clip(x * 0.7 + 20, 0, 255).astype(np.uint8), 4),
        (lambda x: x[2:-2, 2:-2], 20),
        (lambda x: x.mean(axis=2, keepdims=True).astype(np.uint8), 2),
        (lambda x: x.astype(np.uint16) * 257, 3),
    ],
)
def test_a_changed_copy_has_nearly_the_same_hash(change, at_most: int) -> None:
    distances = [distance(scene(seed), change(scene(seed))) for seed in range(5)]
    assert max(distances) <= at_most, distances


def test_other_images_have_other_hashes() -> None:
    hashes, _ = perceptual_hashes(np.stack([reduce_grey(scene(seed)) for seed in range(40)]))
    between = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(axis=2)[np.triu_indices(40, 1)]
    assert between.min() > 32
    assert abs(between.mean() - 64) < 4


def test_turned_bits_are_the_hash_of_the_mirror_image() -> None:
    hashes, _ = perceptual_hashes(np.stack([reduce_grey(scene(1)), reduce_grey(scene(1)[:, ::-1])]))
    assert np.bitwise_count(hashes[0] ^ hashes[1] ^ MIRROR_BITS).sum() <= 1


def test_images_of_many_channels_are_reduced_too() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (50, 10, 13), dtype=np.uint16)
    reduced = reduce_grey(image)
    assert reduced.shape == (32, 32)
    assert abs(reduced.mean() - image.mean()) < 500


def test_correlations_are_numpys() -> None:
    one, other = np.random.default_rng(0).integers(0, 256, (2, 3, 256), dtype=np.uint8)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(correlations(one, other), expected, atol=1e-5)
    mirrored = other.reshape(3, 16, 16)[:, :, ::-1].reshape(3, 256)
    np.testing.assert_allclose(correlations(one, mirrored, mirrored=True), expected, atol=1e-5)
    assert correlations(np.zeros((1, 256), np.uint8), one[:1]) == 0


def test_fingerprints_do_not_depend_on_threads(tmp_path: Path) -> None:
    dataset = opened(tmp_path / "train-0.tar", {f"{n:03d}.png": encode(scene(n, 24)) for n in range(130)})
    taken = []
    for threads in (1, 4):
        taken.append(Fingerprints.empty(dataset.num_samples))
        take_fingerprints(dataset, taken[-1], threads=threads)
    for name in Fingerprints.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(taken[0], name), getattr(taken[1], name))
    one = reduce_grey(decode(dataset.read(100)))[None]
    np.testing.assert_array_equal(taken[0].hashes[100], perceptual_hashes(one)[0][0])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    folder = tmp_path_factory.mktemp("both")
    png, jpeg = encode(scene(0)), encode(scene(1), "JPEG", quality=95)
    train = {
        "alone.png": encode(scene(9)),
        "same_bytes.png": png,
        "same_pixels.png": encode(scene(0), compress_level=1),
        "first.jpg": jpeg,
        "larger.png": encode(resized(scene(1), 130)),
        "of_val.png": encode(resized(scene(2), 200)),
        "also_of_val.jpg": encode(scene(2), "JPEG", quality=60),
        "mirrored.png": encode(scene(3)),
        "junk.png": b"not an image",
    }
    val = {"v0.png": png, "v2.png": encode(scene(2)), "v3.png": encode(scene(3)[:, ::-1]), "v9.png": encode(scene(8))}
    return {"train": opened(folder / "train-0.tar", train), "val": opened(folder / "val-0.tar", val)}


def test_what_is_left_out_and_what_stays(both: dict[str, Dataset]) -> None:
    found = run(**both)
    assert left_out(found) == {
        "same_bytes": ("exact", "v0"),
        "same_pixels": ("pixels", "v0"),
        "first": ("near", "larger"),
        "of_val": ("near", "v2"),  # though it is larger
        "also_of_val": ("near", "v2"),
    }
    assert found.num_unreadable == 1
    assert found.counts() == {
        "within train": {"near": 1},
        "train, of val": {"exact": 1, "pixels": 1, "near": 2},
    }


def test_mirror_images_when_asked(both: dict[str, Dataset]) -> None:
    plain, mirrored = left_out(run(**both)), left_out(run(NearByHash(mirrored=True), **both))
    assert mirrored == plain | {"mirrored": ("near", "v3")}


def test_the_list_names_both(both: dict[str, Dataset], tmp_path: Path) -> None:
    run(**both).write(tmp_path / "new" / "list.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "list.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "split": "train",
        "shard": str(both["train"].shards[0]),
        "key": "same_bytes",
        "kind": "exact",
        "distance": 0,
        "duplicate_of": {"split": "val", "shard": str(both["val"].shards[0]), "key": "v0"},
    }
    assert len(lines) == 5


def test_flat_images_and_gradients_are_not_alike_for_lack_of_texture(tmp_path: Path) -> None:
    ramp = np.linspace(0, 200, 64)[:, None, None] * np.ones((1, 64, 3))
    images = {
        "black.png": np.zeros((64, 64, 3), np.uint8),
        "white.png": np.full((64, 64, 3), 255, np.uint8),
        "white_large.png": np.full((80, 80, 3), 255, np.uint8),
        "ramp.png": ramp.astype(np.uint8),
        "steeper.png": (ramp**1.5 / 200**0.5 * 1.2).astype(np.uint8),
        "same.png": np.zeros((64, 64, 3), np.uint8),
    }
    dataset = opened(tmp_path / "train-0.tar", {name: encode(pixels) for name, pixels in images.items()})
    assert left_out(run(NearByHash(32), train=dataset)) == {"same": ("exact", "black")}


def chain(tmp_path: Path, count: int) -> Dataset:
    return opened(tmp_path / "train-0.tar", {f"{number}.png": encode(scene(number)) for number in range(count)})


def near_are(*pairs: tuple[int, int, float]):
    first, second, distances = (np.array(column) for column in zip(*pairs, strict=True))
    return lambda prints, rows: [Pairs(first, second, distances.astype(np.float32))]


def test_a_chain_loses_every_other_link_and_not_all_but_one(tmp_path: Path) -> None:
    links = near_are(*((number, number + 1, 1.0) for number in range(5)))
    found = dedupe({"train": chain(tmp_path, 6)}, links, progress=False)
    assert left_out(found) == {"1": ("near", "0"), "3": ("near", "2"), "5": ("near", "4")}


def test_the_nearest_that_stays_is_named(tmp_path: Path) -> None:
    links = near_are((0, 2, 3.0), (1, 2, 2.0))
    found = dedupe({"train": chain(tmp_path, 3)}, links, progress=False)
    assert [(d.number, d.of, d.distance) for d in found.duplicates] == [(2, 1, 2.0)]


def test_train_loses_what_is_near_any_val_image_even_one_that_goes(tmp_path: Path) -> None:
    """v1 goes because of v0; t is near v1 only, and v1 might be used all the same."""
    val = opened(tmp_path / "val-0.tar", {f"v{number}.png": encode(scene(number)) for number in range(2)})
    train = opened(tmp_path / "train-0.tar", {"t.png": encode(scene(5)), "u.png": encode(scene(6))})
    found = dedupe({"train": train, "val": val}, near_are((0, 1, 1.0), (1, 2, 4.0)), progress=False)
    assert left_out(found) == {"v1": ("near", "v0"), "t": ("near", "v1")}


def test_a_copy_of_what_is_left_out_names_what_stays(tmp_path: Path) -> None:
    images = {"0.png": scene(0), "1.png": scene(1), "2.png": scene(1)}
    train = opened(tmp_path / "train-0.tar", {name: encode(pixels) for name, pixels in images.items()})
    found = dedupe({"train": train}, near_are((0, 1, 3.0)), progress=False)
    assert [(d.number, d.of, d.kind, d.distance) for d in found.duplicates] == [(1, 0, "near", 3), (2, 0, "near", 3)]


@pytest.mark.parametrize("radius", [-1, 33])
def test_a_threshold_beyond_reason_is_refused(radius: int) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 32 of 128"):
        NearByHash(radius)
