"""Masks and depths in shards: indexed with their images, in any order of members."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from making import encode, picture, sample_files, write_tar

from data_pipelines.checks.show import samples_sheet
from data_pipelines.checks.verify import verify
from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.datasets.dataset_index import joint_place
from data_pipelines.images.maps import BadMapError
from data_pipelines.shards import index_format
from data_pipelines.shards.index_format import join, read_index, write_joined
from data_pipelines.shards.scan import build_index, load_index


def mask_of(number: int) -> np.ndarray:
    return (picture(number)[..., 0] // 64).astype(np.uint8)


def files_of(number: int, stem: str = "{:06d}") -> list[tuple[str, bytes]]:
    name = stem.format(number)
    return [
        (f"{name}.mask.png", encode(mask_of(number))),
        (f"{name}.png", encode(picture(number))),
        (f"{name}.depth.png", encode(mask_of(number) + np.uint8(1))),
        (f"{name}.json", b"{}"),
    ]


@pytest.mark.parametrize("stem", ["{:06d}", "a/{:03d}", "scan{:02d}.left", "x{:02d}.1.2"])
@pytest.mark.parametrize("order", ["kept", "by kind", "shuffled"])
def test_maps_belong_to_the_image_of_their_key_wherever_they_lie(stem: str, order: str, tmp_path: Path) -> None:
    files = [file for number in range(6) for file in files_of(number, stem)]
    if order == "by kind":
        files.sort(key=lambda file: file[0].rpartition("0")[2][::-1])
    elif order == "shuffled":
        random.Random(0).shuffle(files)
    write_tar(tmp_path / "train-000000.tar", files)
    with open_dataset(tmp_path) as dataset:
        assert dataset.num_samples == 6
        assert not dataset.index.findings
        assert maps.which_have(dataset, "mask").all()
        for sample in range(6):
            number = next(n for n in range(6) if dataset.read(sample).image == encode(picture(n)))
            np.testing.assert_array_equal(maps.read(dataset, sample, "mask"), mask_of(number))
            np.testing.assert_array_equal(maps.read(dataset, sample, "depth"), mask_of(number) + 1.0)


def test_where_some_have_masks_the_index_says_which(tmp_path: Path) -> None:
    for shard, with_masks in enumerate((False, True, False)):
        files = [file for number in range(4) for file in files_of(10 * shard + number) if "depth" not in file[0]]
        kept = [file for file in files if with_masks or "mask" not in file[0]]
        write_tar(tmp_path / f"train-{shard:06d}.tar", kept)
    with open_dataset(tmp_path) as dataset:
        assert maps.which_have(dataset, "mask").tolist() == [False] * 4 + [True] * 4 + [False] * 4
        assert not maps.which_have(dataset, "depth").any()
        assert maps.read(dataset, 0, "mask") is None
        np.testing.assert_array_equal(maps.read(dataset, 5, "mask"), mask_of(11))
    parts = [load_index(shard) for shard in sorted(tmp_path.glob("*.tar"))]
    joined = join(parts)
    assert joined.is_sound()
    assert [joined.digest(shard) for shard in range(3)] == [part.digest(0) for part in parts]
    assert len({part.digest(0) for part in parts}) == 3
    report = verify(tmp_path, progress=False)
    assert report["cases"]["no_map"]["count"] == 8
    assert report["ok"]


def test_a_mask_alone_is_an_image_as_ever(tmp_path: Path) -> None:
    index = build_index(write_tar(tmp_path / "x.tar", [("a.mask.png", encode(mask_of(0))), *files_of(3)]))
    assert index.keys == ("a", "000003")
    assert index.mask_sizes.tolist()[0] == 0 < index.mask_sizes.tolist()[1]


def test_shards_without_maps_are_known_by_the_digests_of_before(tmp_path: Path) -> None:
    """Recorded before masks were looked for: a run's data are the same data."""
    labels = build_index(write_tar(tmp_path / "x.tar", [("a.jpg", b"image"), ("a.cls", b"3"), ("b.jpg", b"other")]))
    both = build_index(write_tar(tmp_path / "y.tar", [("a.jpg", b"image"), ("a.json", b"{}"), ("b.jpg", b"other")]))
    assert labels.digest(0)[:16] == "87a209b4c24f8c7d"
    assert both.digest(0)[:16] == "68080269e5c7305b"


def test_an_index_of_an_earlier_version_is_read_and_says_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "train-000000.tar", sample_files(range(5)))
    index = load_index(shard)
    old = {name: kind for name, kind in index_format.__dict__.items() if name == "create"}["create"]

    def create(file, tables, arrays):  # as it was
        tables = {name: table for name, table in tables.items() if name != "maps_known"}
        return old(file, tables, {name: kind for name, kind in arrays.items() if name[:4] not in ("mask", "dept")})

    place = tmp_path / "train-000000.tar.index"
    with monkeypatch.context() as patch, place.open("wb") as file:
        patch.setattr(index_format, "create", create)
        patch.setattr(index_format, "PER_SAMPLE", index_format.PER_SAMPLE[:6])
        write_joined(file, [lambda: index])
    assert not read_index(place).knows_maps
    assert read_index(place).is_sound()
    with open_dataset(tmp_path) as dataset:
        assert dataset.labels.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match=r"earlier version.*remove the \.index files"):
            maps.which_have(dataset, "mask")
        assert not join([dataset.index, index]).knows_maps
    place.unlink()
    joint_place(tmp_path, "train").unlink(missing_ok=True)
    with open_dataset(tmp_path) as dataset:
        assert not maps.which_have(dataset, "mask").any()


def test_bad_masks_are_found_by_verify_and_shown(tmp_path: Path) -> None:
    good, small, colours, lone = (files_of(number) for number in range(4))
    small[0] = (small[0][0], encode(mask_of(1)[:5]))
    colours[0] = (colours[0][0], encode(picture(2)))
    files = [*good, *small, *colours, lone[1]]
    write_tar(tmp_path / "train-000000.tar", files)
    report = verify(tmp_path, progress=False)
    assert not report["ok"]
    assert {case: found["count"] for case, found in report["cases"].items()} == {"bad_map": 2, "no_map": 2}
    assert "24x5 px and its image 24x20" in report["problems"][0]
    with open_dataset(tmp_path) as dataset:
        with pytest.raises(BadMapError, match=r"000001 of .*24x5"):
            maps.read(dataset, 1, "mask", (20, 24))
        sheet = samples_sheet(dataset, 4, seed=0)
    assert sheet.width > 4 * 160
