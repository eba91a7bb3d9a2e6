"""What is held back: whole groups such as patients, of every class, and enough of them to say something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicoms import dicom
from making import encode, picture, write_tar
from packs import read_back

from data_pipelines.images.dicom import DicomFile
from data_pipelines.packing.held_back import advice_on_groups
from data_pipelines.packing.sources.base import Columns
from data_pipelines.packing.write import pack

PATIENTS = {f"p{number:02d}": range(10 * number, 10 * number + 3 + number % 4) for number in range(12)}
ROWS = [
    (patient, f"{patient}_{number:03d}.png", "ab"[number % 2]) for patient in PATIENTS for number in PATIENTS[patient]
]
CONTENT = {name: encode(picture(place)) for place, (_, name, _) in enumerate(ROWS)}


def make(kind: str, folder: Path) -> tuple[Path, dict]:
    """A source of the same images of twelve patients, and the options that tell these."""
    by_column, by_pattern = {"columns": Columns(group="Patient")}, {"group_pattern": r"(p\d+)_"}
    if kind == "tars":
        files = [(name, CONTENT[name]) for _, name, _ in ROWS]
        files += [(name.replace("png", "cls"), b"%d" % "ab".index(label)) for _, name, label in ROWS]
        return write_tar(folder / "x.tar", files), by_pattern
    if kind == "parquet":
        rows = [{"image": CONTENT[name], "patient": patient, "label": label} for patient, name, label in ROWS]
        pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=7)
        return folder / "x.parquet", by_column
    for _, name, label in ROWS:
        place = folder / "in" / ("" if kind == "list" else label) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(CONTENT[name])
    if kind == "folder":
        return folder / "in", by_pattern
    lines = "".join(f"{name},{label},{patient}\n" for patient, name, label in ROWS)
    (folder / "in/list.csv").write_text(f"path,label, patient \n{lines}")
    return folder / "in/list.csv", by_column


@pytest.mark.parametrize("kind", ["folder", "tars", "list", "parquet"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_is_in_train_and_val(kind: str, seed: int, tmp_path: Path) -> None:
    source, options = make(kind, tmp_path)
    result = pack(source, tmp_path / "out", val_share=0.25, seed=seed, progress=False, **options)
    owner = {CONTENT[name]: patient for patient, name, _ in ROWS}
    found = {split: read_back(tmp_path / "out", split) for split in ("train", "val")}
    patients = {split: {owner[image] for image in samples} for split, samples in found.items()}
    assert not patients["train"] & patients["val"]
    assert patients["train"] | patients["val"] == PATIENTS.keys()
    assert abs(len(found["val"]) - 0.25 * len(ROWS)) <= 3  # half the largest group
    key = result["groups"]["key"]
    assert result["groups"]["splits"] == {split: len(patients[split]) for split in ("train", "val")}
    for samples in found.values():
        assert all(sample["json"][key] == owner[image] for image, sample in samples.items())
    again = pack(source, tmp_path / "again", val_share=0.25, seed=seed, progress=False, **options)
    assert again["splits"] == result["splits"]


def test_splits_that_share_a_group_are_refused(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "train", "val")):
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / split / f"p{number // 2 if split == 'train' else 0}_{number}.png").write_bytes(
            encode(picture(number))
        )
    with pytest.raises(ValueError, match=r"1 of 1 groups have images in several of the splits train, val, such as p0"):
        pack(tmp_path / "in", tmp_path / "out", group_pattern="p[0-9]+", progress=False)
    assert pack(tmp_path / "in", tmp_path / "out", progress=False)["groups"] is None


def test_groups_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source, _ = make("folder", tmp_path)
    for options, message in (
        ({"group_pattern": "q[0-9]+"}, r"is of no group, as 'q\[0-9\]\+' is not found in it"),
        ({"group_pattern": "(p"}, "is no regular expression"),
        ({"group_pattern": "p"}, "of 1 group: groups are not divided, so there must be two at least"),
        (
            {"group_pattern": r"p\d", "val_share": 0.02},
            r"of 2 groups: none fits, and groups are not divided\. Give --val-share 0\.[0-9]+ or more",
        ),
        ({"columns": Columns(group="patient")}, "name its groups by --group-pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "out", progress=False, **{"val_share": 0.2, **options})
    table, options = make("list", tmp_path)
    table.write_text(table.read_text() + "p00_000.png,a,\n")
    with pytest.raises(ValueError, match="is of no group: its column patient is ''"):
        pack(table, tmp_path / "out", progress=False, **options)


def test_a_json_that_says_another_group_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/p1_0.png").write_bytes(encode(picture(0)))
    (tmp_path / "in/p1_0.json").write_text('{"group": "control"}')
    with pytest.raises(ValueError, match="says group: 'control', and group 'p1' is to be written"):
        pack(tmp_path / "in", tmp_path / "out", group_pattern="p[0-9]+", progress=False)


def fill(folder: Path, **counts: int) -> Path:
    number = 0
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for _ in range(count):
            (folder / label / f"{number}.png").write_bytes(encode(picture(number)))
            number += 1
    return folder


def test_a_val_split_of_one_class_is_refused(tmp_path: Path) -> None:
    """A probe would print 100.0 +- 0.0 of two images of one class."""
    source = fill(tmp_path / "in", a=40, b=9, c=9)
    with pytest.raises(ValueError, match=r"holds back 2 images of 1 of 3 classes.*at --val-share 0\.11 there is one"):
        pack(source, tmp_path / "out", val_share=0.05, progress=False)
    assert not (tmp_path / "out").exists()
    counts = pack(source, tmp_path / "out", val_share=0.12, progress=False)["splits"]["val"]["class_counts"]
    assert counts == [5, 1, 1]
    assert (
        pack(source, tmp_path / "plain", val_share=0.05, labels=False, progress=False)["splits"]["val"]["samples"] == 3
    )


def patients_of_one_class(folder: Path, sizes: dict[str, list[int]]) -> Path:
    for label, counts in sizes.items():
        (folder / label).mkdir(parents=True)
        for patient, count in enumerate(counts):
            for number in range(count):
                place = folder / label / f"{label}{patient}_{number}.png"
                place.write_bytes(encode(picture(7 * patient + number)))
    return folder


@pytest.mark.parametrize(
    ("sizes", "share", "counts"),
    [
        ({"a": [5] * 5, "b": [5] * 5}, 0.1, [5, 5]),
        ({"a": [5] * 5, "b": [5] * 5}, 0.2, [5, 5]),
        ({"a": [5] * 5, "b": [5] * 5}, 0.4, [10, 10]),
        ({"a": [2] * 10, "b": [10, 10]}, 0.25, [4, 10]),
    ],
)
def test_groups_of_one_class_each_are_held_back_of_every_class(
    sizes: dict[str, list[int]], share: float, counts: list[int], tmp_path: Path
) -> None:
    source = patients_of_one_class(tmp_path / "in", sizes)
    result = pack(source, tmp_path / "out", group_pattern=r"[ab]\d+", val_share=share, progress=False)
    assert result["splits"]["val"]["class_counts"] == counts


@pytest.mark.parametrize("sizes", [{"a": [6, 2, 9], "b": [7, 7]}, {"a": [5, 5], "b": [1, 30, 9]}])
def test_the_share_that_is_advised_for_groups_is_enough(sizes: dict[str, list[int]], tmp_path: Path) -> None:
    source = patients_of_one_class(tmp_path / "in", sizes)
    share, refusals = "0.001", []
    for _ in range(3):
        try:
            found = pack(source, tmp_path / "out", group_pattern=r"[ab]\d+", val_share=float(share), progress=False)
            break
        except ValueError as error:
            refusals.append(str(error))
            share = refusals[-1].split("--val-share ")[1].split()[0]
    assert "none fits" in refusals[0]
    assert len(refusals) < 3
    counts = found["splits"]["val"]["class_counts"]
    assert min(counts) > 0 or "from --val-share" in found["notes"][0]


def test_classes_of_one_group_each_can_not_be_held_back(tmp_path: Path) -> None:
    source = patients_of_one_class(tmp_path / "in", {"a": [3], "b": [3]})
    with pytest.raises(ValueError, match="each class has images of one group only"):
        pack(source, tmp_path / "out", group_pattern=r"[ab]\d+", val_share=0.5, progress=False)


def test_a_split_whose_shards_another_would_take_is_refused(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "train-holdout", "test")):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
        with (tmp_path / "list.csv").open("a") as file:
            file.write(("path,split\n" if not number else "") + f"{number}.png,{split}\n")
    with pytest.raises(ValueError, match=r"names the shards of both; call it 'train_holdout'"):
        pack(tmp_path / "list.csv", tmp_path / "out", progress=False)


def test_a_val_split_that_says_little_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = fill(tmp_path / "in", a=20, b=20, c=4)
    notes = pack(source, tmp_path / "out", val_share=0.1)["notes"]
    assert notes == [
        "val has images of 2 of 3 classes; at --val-share 0.25 there is one of each class that has two images",
        "val has 4 labelled images, so that one of them is 25.0% of a probe's accuracy; a larger --val-share measures "
        "more finely",
    ]
    told = capsys.readouterr().out
    assert "3 classes: a 20, b 20, c 4" in told
    assert notes[0] in told


def test_a_class_that_train_does_not_have_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(fill(tmp_path / "in", **{"train/a": 2, "train/b": 2, "val/a": 1, "val/B": 1}), tmp_path / "out")
    assert "val has 1 class that train does not have: B" in capsys.readouterr().out


def make_volumes(folder: Path, kind: str) -> tuple[Path, dict[bytes, str]]:
    """Eight DICOM files of five frames and as many photos, and the file that each packed image is of."""
    owners: dict[bytes, str] = {}
    lines = ["path,label,group"]
    for number in range(8):
        place = folder / "in" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        frames = np.random.default_rng(number).integers(0, 4096, (5, 8, 8), dtype=np.uint16)
        (place / f"v{number}.dcm").write_bytes(dicom(frames))
        (place / f"p{number}.png").write_bytes(encode(picture(number)))
        opened = DicomFile(place / f"v{number}.dcm")
        owners |= {opened.png(frame): f"v{number}" for frame in range(5)} | {encode(picture(number)): f"p{number}"}
        lines += [f"{place.name}/{name},{place.name},{number}" for name in (f"v{number}.dcm", f"p{number}.png")]
    (folder / "in/list.csv").write_text("\n".join(lines))
    return folder / "in/list.csv" if kind == "list" else folder / "in", owners


@pytest.mark.parametrize("kind", ["folder", "list"])
@pytest.mark.parametrize("seed", [0, 1])
def test_frames_of_one_file_are_not_divided(kind: str, seed: int, tmp_path: Path) -> None:
    source, owners = make_volumes(tmp_path, kind)
    result = pack(source, tmp_path / "out", val_share=0.25, seed=seed, progress=False)
    found = {split: read_back(tmp_path / "out", split) for split in ("train", "val")}
    files = {split: {owners[image] for image in samples} for split, samples in found.items()}
    assert not files["train"] & files["val"]
    assert abs(len(found["val"]) - 12) <= 3
    assert {sample["label"] for sample in found["val"].values()} == {0, 1}
    assert result["groups"] is None, "nobody named any, so there is none in the json"
    told = {"group": 3} if kind == "list" else None
    assert all(sample.get("json") == told for samples in found.values() for image, sample in samples.items()
               if owners[image] == "v3")  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_groups_that_are_named_go_before_files(kind: str, tmp_path: Path) -> None:
    source, owners = make_volumes(tmp_path, kind)
    named = {"columns": Columns(group="group")} if kind == "list" else {"group_pattern": "[0-9]+"}
    result = pack(source, tmp_path / "out", val_share=0.25, progress=False, **named)
    val = {owners[image][1:] for image in read_back(tmp_path / "out", "val")}
    assert not val & {owners[image][1:] for image in read_back(tmp_path / "out", "train")}
    assert result["groups"]["splits"] == {"train": 8 - len(val), "val": len(val)}


def test_the_frames_of_a_single_file_cannot_be_divided(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.dcm").write_bytes(dicom(np.zeros((5, 8, 8), np.uint16)))
    with pytest.raises(ValueError, match=r"two at least \(frames of one file are a group, where none is named\)"):
        pack(tmp_path / "in", tmp_path / "out", val_share=0.25, progress=False)


def test_a_share_of_many_images_beside_frames_is_planned_fast(tmp_path: Path) -> None:
    numbers = np.arange(20_000)
    assert "can be one group of each class" in advice_on_groups(numbers % 2, np.maximum(numbers, 50))
