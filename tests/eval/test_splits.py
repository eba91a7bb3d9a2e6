"""The data of a probe, here or at a URL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import sample_files, write_tar
from serving import SECRET, describe, serve

from eval.labels import labels_of_samples
from eval.splits import Splits, open_splits


def test_splits_at_a_url_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "served" / "set"
    folder.mkdir(parents=True)
    write_tar(folder / "train-000000.tar", sample_files(range(20)))
    write_tar(folder / "val-000000.tar", sample_files(range(20, 30)))
    describe(folder)
    with serve(tmp_path / "served") as server:
        splits, local = open_splits(f"{server.url}/set"), open_splits(str(folder))
        assert (splits.train.checksum, splits.val.checksum) == (local.train.checksum, local.val.checksum)
        assert splits.num_classes == 10
        assert splits.val.read(3).image == local.val.read(3).image
        with pytest.raises(ValueError, match="the same samples"):
            open_splits(f"{server.url}/set/train-000000.tar")
        (folder / "val-000000.tar").unlink()
        describe(folder)
        with pytest.raises(FileNotFoundError, match="no val split to test on") as found:
            open_splits(f"{server.url}/set?token={SECRET}")
        assert SECRET not in str(found.value)


class Labels:
    """As much of a data set as its labels."""

    classes = None

    def __init__(self, *labels: int) -> None:
        self.labels = np.array(labels)


def splits_of(train: list[int], val: list[int]) -> Splits:
    both = Labels(*train), Labels(*val)
    return Splits(*both, "val", labels_of_samples(*both))


def test_classes_are_counted_from_0_whatever_their_labels() -> None:
    splits = splits_of([900_009, -7, 900_009, -1], [-7, -1, 2**40])
    assert splits.labels.classes == (-7, 900_009, 2**40)
    assert splits.labels.train.tolist() == [1, 0, 1, -1]
    assert splits.labels.val.tolist() == [0, -1, 2]
    assert [count.tolist() for count in splits.counts()] == [[1, 2, 0], [1, 0, 1]]
    assert splits.chance() == {"uniform": 1 / 2, "most_frequent_class": 0.0}


def test_a_class_that_one_split_lacks_is_named_and_counted() -> None:
    splits = splits_of([3] * 9 + [5, 5], [3] * 110 + [8] * 6 + [9])
    assert list(splits.warnings()) == [
        "2 classes (8: 6 images, 9: 1 image) only in val: 7 of 117 images, which no probe can get right; they count as "
        "wrong",
        "1 class (5: 2 images) only in train: learned from, but nothing says how well they are told",
        "1 class (9: 1 image) of fewer than 5 val images: nothing can be said of these classes by themselves",
    ]


def test_many_classes_are_not_all_named() -> None:
    first = next(splits_of([1, 2] * 50, [1] * 100 + list(range(10, 30))).warnings())
    assert first.startswith(
        "20 classes (10: 1 image, 11: 1 image, 12: 1 image, 13: 1 image, 14: 1 image, and 15 more) only in val: "
    )


def test_nothing_to_warn_of() -> None:
    assert not list(splits_of([1, 2], [1, 2] * 50).warnings())
