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
    assert result["notes"] == ["columns of bytes beside the image are left out: mask"]
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
    with pytest.raises(ValueError, match="column 'label' is of type double; a label is text or a whole number"):
        pack(table, tmp_path / "out", columns=Columns("left", "label"), progress=False)
    result = pack(table, tmp_path / "out", columns=Columns("right", "y"), progress=False)
    found = read_back(tmp_path / "out", "train")
    assert {image: sample["label"] for image, sample in found.items()} == {IMAGES[2]: 3, IMAGES[3]: 4}
    assert found[IMAGES[2]]["json"] == {"label": 0.5}
    assert result["splits"]["train"]["class_counts"] == [0, 0, 0, 1, 1]


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
