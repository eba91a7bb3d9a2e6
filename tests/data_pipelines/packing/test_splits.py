"""Splits and classes by the names of folders: no held-out image is trained on because of how its folder is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import encode, picture, write_tar
from packs import read_back

from data_pipelines.packing.listing import Membership
from data_pipelines.packing.sources.splits import memberships_of_folders, split_kind, splits_of_files
from data_pipelines.packing.write import pack


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "trn", " train ", "train_images", "trainset")),
        *((name, "train") for name in ("train2017", "images-train", "train_data", "TrainImages")),
        *((name, "val") for name in ("val", "Val", "valid", "Validation", "dev", "val2017", "validation_set")),
        *((name, "test") for name in ("test", "Testing", "tst", "eval", "testset")),
        *((name, "unlabeled") for name in ("unlabeled", "Unlabelled", "unlabeled2017")),
        *((name, "extra") for name in ("extra", "train_extra")),
        *(
            (name, None)
            for name in ("cat", "trains", "train station", "test1", "images", "2017", "set", "", "valley", "train_val")
        ),
    ],
)
def test_names_of_splits(name: str, kind: str | None) -> None:
    assert split_kind(name) == kind


def found(*folders: str, **options: bool) -> list[tuple[str | None, str | None]]:
    return [membership[:2] for membership in memberships_of_folders(folders, **options)[0]]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("Train", "Val"), ("training", "validation"), ("TRN", "dev"), ("train2017", "val2017")],
)
@pytest.mark.parametrize("outer", ["", "dataset/images/", "a/"])
def test_split_folders_in_any_spelling_and_below_others(train: str, val: str, outer: str) -> None:
    expected = [("train", "ant"), ("train", "bee"), ("val", "ant")]
    assert found(f"{outer}{train}/ant", f"{outer}{train}/bee/deep", f"{outer}{val}/ant") == expected
    assert found(f"{outer}{train}", f"{outer}{val}") == [("train", None), ("val", None)]


@pytest.mark.parametrize("labels", [True, False])
def test_split_folders_beside_others_are_refused(labels: bool) -> None:
    """Else all images of val would be trained on, as a class."""
    for folders in (("train/ant", "val/ant", "samples"), ("test", "ant", "bee"), ("Train", "ant"), ("val/ant", "")):
        with pytest.raises(ValueError, match=r"beside in .*of which nobody knows the split.*--no-split-folders"):
            found(*folders, labels=labels)
    assert found("train", "ship", split_folders=False) == [(None, "train"), (None, "ship")]  # as CIFAR-100's classes
    assert found("extra", "ant") == [(None, "extra"), (None, "ant")]


def test_unlabeled_and_extra_images_are_trained_on() -> None:
    stl10 = found("train/ant", "test/ant", "unlabeled", "unlabeled/part2")
    assert stl10 == [("train", "ant"), ("test", "ant"), ("train", None), ("train", None)]
    assert found("train/1", "extra/1", "test/1") == [("train", "1"), ("train", "1"), ("test", "1")]


def test_a_split_without_class_folders_has_no_labels() -> None:
    """As ImageNet's test."""
    assert found("train/ant", "val/ant", "test") == [("train", "ant"), ("val", "ant"), ("test", None)]
    with pytest.raises(ValueError, match="beside the class folders, some of them in train"):
        found("train/ant", "train", "val/ant")


def test_two_folders_of_one_split_are_refused() -> None:
    for folders in (("train", "val", "validation"), ("train", "Train", "val"), ("train", "test", "eval")):
        with pytest.raises(ValueError, match="are both the split"):
            found(*folders)


def test_classes_that_hold_the_splits() -> None:
    expected = [("train", "ant"), ("val", "ant"), ("train", "bee"), ("val", "bee")]
    assert found("ant/train", "ant/val", "bee/Train", "bee/val") == expected
    with pytest.raises(ValueError, match=r"further down, as in bottle/train/good.*Pack bottle and its like one by one"):
        found("bottle/train/good", "bottle/test/broken", "cable/train/good", "cable/test/cut")
    assert found("ant/test", "bee/2024") == [(None, "ant"), (None, "bee")]  # nothing is trained on beside it


def test_folders_that_are_no_splits_stay_classes() -> None:
    assert found("ant", "bee/1", "bee/2") == [(None, "ant"), (None, "bee"), (None, "bee")]
    assert found("photos/ant", "photos/bee") == [(None, "ant"), (None, "bee")]
    assert found("") == [(None, None)]
    assert memberships_of_folders(["train", "unlabelled"])[1] == [
        "split folders are packed under their usual names: unlabelled as train"
    ]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["seg_train/seg_train/cat", "seg_test/seg_test/cat"], [("train", "cat"), ("test", "cat")]),
        (["training_set/training_set/cat", "test_set/test_set/cat"], [("train", "cat"), ("test", "cat")]),
        (["a/seg_train/cat", "a/seg_val/cat"], [("train", "cat"), ("val", "cat")]),
        (["train/train", "test/test"], [("train", None), ("test", None)]),
        (["train/images", "valid/images"], [("train", None), ("val", None)]),
        (["train/images/cat", "val/cat"], [("train", "cat"), ("val", "cat")]),
        (["train/train", "train/ship", "test/ship"], [("train", "train"), ("train", "ship"), ("test", "ship")]),
        (["train/\u732b", "val/\u732b"], [("train", "\u732b"), ("val", "\u732b")]),
        (["eye_test", "eye_left", "bus"], [(None, "eye_test"), (None, "eye_left"), (None, "bus")]),
        (["crash_test", "dress_training"], [(None, "crash_test"), (None, "dress_training")]),
    ],
)
def test_split_folders_that_share_a_word_or_repeat_themselves(
    folders: list[str], expected: list[tuple[str | None, str | None]]
) -> None:
    """As datasets of Kaggle are unpacked: else the held-out images are a class, or all classes are one."""
    assert found(*folders) == expected


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train2017", "val2017"], ["train", "val"]),
        (["trainset", "testset"], ["train", "test"]),
        (["train_images", "val_images"], ["train", "val"]),
        (["Training-Set", "Validation-Set"], ["train", "val"]),
        (["TrainImages-000001", "ValImages-000001"], ["train", "val"]),
        (["train_cats", "train_dogs", "val_cats"], ["train", "train", "val"]),
        (["train01", "train02", "val01", "test1"], ["train", "train", "val", "test"]),
        (["train-00000-of-00002-a1b2c3d4", "dev-00000-of-00001-0a1b"], ["train", "val"]),
        (["unlabeled", "val"], ["unlabeled", "val"]),
        (["unlabeled-000000", "test-000000"], ["unlabeled", "test"]),
        (["train-000000", "extra-000000", "test-000000"], ["train", "extra", "test"]),
        (["train-000000", "pool-000000"], ["train", "pool"]),
        (["photos-000000", "scans-000000", "more"], [None, None, None]),
    ],
)
def test_files_of_splits_are_told_by_all_the_synonyms(files: list[str], splits: list[str | None]) -> None:
    """Else held-out images are trained on without a word."""
    for suffix in ("tar", "parquet"):
        assert splits_of_files([f"{file}.{suffix}" for file in files]) == (splits, [])


@pytest.mark.parametrize("files", [["data-000000", "val-000000"], ["cats", "dogs", "photos_valid"], ["pool", "test1"]])
def test_files_beside_held_out_ones_are_trained_on_and_said_to_be(files: list[str]) -> None:
    splits, (note,) = splits_of_files([f"{file}.tar" for file in files])
    assert splits[:-1] == [None] * (len(files) - 1)
    assert splits[-1] in ("val", "test")
    assert f"such as {files[-1]}.tar; the others, such as {files[0]}.tar, are train's" in note


@pytest.mark.parametrize(
    ("name", "folders", "splits"),
    [
        ("train", ("train", "val"), {"train", "val"}),
        ("data-test", ("train", "val"), {"train", "val"}),
        ("test", ("unlabeled",), {"test"}),
        ("val", ("extra",), {"val"}),
        ("train", ("test",), {"test"}),
    ],
)
def test_folders_in_an_archive_count_before_its_name(
    tmp_path: Path, name: str, folders: tuple[str, ...], splits: set[str]
) -> None:
    """But what an archive of held-out images calls unlabeled or extra is not trained on."""
    files = [(f"{folder}/ant/{number}.png", encode(picture(number))) for number, folder in enumerate(folders)]
    source = write_tar(tmp_path / f"{name}.tar", files)
    assert pack(source, tmp_path / "out", progress=False)["splits"].keys() == splits


LAYOUTS = {
    "STL-10": ({"train/a": 4, "train/b": 4, "test/a": 2, "unlabeled": 6}, {"train": 14, "test": 2}, ["a", "b"]),
    "case": ({"Train/a": 3, "Train/b": 3, "Val/a": 2, "Val/b": 1}, {"train": 6, "val": 3}, ["a", "b"]),
    "below others": ({"dataset/images/train": 3, "dataset/images/valid": 2}, {"train": 3, "val": 2}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["folder", "tar"])
def test_layouts_of_splits_are_packed_as_they_are_meant(layout: str, container: str, tmp_path: Path) -> None:
    folders, splits, classes = LAYOUTS[layout]
    files = [(f"{folder}/{n}.png", encode(picture(n + 10 * place)))
             for place, (folder, count) in enumerate(folders.items()) for n in range(count)]  # fmt: skip
    if container == "tar":
        source = write_tar(tmp_path / "a.tar", files)
    else:
        source = tmp_path / "in"
        for name, content in files:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    result = pack(source, tmp_path / "out", progress=False)
    assert {name: entry["samples"] for name, entry in result["splits"].items()} == splits
    assert result["classes"] == classes
    if layout == "STL-10":
        labels = [sample["label"] for sample in read_back(tmp_path / "out", "train").values()]
        assert sorted(labels, key=str) == [0] * 4 + [1] * 4 + [None] * 6


def test_memberships_are_without_a_group_unless_asked_for() -> None:
    assert memberships_of_folders(["train/ant", "val/ant"])[0][0] == Membership("train", "ant", None)
