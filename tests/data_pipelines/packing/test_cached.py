from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicoms import dicom
from making import encode, picture, write_tar

from data_pipelines.packing.cached import Packed, pack_cached, packed_folder
from data_pipelines.packing.grouping import NO_GROUPS, Grouping
from data_pipelines.packing.sources.folder import FolderSource
from data_pipelines.packing.spec import holds_images


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "my photos"
    for number in range(12):
        path = folder / f"class{number % 2}" / f"p{number // 6}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number)))
    return folder


def packed(images: Path, grouping: Grouping = NO_GROUPS) -> tuple[Packed, list[str]]:
    said: list[str] = []
    return pack_cached(images, grouping, progress=False, say=said.append), said


def test_images_are_packed_once(photos: Path) -> None:
    first, said = packed(photos)
    assert (first.reused, first.info["splits"]["train"]["samples"]) == (False, 12)
    assert first.folder.parent == packed_folder()
    assert first.folder.name.startswith("my-photos-")
    assert said == [f"packing {photos} into {first.folder}"]
    again, said = packed(photos)
    assert again == first._replace(reused=True)
    assert said == [f"{photos} is unchanged since it was packed into {first.folder}"]


def test_options_that_only_pack_has_are_said_to_be_packs(photos: Path) -> None:
    for split in ("train", "val", "samples"):
        (photos / split / "a").mkdir(parents=True)
        (photos / split / "a" / "1.png").write_bytes(encode(picture(1)))
    with pytest.raises(ValueError, match=r"--no-split-folders: of `selfsight pack IMAGES SHARDS`; then give --data"):
        packed(photos)
    with pytest.raises(ValueError, match="and groups are not divided") as refused:
        packed(photos / "class0", Grouping(0.01, r"p\d"))
    assert "selfsight pack" not in str(refused.value)


@pytest.mark.parametrize("change", ["one more", "one gone", "another content of the same size", "renamed"])
def test_changed_images_are_packed_again(photos: Path, change: str) -> None:
    first, _ = packed(photos)
    image = photos / "class0" / "p0_0.png"
    if change == "one more":
        (photos / "class0" / "new.png").write_bytes(encode(picture(99)))
    elif change == "one gone":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("other.png"))
    else:
        content = image.read_bytes()
        image.write_bytes(content)
        os.utime(image, ns=(1, 1))
    again, _ = packed(photos)
    assert not again.reused
    assert again.folder != first.folder
    assert first.folder.is_dir(), "a run may be reading it"


def test_what_is_held_back_is_part_of_what_is_packed(photos: Path) -> None:
    whole, _ = packed(photos)
    divided, _ = packed(photos, Grouping(0.5, r"(p[0-9])_"))
    assert whole.folder != divided.folder
    assert {name: split["samples"] for name, split in divided.info["splits"].items()} == {"train": 6, "val": 6}


def test_what_are_images_and_what_shards(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\na.png\n")
    shards = packed(photos)[0].folder
    assert holds_images(photos)
    assert holds_images(tmp_path / "list.csv")
    for other in (shards, shards / "train-000000.tar", f"{shards}/*.tar", "http://host/photos", tmp_path / "nothing"):
        assert not holds_images(other), other


LEVELS = np.arange(256, dtype=np.uint16).reshape(16, 16)


def make_frames(folder: Path) -> Path:
    (folder / "x.dcm").write_bytes(dicom(np.stack([LEVELS, LEVELS + 1])))
    return folder


def make_list_of_frames(folder: Path) -> Path:
    make_frames(folder)
    (folder / "list.csv").write_text("path\nx.dcm\n")
    return folder / "list.csv"


def make_sidecar(folder: Path) -> Path:
    (folder / "x.png").write_bytes(encode(picture(1)))
    (folder / "x.json").write_text('{"age": 7}')
    return folder


def make_tables(folder: Path) -> Path:
    pq.write_table(pa.table({"image": [encode(picture(1)), encode(picture(2))]}), folder / "x.parquet")
    return folder


def make_tars(folder: Path) -> Path:
    (folder / "below").mkdir()
    write_tar(folder / "below" / "x.tar", [("a.png", encode(picture(1)))])
    return folder


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        (make_frames, "x.dcm"),
        (make_list_of_frames, "x.dcm"),
        (make_sidecar, "x.json"),
        (make_tables, "x.parquet"),
        (make_tars, "below/x.tar"),
    ],
)
def test_a_change_of_the_file_behind_an_image_is_seen(
    make: Callable[[Path], Path], changed: str, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    images = make(folder)
    first, _ = packed(images)
    assert packed(images)[0].reused
    os.utime(folder / changed, ns=(1, 1))
    again, _ = packed(images)
    assert (again.reused, again.folder == first.folder) == (False, False)


def test_what_is_packed_is_listed_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    made = FolderSource.__init__
    monkeypatch.setattr(FolderSource, "__init__", lambda *args, **kwargs: (listed.append(1), made(*args, **kwargs))[1])
    assert not packed(photos)[0].reused
    assert len(listed) == 1
