"""What is measured of pixels against the plain formulas, and what is written of it into `dataset.json`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from making import bands, deep_png, encode, npy, picture, tiff, write_tar
from PIL import Image

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.dataset_info import data_stats
from data_pipelines.datasets.statistics import Kind, common_kind, draw_samples, measure
from data_pipelines.images.pixels import Header
from data_pipelines.packing.write import pack

#: Of sizes that differ, for every image is to weigh the same.
IMAGES = [bands(number, 5, 8 + number, 30 - number) // (number + 1) for number in range(20)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    files = []
    for number, image in enumerate(IMAGES):
        suffix, content = ("npy", npy(image)) if number % 3 else ("tif", tiff(image, planarconfig="contig"))
        files.append((f"{number:03d}.{suffix}", content))
    write_tar(tmp_path / "train-000000.tar", files)
    return tmp_path


def slow(images: list[np.ndarray], full: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean over images of their means, and the deviation around it."""
    flat = [image.reshape(-1, image.shape[2]).astype(np.float64) / full for image in images]
    mean = np.mean([image.mean(axis=0) for image in flat], axis=0)
    return mean, np.sqrt(np.mean([((image - mean) ** 2).mean(axis=0) for image in flat], axis=0))


def test_measured_as_the_formulas_say(shards: Path) -> None:
    with open_dataset(shards) as dataset:
        found = measure(dataset.read, range(20), Kind(5, 16), workers=2)
        again = measure(dataset.read, range(20), Kind(5, 16), workers=7)
    assert again == found
    mean, std = slow(IMAGES, 65535)
    np.testing.assert_allclose(found.mean, mean, atol=1e-8)
    np.testing.assert_allclose(found.std, std, atol=1e-8)
    np.testing.assert_allclose(
        found.min, np.min([image.min(axis=(0, 1)) for image in IMAGES], axis=0) / 65535, atol=1e-8
    )
    np.testing.assert_allclose(
        found.max, np.max([image.max(axis=(0, 1)) for image in IMAGES], axis=0) / 65535, atol=1e-8
    )
    weights = np.concatenate([np.full(image.shape[0] * image.shape[1], 1 / image[:, :, 0].size) for image in IMAGES])
    for channel in range(5):
        values = np.concatenate([image[:, :, channel].ravel() for image in IMAGES])
        for percent in (1, 50, 99):
            level = round(found.percentiles[str(percent)][channel] * 65535)
            assert weights[values <= level].sum() / 20 >= percent / 100 - 1e-9
            assert weights[values < level].sum() / 20 <= percent / 100 + 1e-9


def test_a_narrow_band_far_from_zero_keeps_its_deviation() -> None:
    """Where a mean of squares less a squared mean would have lost it."""
    draw = np.random.default_rng(0)
    images = [draw.integers(60000, 60003, (50, 50, 1)).astype(np.uint16) for _ in range(5)]
    from data_pipelines.images.sample import Sample

    found = measure(lambda number: Sample("", Path(), npy(images[number]), None), range(5), Kind(1, 16), workers=1)
    assert found.std[0] * 65535 == pytest.approx(float(np.std(images)), rel=1e-3)


def test_what_cannot_be_decoded_is_counted(tmp_path: Path) -> None:
    files = [("a.png", encode(picture(1))), ("b.png", b"nothing"), ("c.npy", npy(IMAGES[0]))]
    write_tar(tmp_path / "train-000000.tar", files)
    with open_dataset(tmp_path) as dataset:
        found = measure(dataset.read, range(3), Kind(3, 8), workers=1)
        assert (found.samples, found.bad) == (1, 2)
        np.testing.assert_allclose(found.mean, slow([picture(1)], 255)[0], atol=1e-8)
        with pytest.raises(
            ValueError, match="none of 3 images can be measured as 9 channels of 16 bits; the first: the"
        ):
            measure(dataset.read, range(3), Kind(9, 16), workers=1)


def test_drawing() -> None:
    assert draw_samples(0, 10, 100) == list(range(10))
    for num_samples in (100, 50_000):
        drawn = draw_samples(3, num_samples, 60)
        assert len(set(drawn)) == 60
        assert drawn == sorted(drawn) == draw_samples(3, num_samples, 60) != draw_samples(4, num_samples, 60)
        assert max(drawn) < num_samples
        assert np.mean(drawn) == pytest.approx(num_samples / 2, rel=0.25)


def test_what_images_have_in_common() -> None:
    def header(channels: int | None, bits: int = 8) -> Header:
        return Header("NPY", 8, 8, channels, bits, "")

    assert common_kind([header(3), header(1, 16)]) == (Kind(3, 16), "")
    assert common_kind([header(1)] * 3) == (Kind(1, 8), "")
    assert common_kind([header(13, 16)] * 3) == (Kind(13, 16), "")
    assert common_kind([header(13), header(3)]) == (None, "the images have 3 or 13 channels")
    assert "do not tell" in common_kind([header(13), header(None)])[1]
    assert common_kind([]) == (None, "no image can be read")


def test_written_into_a_dataset_json_that_was_not_there(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = data_stats(shards, write=True)
    assert "wrote" in capsys.readouterr().out
    written = json.loads((shards / "dataset.json").read_text())
    assert written == entry
    assert (written["statistics"]["channels"], written["statistics"]["bits"]) == (5, 16)
    assert written["statistics"]["formats"] == {"NPY": 13, "TIFF": 7}
    assert written["statistics"]["height"] == [8, 17, 27]
    with open_dataset(shards) as dataset:
        assert dataset.mean == tuple(entry["mean"])
        assert dataset.std == tuple(entry["std"])
    assert verify(shards, progress=False)["ok"]


def test_the_rest_of_dataset_json_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / f"images/{number}.png").write_bytes(encode(picture(number)))
    before = pack(tmp_path / "images", tmp_path / "out", progress=False)
    assert before["statistics"]["channels"] == 3
    np.testing.assert_allclose(before["mean"], slow([picture(number) for number in range(6)], 255)[0], atol=1e-7)
    data_stats(tmp_path / "out", channels=1, write=True)
    after = json.loads((tmp_path / "out/dataset.json").read_text())
    assert {name for name in after if after[name] != before[name]} == {"mean", "std", "statistics"}
    grey = [np.asarray(Image.fromarray(picture(number)).convert("L"))[:, :, None] for number in range(6)]
    np.testing.assert_allclose(after["mean"], slow(grey, 255)[0], atol=1e-7)
    told = capsys.readouterr().out
    assert f"mean: {before['mean']} -> {after['mean']}" in told
    data_stats(tmp_path / "out", channels=1, write=True)
    assert "as they were" in capsys.readouterr().out
    assert pack(tmp_path / "images", tmp_path / "out", progress=False) == after  # it is packed, and stays so


def test_packed_bands_are_measured_and_mixed_ones_are_not(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        (images / f"{number}.npy").write_bytes(npy(IMAGES[number]))
    info = pack(images, tmp_path / "bands", progress=False)
    np.testing.assert_allclose(info["mean"], slow(IMAGES[:4], 65535)[0], atol=1e-7)
    assert info["images"]["height"] == [8, 9, 11]
    (images / "photo.png").write_bytes(deep_png(bands(1)[:, :, :3]))
    info = pack(images, tmp_path / "mixed", progress=False)
    assert (info["mean"], info["std"]) == (None, None)
    assert info["statistics"] == {"none": "the images have 3 or 5 channels"}
    with pytest.raises(ValueError, match="3 or 5 channels; say with --channels"):
        data_stats(tmp_path / "mixed", progress=False)
    assert data_stats(tmp_path / "mixed", channels=5, progress=False)["statistics"]["bad"] == 1


def test_refusals(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        data_stats(shards, samples=0)
    other = tmp_path / "other"
    other.mkdir()
    write_tar(other / "train-000000.tar", [("a.npy", npy(IMAGES[0]))])
    with pytest.raises(ValueError, match="the shards lie in 2 folders"):
        data_stats(f"{tmp_path}/{{train-000000.tar,other/train-000000.tar}}", write=True, progress=False)
    (other / "dataset.json").write_text("{ no JSON")
    with pytest.raises(ValueError, match="not JSON"):
        data_stats(other, write=True, progress=False)
    assert (other / "dataset.json").read_text() == "{ no JSON"
    assert {path.name for path in other.iterdir()} <= {"dataset.json", "train-000000.tar", "train-000000.tar.index"}


def test_a_constant_channel_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = IMAGES[3].copy()
    image[:, :, 2] = 7
    write_tar(tmp_path / "train-000000.tar", [("a.npy", npy(image))])
    assert isinstance(open_dataset(tmp_path), Dataset)
    entry = data_stats(tmp_path)
    assert entry["std"][2] == 0
    assert "one value everywhere in channel 2" in capsys.readouterr().out


def test_more_channels_than_there_is_memory_for_are_not_counted() -> None:
    """A stranger's array may have a million of them, and `pack` measures what it has packed."""
    kind, why = common_kind([Header("NPY", 1, 1, 1_000_000, 16, "")])
    assert kind is None
    assert why == "the images have 1,000,000 channels of 16 bits, too many to count their levels"
    assert common_kind([Header("TIFF", 1, 1, 224, 16, "")])[0] == Kind(224, 16)
