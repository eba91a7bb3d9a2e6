"""Parquet and arrow files as a source: columns, labels, and reading that is bounded in time and memory."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import encode, picture
from packs import make_arrow, make_parquet, make_rows, read_back

from data_pipelines.packing.sources import table_files, tables
from data_pipelines.packing.sources.base import Columns
from data_pipelines.packing.sources.table_files import ArrowTable, ParquetTable, open_table
from data_pipelines.packing.sources.tables import TableSource
from data_pipelines.packing.write import pack

IMAGES = [encode(picture(number)) for number in range(12)]


def write(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_bytes_in_a_plain_column_and_labels_as_text(tmp_path: Path) -> None:
    table = write(
        tmp_path / "a.parquet",
        jpg=pa.array(IMAGES[:4], pa.large_binary()),
        category=["bee", None, "ant", "bee"],
        mask=[b"1", b"2", b"3", b"4"],
    )
    result = pack(table, tmp_path / "out", progress=False)
    assert result["classes"] == ["ant", "bee"]
    assert result["notes"] == [
        "columns of bytes beside the image are left out: mask",
        "1 images have no label in column category",
    ]
    found = read_back(tmp_path / "out", "train")
    assert [found[image]["label"] for image in IMAGES[:4]] == [1, None, 0, 1]
    assert {sample["json"] for sample in found.values()} == {None}
    assert sorted(sample["key"] for sample in found.values()) == [f"a-{row:09d}" for row in range(4)]


def test_metadata_of_any_type_becomes_json(tmp_path: Path) -> None:
    rows = {
        "image": IMAGES[:1],
        "when": [datetime.date(2024, 5, 1)],
        "score": [float("nan")],
        "tags": [["a", "b"]],
        "box": [{"x": 1.5, "raw": b"x"}],
        "ok": [True],
        "nothing": pa.nulls(1),
    }
    pack(write(tmp_path / "a.parquet", **rows), tmp_path / "out", progress=False)
    (sample,) = read_back(tmp_path / "out", "train").values()
    assert sample["json"] == {
        "when": "2024-05-01",
        "score": None,
        "tags": ["a", "b"],
        "box": {"x": 1.5},
        "ok": True,
        "nothing": None,
    }


def test_columns_are_named_where_they_are_not_plain(tmp_path: Path) -> None:
    table = write(tmp_path / "a.parquet", left=IMAGES[:2], right=IMAGES[2:4], y=[3, 4], label=[0.5, 0.6])
    with pytest.raises(ValueError, match=r"no column of images by a usual name .* it has left, right\. Name"):
        pack(table, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="no column 'middle' for images; it has left, right"):
        pack(table, tmp_path / "out", columns=Columns("middle"), progress=False)
    with pytest.raises(ValueError, match=r"column label holds numbers with fractions, such as 0\.5"):
        pack(table, tmp_path / "out", columns=Columns("left", "label"), progress=False)
    result = pack(table, tmp_path / "out", columns=Columns("right", "y"), progress=False)
    found = read_back(tmp_path / "out", "train")
    assert {image: sample["label"] for image, sample in found.items()} == {IMAGES[2]: 3, IMAGES[3]: 4}
    assert found[IMAGES[2]]["json"] == {"label": 0.5}
    assert result["splits"]["train"]["class_counts"] == [0, 0, 0, 1, 1]


LABELS = {
    "text": (pa.array(["cat", " cat", "nan", "", "3", "0.1"]), ["cat", "cat", None, None, "3", "0.1"]),
    "categories": (pa.array(["b", "a", None, "b ", "<NA>", "a"]).dictionary_encode(), [*"ba", None, "b", None, "a"]),
    "words": (pa.array(["None", "na", "cat", None, "NaN", "x"]), ["None", "na", "cat", None, None, "x"]),
    "floats": (pa.array([1.0, 2.0, None, float("nan"), -1.0, 0.0]), [1, 2, None, None, None, 0]),
    "whole": (pa.array([1, 2, None, -1, -100, 0]), [1, 2, None, None, None, 0]),
    "truths": (pa.array([True, False, None, True, True, False]), [1, 0, None, 1, 1, 0]),
    "fractions": (pa.array([0.5, 1.0, None, 2.0, 3.0, 4.0]), [None] * 6),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("kind", ["list", "images", "several files"])
def test_labels_mean_the_same_in_lists_and_beside_images(tmp_path: Path, name: str, kind: str) -> None:
    labels, expected = LABELS[name]
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(IMAGES[number])
    images = {"path": [f"{number}.png" for number in range(6)]} if kind == "list" else {"image": IMAGES[:6]}
    rows = pa.table({**images, "label": labels})
    (tmp_path / "in").mkdir()
    step = 3 if kind == "several files" else 6
    for first in range(0, 6, step):
        pq.write_table(rows.slice(first, step), tmp_path / f"in/rows-{first}.parquet", row_group_size=2)
    result = pack(
        f"{tmp_path}/in/*.parquet", tmp_path / "out", root=tmp_path if kind == "list" else None, progress=False
    )
    found = read_back(tmp_path / "out", "train")
    classes = result["classes"]
    told = [found[image]["label"] for image in IMAGES[:6]]
    assert [classes[label] if classes and label is not None else label for label in told] == expected
    assert [note for note in result["notes"] if "label" in note] == (
        ["column label holds numbers with fractions, such as 0.5, which are no classes: no labels are packed, and the "
         "numbers are in the json of each image"]
        if name == "fractions" else [f"{expected.count(None)} images have no label in column label"]
    )  # fmt: skip
    if name == "fractions":
        assert [found[image]["json"]["label"] for image in IMAGES[:6]] == labels.to_pylist()


SPLITS = ["train", "Validation", "nan", None, " TEST ", "val_images"]


@pytest.mark.parametrize("kind", ["csv", "parquet list", "images", "arrow"])
@pytest.mark.parametrize("typed", ["text", "categories"])
@pytest.mark.parametrize("head", ["split", "Split"])
def test_a_column_tells_splits_alike_in_lists_and_beside_images(
    tmp_path: Path, kind: str, typed: str, head: str
) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(IMAGES[number])
    splits = pa.array(SPLITS).dictionary_encode() if typed == "categories" else pa.array(SPLITS)
    source = tmp_path / "in.parquet"
    if kind == "csv":
        source = tmp_path / "in.csv"
        lines = [f"{number}.png,{split or ''}\n" for number, split in enumerate(SPLITS)]
        source.write_text(f"path,{head}\n" + "".join(lines))
    elif kind == "parquet list":
        pq.write_table(pa.table({"path": [f"{number}.png" for number in range(6)], head: splits}), source)
    elif kind == "images":
        write(source, **{"image": IMAGES[:6], head: splits})
    else:
        table = pa.table({"image": IMAGES[:6], head: splits})
        source = tmp_path / "in.arrow"
        with pa.ipc.new_file(str(source), table.schema) as writer:
            writer.write_table(table)
    result = pack(source, tmp_path / "out", progress=False)
    assert {split: one["samples"] for split, one in result["splits"].items()} == {"train": 3, "val": 2, "test": 1}
    assert read_back(tmp_path / "out", "val").keys() == {IMAGES[1], IMAGES[5]}
    assert read_back(tmp_path / "out", "test").keys() == {IMAGES[4]}


@pytest.mark.parametrize(
    ("file", "values", "splits", "moved"),
    [
        ("train", ["train", "val", "nan", "test"], {"train": 2, "val": 1, "test": 1}, 2),
        ("train-00000-of-00001", ["dev", "dev", "train", "train"], {"train": 2, "val": 2}, 2),
        ("data-000000", ["train", "val", "part1", "part1"], {"train": 1, "val": 1, "part1": 2}, 0),
        ("train", ["en", "en", "fr", "2"], {"train": 4}, 0),
        ("test", ["unlabeled", "extra", "test", None], {"test": 4}, 0),
    ],
)
def test_a_column_of_splits_counts_before_the_name_of_the_file(
    tmp_path: Path, file: str, values: list[str | None], splits: dict[str, int], moved: int
) -> None:
    table = write(tmp_path / f"{file}.parquet", image=IMAGES[:4], split=values)
    result = pack(table, tmp_path / "out", progress=False)
    assert {split: one["samples"] for split, one in result["splits"].items()} == splits
    told = f"{moved} images are of another split by column split than by the name of their file, and the column counts"
    assert result["notes"] == ([told] if moved else [])


def test_a_column_of_splits_that_is_no_text_is_told_of(tmp_path: Path) -> None:
    result = pack(write(tmp_path / "a.parquet", image=IMAGES[:2], split=[0, 1]), tmp_path / "out", progress=False)
    assert result["notes"] == ["column split is no text and tells no split, but is in the json"]
    assert read_back(tmp_path / "out", "train")[IMAGES[1]]["json"] == {"split": 1}


def test_of_several_class_labels_one_is_named(tmp_path: Path) -> None:
    feature = {"_type": "ClassLabel", "names": ["a", "b"]}
    metadata = {"huggingface": json.dumps({"info": {"features": {"fine": feature, "coarse": feature}}})}
    table = pa.table({"img": IMAGES[:2], "fine": [0, 1], "coarse": [1, -1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="more than one column of labels: fine, coarse"):
        pack(tmp_path / "a.parquet", tmp_path / "out", progress=False)
    result = pack(tmp_path / "a.parquet", tmp_path / "out", columns=Columns(label="coarse"), progress=False)
    assert result["classes"] == ["a", "b"]
    found = read_back(tmp_path / "out", "train")
    assert [found[image]["label"] for image in IMAGES[:2]] == [1, None]
    assert found[IMAGES[1]]["json"] == {"fine": 1}


def test_a_number_that_is_no_class(tmp_path: Path) -> None:
    table = write(tmp_path / "a.parquet", image=IMAGES[:2], label=[1 << 40, 0])
    with pytest.raises(ValueError, match=r"the label 1099511627776, and a number of a class is at most 999999; choose"):
        pack(table, tmp_path / "out", progress=False)


def test_keys_are_of_the_paths_or_of_the_rows(tmp_path: Path) -> None:
    paths = ["x/a.b.png", None, "plain"]
    rows = [{"bytes": image, "path": path} for image, path in zip(IMAGES, paths, strict=False)]
    write(tmp_path / "in-0.parquet", image=rows)
    write(
        tmp_path / "in-1.parquet", image=[{"bytes": IMAGES[4], "path": None}, {"bytes": IMAGES[5], "path": "x/a.b.jpg"}]
    )
    pack(tmp_path, tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    keys = [found[IMAGES[number]]["key"] for number in (0, 1, 2, 4, 5)]
    assert keys[1:4] == ["in-0-000000001", "plain", "in-1-000000000"]
    assert keys[0] != keys[4]
    assert all(key.startswith("x-a_b-") for key in (keys[0], keys[4]))


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=IMAGES[:1], label=[0])
    write(tmp_path / "b.parquet", image=IMAGES[:1], name=["x"])
    with pytest.raises(ValueError, match=r"b\.parquet has no column label, which .*a\.parquet has; it has image, name"):
        pack(tmp_path, tmp_path / "out", progress=False)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b\.parquet cannot be read as \.parquet .*fetch or write it again"):
        pack(tmp_path, tmp_path / "out", progress=False)


def test_rows_without_an_image_are_skipped(tmp_path: Path) -> None:
    rows = [{"bytes": IMAGES[0], "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    result = pack(write(tmp_path / "a.parquet", image=rows), tmp_path / "out", progress=False)
    assert sorted(entry["path"] for entry in result["skipped"]) == ["a.parquet/1", "a.parquet/2"]
    assert read_back(tmp_path / "out", "train").keys() == {IMAGES[0]}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_WINDOW_BYTES", 8000)
    monkeypatch.setattr(table_files, "_BATCH_BYTES", 2000)


def test_windows_take_row_groups_whole_and_large_ones_in_pieces(tmp_path: Path, small_windows: None) -> None:
    make_parquet(tmp_path / "in", {"train": range(200)}, files=1, rows_per_group=4)
    source = TableSource(sorted((tmp_path / "in/data").glob("*")), tmp_path / "in", "parquet", tmp_path)
    windows = source.windows(0).copy()
    groups = np.arange(200) // 4
    assert all(len(set(windows[groups == group])) == 1 for group in range(50))
    assert len(set(windows)) > 10
    first = [np.flatnonzero(windows == window)[0] for window in range(windows.max() + 1)]
    assert first != sorted(first)  # the row groups are shuffled
    assert (source.windows(1) != windows).any()
    pq.write_table(make_rows(0, 200), tmp_path / "one.parquet", row_group_size=200)
    large = TableSource([tmp_path / "one.parquet"], tmp_path, "parquet", tmp_path)
    assert (np.diff(large.windows(0)) >= 0).all()  # one after the other, as they lie
    assert large.windows(0).max() > 10


@pytest.mark.parametrize(("make", "kind"), [(make_parquet, ParquetTable), (make_arrow, ArrowTable)])
def test_every_row_group_is_read_about_once(
    make: Callable[..., Path], kind: type, tmp_path: Path, small_windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", {"train": range(120)})
    num_read, read = 0, kind.read  # type: ignore[attr-defined]

    def counting(table: object, *place: object) -> Iterator[pa.RecordBatch]:
        nonlocal num_read
        num_read += 1
        return read(table, *place)

    monkeypatch.setattr(kind, "read", counting)
    pack(tmp_path / "in", tmp_path / "out", samples_per_shard=40, progress=False)
    assert len(read_back(tmp_path / "out", "train")) == 120
    num_groups, num_shards = 24, 3
    listing, window = num_groups, 2  # row groups in a window, which two shards may share
    assert num_read <= listing + num_groups + window * num_shards


def test_a_row_group_is_read_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_BATCH_BYTES", 2000)
    pq.write_table(make_rows(0, 60), tmp_path / "a.parquet", row_group_size=60)
    with open_table(tmp_path / "a.parquet") as table:
        begun = []
        iterate = table._file.iter_batches  # type: ignore[attr-defined]
        monkeypatch.setattr(
            table,
            "_file",
            _Counting(table._file, begun, iterate),  # type: ignore[attr-defined]
        )

        def sites(first: int, last: int) -> list[str]:
            return [site for batch in table.read(0, ["site"], first, last) for site in batch["site"].to_pylist()]

        for first, last in ((0, 7), (7, 30), (29, 31), (45, 60)):
            assert sites(first, last) == [f"s{row}" for row in range(first, last)]
        assert len(begun) == 1
        assert sites(3, 4) == ["s3"]  # behind: from the beginning again
        assert len(begun) == 2
        with pytest.raises(OSError, match="row group 0 has 60 rows, and had 61 or more"):
            sites(50, 61)


class _Counting:
    def __init__(self, file: pq.ParquetFile, begun: list, iterate: object) -> None:
        self._inner, self._begun, self._iterate = file, begun, iterate

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def iter_batches(self, *args: object, **options: object) -> Iterator[pa.RecordBatch]:
        self._begun.append(1)
        return self._iterate(*args, **options)  # type: ignore[operator]


def test_arrow_files_as_well_as_streams(tmp_path: Path) -> None:
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), make_rows(0, 1).schema) as writer:
        writer.write_table(make_rows(0, 12), max_chunksize=5)
    pack(tmp_path / "a.arrow", tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    assert [found[image]["json"]["site"] for image in IMAGES] == [f"s{number}" for number in range(12)]


def test_a_table_that_changes_meanwhile(tmp_path: Path) -> None:
    make_parquet(tmp_path / "in", {"train": range(6)}, files=1)
    (file,) = (tmp_path / "in/data").glob("*")
    source = TableSource([file], tmp_path / "in", "parquet", tmp_path)
    pq.write_table(make_rows(0, 20), file)
    with pytest.raises(OSError, match="now; pack when nothing writes to it"):
        next(source.contents([0]))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_with_a_dot_in_their_name(tmp_path: Path, suffix: str) -> None:
    images = [encode(picture(number)) for number in range(2)]
    table = pa.table({"image.bytes": images, "label": [1, 0], "scan.id": ["x", "y"]})
    file = tmp_path / f"in.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    with open_table(file) as opened:
        assert opened.group_size(0, "image.bytes")[1] >= sum(map(len, images)), "windows are cut by it"
    pack(file, tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    assert [found[image]["json"] for image in images] == [{"scan.id": "x"}, {"scan.id": "y"}]
    assert [found[image]["label"] for image in images] == [1, 0]


def test_a_path_that_is_no_text_names_no_key(tmp_path: Path) -> None:
    image = encode(picture(0))
    pq.write_table(pa.table({"image": [{"bytes": image, "path": 7}]}), tmp_path / "in.parquet")
    pack(tmp_path / "in.parquet", tmp_path / "out", progress=False)
    assert read_back(tmp_path / "out", "train")[image]["key"] == "in-000000000"
