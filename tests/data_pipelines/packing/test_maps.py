"""Masks and depths packed with their images: from beside them, from a folder of their own, from other shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import encode, npy, picture

from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.maps import resized_nearest
from data_pipelines.packing.mask_names import read_mask_names
from data_pipelines.packing.reencode import Reencoding
from data_pipelines.packing.sources.base import Columns
from data_pipelines.packing.write import pack


def mask_of(number: int) -> np.ndarray:
    return (picture(number)[..., 0] // 64).astype(np.uint8)


def images(folder: Path, numbers: range = range(6)) -> Path:
    for number in numbers:
        place = folder / "photos" / f"{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"img.{number}.jpg").write_bytes(encode(picture(number), "JPEG"))
    return folder / "photos"


def masks(folder: Path, numbers: range = range(6)) -> Path:
    for number in numbers:
        place = folder / "masks" / f"{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"img.{number}.png").write_bytes(encode(mask_of(number)))
    return folder / "masks"


def found(out: Path, kind: str = "mask") -> dict[int, np.ndarray | None]:
    with open_dataset(out) as dataset:
        numbers = [int(dataset.key(sample)[0].rpartition("_")[2]) for sample in range(dataset.num_samples)]
        return {number: maps.read(dataset, sample, kind) for sample, number in enumerate(numbers)}


def test_a_folder_of_masks(tmp_path: Path) -> None:
    result = pack(images(tmp_path), tmp_path / "out", masks=masks(tmp_path), progress=False)
    assert result["maps"]["mask"]["samples"] == 6
    assert result["maps"]["mask"]["num_missing"] == 0
    assert result["maps"].keys() == {"mask"}
    for number, mask in found(tmp_path / "out").items():
        np.testing.assert_array_equal(mask, mask_of(number))
    again = pack(tmp_path / "out", tmp_path / "again", progress=False)  # shards give theirs on
    assert again["maps"] == result["maps"]
    assert again["notes"] == []
    np.testing.assert_equal(found(tmp_path / "again"), found(tmp_path / "out"))


def test_beside_their_images(tmp_path: Path) -> None:
    folder = images(tmp_path)
    for number in range(6):
        (folder / f"{number % 2}" / f"img.{number}.mask.png").write_bytes(encode(mask_of(number)))
        (folder / f"{number % 2}" / f"img.{number}.depth.npy").write_bytes(npy(mask_of(number) / 2))
    result = pack(folder, tmp_path / "out", progress=False)
    assert (result["splits"]["train"]["samples"], result["skipped"], result["notes"]) == (6, [], [])
    assert {kind: one["samples"] for kind, one in result["maps"].items()} == {"mask": 6, "depth": 6}
    for number, mask in found(tmp_path / "out").items():
        np.testing.assert_array_equal(mask, mask_of(number))
    np.testing.assert_array_equal(found(tmp_path / "out", "depth")[3], mask_of(3) / np.float32(2))
    pack(tmp_path / "out", tmp_path / "again", progress=False)
    np.testing.assert_equal(found(tmp_path / "again", "depth"), found(tmp_path / "out", "depth"))


def test_missing_ones_are_named_and_those_of_another_size_left_out(tmp_path: Path) -> None:
    folder = masks(tmp_path, range(1, 6))
    (folder / "1/img.1.png").write_bytes(encode(mask_of(1)[:7]))
    (folder / "0/img.2.png").write_bytes(encode(picture(2)))
    result = pack(images(tmp_path), tmp_path / "out", masks=folder, progress=False)
    told = result["maps"]["mask"]
    assert (told["samples"], told["refused"], told["num_missing"], told["missing"]) == (3, 2, 1, ["0/img.0.jpg"])
    assert any("1/img.1.jpg is 24x7 px and its image 24x20" in reason for reason in told["refusals"])
    assert result["splits"]["train"]["samples"] == 6
    assert [number for number, mask in sorted(found(tmp_path / "out").items()) if mask is None] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"cannot be used.*(its image 24x20|one number a pixel)"):
        pack(tmp_path / "photos", tmp_path / "strict", masks=folder, bad="refuse", progress=False)


def test_no_mask_at_all_says_what_one_would_be_called(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none of the 6 images; that of 0/img.0.jpg would be 0/img.0.png"):
        pack(images(tmp_path), tmp_path / "out", masks=tmp_path / "empty", progress=False)
    with pytest.raises(FileNotFoundError, match="no folder"):
        pack(tmp_path / "photos", tmp_path / "out", masks=tmp_path / "nowhere", progress=False)


def test_smaller_images_have_smaller_masks(tmp_path: Path) -> None:
    pack(
        images(tmp_path),
        tmp_path / "out",
        masks=masks(tmp_path),
        reencoding=Reencoding(10),
        progress=False,
    )
    for number, mask in found(tmp_path / "out").items():
        np.testing.assert_array_equal(mask, resized_nearest(mask_of(number), (10, 12)))


def test_other_masks_are_another_source(tmp_path: Path) -> None:
    folder = masks(tmp_path)
    first = pack(images(tmp_path), tmp_path / "out", masks=folder, progress=False)
    assert pack(tmp_path / "photos", tmp_path / "out", masks=folder, progress=False) == first
    (folder / "0/img.0.png").unlink()
    with pytest.raises(FileExistsError, match="the images are others"):
        pack(tmp_path / "photos", tmp_path / "out", masks=folder, progress=False)
    with pytest.raises(FileExistsError, match="the images are others"):
        pack(tmp_path / "photos", tmp_path / "out", progress=False)


def test_a_list_names_the_mask_of_each_image(tmp_path: Path) -> None:
    folder, of_masks = images(tmp_path), masks(tmp_path)
    rows = [f"{number % 2}/img.{number}.jpg,{of_masks}/{number % 2}/img.{number}.png" for number in range(5)]
    (folder / "list.csv").write_text("path,Drawn\n" + "\n".join([*rows, "1/img.5.jpg,gone.png"]) + "\n")
    told = pack(folder / "list.csv", tmp_path / "out", columns=Columns(mask="drawn"), progress=False)["maps"]["mask"]
    assert (told["samples"], told["missing"]) == (5, ["1/img.5.jpg"])
    for number, mask in found(tmp_path / "out").items():
        np.testing.assert_array_equal(mask, None if number == 5 else mask_of(number))
    (of_masks / "0/img.0.png").write_bytes(encode(mask_of(0) // 2))
    with pytest.raises(FileExistsError, match="the images are others"):
        pack(folder / "list.csv", tmp_path / "out", columns=Columns(mask="drawn"), progress=False)


def test_a_table_holds_masks_beside_its_images(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures = [{"bytes": encode(picture(number), "JPEG"), "path": f"img.{number}.jpg"} for number in range(4)]
    drawn = [encode(mask_of(number)) for number in range(3)]
    pq.write_table(pa.table({"photo": pictures, "classes": [*drawn, None]}), tmp_path / "t.parquet")
    result = pack(tmp_path / "t.parquet", tmp_path / "out", columns=Columns(mask="classes"), progress=False)
    assert result["maps"]["mask"]["samples"] == 3
    assert not any("left out" in note for note in result["notes"])
    for number, mask in found(tmp_path / "out").items():
        np.testing.assert_array_equal(mask, None if number == 3 else mask_of(number))
    with pytest.raises(ValueError, match=r"--mask-column .* are for tables.*--masks"):
        pack(images(tmp_path), tmp_path / "other", columns=Columns(mask="classes"), progress=False)


def test_names_of_levels_go_from_a_file_into_the_description_and_from_shards_to_shards(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("# what there is\n2, red kite\n0 sky\n\n")
    named = tmp_path / "names.txt"
    result = pack(images(tmp_path), tmp_path / "out", masks=masks(tmp_path), mask_names=named, progress=False)
    assert result["mask_names"] == {"0": "sky", "2": "red kite"}
    assert open_dataset(tmp_path / "out").mask_names == {0: "sky", 2: "red kite"}
    again = pack(tmp_path / "out", tmp_path / "again", labels=False, progress=False)
    assert again["mask_names"] == result["mask_names"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"0": "sky", "0": "sea"}', "level 0 both sky and sea"),
        ('{"0": 7}', "calls the level 0 7"),
        ("-1 sky", "line 1 of .* is -1 sky"),
        ("0 sky\n65535 nothing", "the level 65535; levels are whole numbers of 0 .. 65534"),
        ("# none", "names no level"),
        ("{", "is no JSON"),
    ],
)
def test_names_of_levels_that_cannot_be_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_mask_names(tmp_path / "names")
