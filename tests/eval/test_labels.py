"""What is to be predicted, out of the class of each sample or a field of its .json."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eval.labels import Labels, labels_of_field, labels_of_samples


class Split:
    """As much of a data set as its classes and metadata."""

    classes = None

    def __init__(self, *values: Any, field: str = "what", labels: tuple[int, ...] = ()) -> None:
        self.metadata = [{} if value is ... else {field: value} for value in values]
        self.labels = np.array(labels)
        self.num_samples = len(values)
        self.shards, self.state = ("train-000000.tar",), repr(self.metadata)

    def read_metadata(self, sample: int) -> dict[str, Any]:
        return self.metadata[sample]

    def key(self, sample: int) -> tuple[str, str]:
        return f"k{sample}", "train-000000.tar"


def read(train: tuple[Any, ...], val: tuple[Any, ...], kind: Any = None) -> tuple[Labels, str]:
    return labels_of_field(Split(*train), Split(*val), "val", "what", kind)


def test_texts_are_classes_in_order_of_their_names() -> None:
    labels, line = read(("pear", "apple", None, ...), ("apple", "fig"))
    assert (labels.kind, labels.classes) == ("class", ("apple", "fig", "pear"))
    assert labels.train.tolist() == [2, 0, -1, -1]
    assert labels.val.tolist() == [0, 1]
    assert labels.known(False).tolist() == [True, True, False, False]
    assert line == "label what of 4 samples: 3 classes (apple, fig, pear)"


def test_whole_numbers_are_classes_unless_it_is_said_otherwise() -> None:
    labels, line = read((10, 2, 10), (2, 9))
    assert (labels.kind, labels.classes, labels.train.tolist()) == ("class", (2, 9, 10), [2, 0, 2])
    assert line.endswith("; --label-kind number or grade takes them for such")
    labels, line = read((10, 2, 10), (2, 9), "grade")
    assert (labels.kind, labels.classes, labels.val.tolist()) == ("grade", (2, 9, 10), [0, 1])
    assert line.endswith("3 classes (2, 9, 10), in order")
    labels, line = read((10, 2, ...), (2, 9.5), "number")
    assert labels.kind == "number"
    assert labels.train[:2].tolist() == [10, 2]
    assert labels.known(False).tolist() == [True, True, False]
    assert line == "label what of 4 samples: numbers to predict"


def test_texts_that_are_numbers_are_read_where_all_are_or_where_it_is_said() -> None:
    labels, line = read(("15.9", "3", "nan", None), ("", "4.5"))
    assert labels.kind == "number"
    assert labels.known(False).tolist() == [True, True, False, False]
    assert labels.val[1] == 4.5
    assert line.endswith(
        "numbers to predict; they are texts in the .json, read as numbers, and 2 that say no value left out"
    )
    labels, _ = read(("3", "10"), ("3",))
    assert (labels.kind, labels.classes, labels.train.tolist()) == ("class", (3, 10), [0, 1])
    assert read(("3", "10"), ("3",), "grade")[0].classes == (3, 10)
    assert read(("3", 10.5), ("7",), "number")[0].train.tolist() == [3, 10.5]
    assert read(("007", "8"), ("8",))[0].classes == ("007", "8")
    assert read(("3", "10"), ("3",), "class")[0].classes == ("10", "3")
    assert read(('["a"]', "[]"), ('["b"]',))[0].kind == "several"
    with pytest.raises(ValueError, match=r"k1 of .* is 'x'; labels of kind number are a number each"):
        read(("3", "x"), ("7",), "number")


def test_numbers_with_a_fraction_are_numbers() -> None:
    assert read((1, 2.5), (3,))[0].kind == "number"


def test_lists_are_several_and_an_empty_one_is_known() -> None:
    labels, _ = read((["a", "c"], [], None), (["b"],))
    assert (labels.kind, labels.classes) == ("several", ("a", "b", "c"))
    assert labels.train[:2].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert labels.known(False).tolist() == [True, True, False]
    assert labels.val.tolist() == [[0, 1, 0]]


def test_truth_values_are_two_classes() -> None:
    labels, _ = read((True, False), (True,))
    assert labels.classes == ("False", "True")
    assert labels.train.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("train", "kind", "message"),
    [
        (
            ("a", 2.5),
            None,
            r"what of sample k1 of train-000000\.tar is '2\.5'; labels of kind class are a text or whole number",
        ),
        (("a", ["b"]), None, "is \"\\['b'\\]\"; labels of kind class are a text or whole number each, as the other"),
        ((1, 2.5), "grade", r"is '2\.5'; labels of kind grade are a whole number each$"),
        ((1.0, float("nan")), "number", "is 'nan'; labels of kind number"),
        (("a", "b"), "several", "is 'a'; labels of kind several are a list of texts or whole numbers, empty for none"),
        ((..., ...), None, "no sample of train or of val has the field what in its .json; the first have no .json"),
        (("a", "b"), "kinds", "the kind of label is 'kinds'; it is one of class, several, number, grade"),
    ],
)
def test_values_of_another_kind_are_named(train: tuple[Any, ...], kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(train, train, kind)


def test_classes_of_samples_may_be_grades_or_numbers() -> None:
    train, val = Split(0, 0, 0, labels=(900_000, -1, 3)), Split(0, labels=(3,))
    assert labels_of_samples(train, val).train.tolist() == [1, -1, 0]
    assert labels_of_samples(train, val, "grade").classes == (3, 900_000)
    assert labels_of_samples(train, val, "number").known(False).tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"name the field of the \.json that lists several"):
        labels_of_samples(train, val, "several")


def test_a_class_is_named_with_its_words_once() -> None:
    assert Labels("class", np.array([0]), np.array([1]), (0, 1), None, ("cat", "dog")).name(1) == "1 dog"
    assert Labels("class", np.array([0]), np.array([1]), ("cat", "dog")).name(1) == "dog"
