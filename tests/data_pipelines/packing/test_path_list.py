"""Lists of paths as a source."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import encode, picture
from packs import read_back

from data_pipelines.packing.sources.base import Columns
from data_pipelines.packing.write import pack

IMAGES = [encode(picture(number)) for number in range(6)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for number, image in enumerate(IMAGES):
        (tmp_path / f"scans/{number}.png").write_bytes(image)
    return tmp_path


def pack_list(folder: Path, text: str, name: str = "list.csv", **options: object) -> tuple[dict, dict]:
    """The result, and the samples of train."""
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    result = pack(folder / name, folder / "out", progress=False, **options)  # type: ignore[arg-type]
    return result, read_back(folder / "out", "train")


@pytest.mark.parametrize("text", ["{}", "{}.0", " {} "])
def test_whole_numbers_stay_what_they_are_however_they_are_written(folder: Path, text: str) -> None:
    """Sorted as text, 10 would come before 2; a table with gaps has 2.0 for 2, and -1 is no label."""
    labels = [text.format(number) for number in (10, 2, -1)]
    rows = "".join(f"scans/{number}.png,{label}\n" for number, label in enumerate(labels))
    result, found = pack_list(folder, f"path,label\n{rows}")
    assert [found[image]["label"] for image in IMAGES[:3]] == [10, 2, None]
    assert result["classes"] is None


@pytest.mark.parametrize("labels", [[10.0, 2.0, None], [10.0, 2.0, float("nan")], [10, 2, -1], [10, 2, -2]])
def test_whole_numbers_of_a_parquet_list_stay_what_they_are(folder: Path, labels: list) -> None:
    paths = [f"scans/{number}.png" for number in range(3)]
    pq.write_table(pa.table({"path": paths, "label": labels}), folder / "list.parquet")
    pack(folder / "list.parquet", folder / "out", progress=False)
    found = read_back(folder / "out", "train")
    assert [found[image]["label"] for image in IMAGES[:3]] == [10, 2, None]


@pytest.mark.parametrize("label", [[1, 2], {"a": 1}])
def test_what_can_be_no_label_is_refused(folder: Path, label: object) -> None:
    pq.write_table(pa.table({"path": ["scans/0.png"], "label": [label]}), folder / "list.parquet")
    with pytest.raises(ValueError, match=r"the label of scans/0\.png is .*; a label is text or a whole number"):
        pack(folder / "list.parquet", folder / "out", progress=False)
    pack(folder / "list.parquet", folder / "out", labels=False, progress=False)


def test_numbers_are_labels_as_they_are_and_text_is_sorted(folder: Path) -> None:
    result, found = pack_list(folder, "path,label\nscans/0.png,10\nscans/1.png,2\nscans/2.png,\n")
    assert [found[image]["label"] for image in IMAGES[:3]] == [10, 2, None]
    assert result["classes"] is None
    (folder / "out").rename(folder / "before")
    result, found = pack_list(folder, "path,label\nscans/0.png,10\nscans/1.png,2\nscans/2.png,x\n")
    assert result["classes"] == ["10", "2", "x"]
    assert [found[image]["label"] for image in IMAGES[:3]] == [0, 1, 2]


def test_other_columns_are_json_and_quotes_are_read(folder: Path) -> None:
    text = '\ufefffile_name\tnote\tage\r\nscans/0.png\t"two\nlines, ""quoted"""\t7\r\n\r\nscans/1.png\té\t\r\n'
    _, found = pack_list(folder, text, "list.tsv")
    assert found[IMAGES[0]]["json"] == {"note": 'two\nlines, "quoted"', "age": 7}
    assert found[IMAGES[1]]["json"] == {"note": "é"}


def test_columns_of_numbers_and_of_lists_are_no_text(folder: Path) -> None:
    """007 is a name, +1, inf and 1e999 are no numbers of JSON, and what mixes numbers and lists is neither."""
    columns = {
        "size": ("15.908", "-3", "1e-2"),
        "grade": ("3", "", "0"),
        "id": ("007", "8", "9"),
        "plus": ("+1", "2", "3"),
        "endless": ("inf", "1e999", "1"),
        "shapes": ('["round", 1]', "[]", "null"),
        "open": ("[NaN]", "[1", "[2]"),
        "both": ("1", "[2]", "3"),
    }
    rows = ["\t".join([f"scans/{n}.png", *(cells[n] for cells in columns.values())]) for n in range(3)]
    result, found = pack_list(folder, "\n".join(["\t".join(["path", *columns]), *rows]).replace('"', '""').replace(
        '[""round"", 1]', '"[""round"", 1]"'), "list.tsv")  # fmt: skip
    first, second, third = (found[image]["json"] for image in IMAGES[:3])
    assert first == {
        "size": 15.908, "grade": 3, "id": "007", "plus": "+1", "endless": "inf", "shapes": ["round", 1],
        "open": "[NaN]", "both": "1",
    }  # fmt: skip
    assert (second["size"], type(second["size"]), second["shapes"], second["id"]) == (-3, int, [], "8")
    assert "grade" not in second
    assert (third["size"], third["grade"], third["endless"], third["both"]) == (0.01, 0, "1", "3")
    assert "shapes" not in third
    told = "\n".join(result["notes"])
    assert "no text but numbers: grade, size; lists: shapes" in told
    assert "2 of 3 cells of id are numbers, and it stays text, as '007' is none" in told
    assert "2 of 3 cells of both are numbers, and it stays text" in told
    assert "(empty, nan, NA, N/A, null) are left out of the json: 1 of grade, 1 of shapes" in told


def test_cells_without_a_value_are_left_out_and_counted(folder: Path) -> None:
    text = "path,stage,patient\nscans/0.png,I,1\nscans/1.png,,2\nscans/2.png,nan,3\nscans/3.png, N/A ,4\n"
    result, found = pack_list(folder, text + "scans/4.png,NA,5\nscans/5.png,null,6\n", columns=Columns(group="patient"))
    assert [found[image]["json"] for image in IMAGES[:2]] == [{"stage": "I", "patient": "1"}, {"patient": "2"}]
    assert all(found[image]["json"].keys() == {"patient"} for image in IMAGES[1:])
    assert any("left out of the json: 5 of stage" in note for note in result["notes"])


def test_splits_paths_and_the_root(folder: Path, tmp_path: Path) -> None:
    text = f"path,split\n0.png,train\n{folder}/scans/1.png,validation\n./2.png,\n"
    result, found = pack_list(folder, text, root=folder / "scans", split="train")
    assert {split: entry["samples"] for split, entry in result["splits"].items()} == {"train": 2, "val": 1}
    assert found.keys() == {IMAGES[0], IMAGES[2]}
    assert read_back(folder / "out", "val").keys() == {IMAGES[1]}


def test_of_several_rows_with_one_path_the_first_counts(folder: Path) -> None:
    text = "path,label\nscans/0.png,1\nscans/1.png,2\nscans/0.png,3\nscans/0.png,4\n"
    result, found = pack_list(folder, text, bad="refuse")  # such an image is not bad
    assert [found[image]["label"] for image in IMAGES[:2]] == [1, 2]
    assert result["skipped"] == [{"path": "scans/0.png", "reason": "listed more than once"}] * 2


def test_files_that_are_not_there(folder: Path) -> None:
    text = "path\n" + "".join(f"scans/{number}.png\n" for number in range(30)) + "scans\n"
    with pytest.raises(ValueError, match=r"25 images cannot be used.* scans: no such file; scans/10\.png: no such"):
        pack_list(folder, text, bad="refuse")
    assert not (folder / "out").exists()
    result, found = pack_list(folder, text)
    assert found.keys() == set(IMAGES)
    assert result["num_skipped"] == 25
    with pytest.raises(FileNotFoundError, match=r"none of the 2 files .* relative paths begin at .* \(--root\)"):
        pack_list(folder, "path\nx.png\ny.png\n")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "x.dcm\n",
            r"none of the 1 files that .*list\.csv names can be used, the first of them .*/x\.dcm: not a DICOM",
        ),
        ("x.dcm\ny.png\n", r"none of the 2 files .*/x\.dcm: not a DICOM.*; relative paths begin at .* \(--root\)"),
        ("y.png\nx.dcm\n", r"none of the 2 files .*/y\.png: no such file; relative paths begin at .* \(--root\)"),
        ("", r"list\.csv names no file; below its first line every line must name one"),
    ],
)
def test_why_a_list_gives_no_image_is_told(tmp_path: Path, rows: str, message: str) -> None:
    """Not that files are missing which are there."""
    (tmp_path / "x.dcm").write_bytes(b"x" * 200)
    with pytest.raises(FileNotFoundError, match=message) as raised:
        pack_list(tmp_path, f"path\n{rows}")
    assert ("--root" in str(raised.value)) == ("y.png" in rows)


def test_a_list_in_parquet(folder: Path) -> None:
    rows = {"image_path": ["scans/0.png", "scans/1.png"], "label": ["b", "a"], "dose": [0.5, float("inf")]}
    pq.write_table(pa.table(rows), folder / "list.parquet")
    result = pack(folder / "list.parquet", folder / "out", progress=False)
    found = read_back(folder / "out", "train")
    assert result["pack"]["kind"] == "list"
    assert result["classes"] == ["a", "b"]
    assert [found[image]["json"] for image in IMAGES[:2]] == [{"dose": 0.5}, {"dose": None}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("site,age\n1,2\n", "no column of paths by a usual name .*; it has site, age. Name one by --image-column"),
        ("path,label\nscans/0.png\n", "line 2: .*every line needs a field for each of the columns path, label"),
        ("path,path\n1,2\n", "its first line must name the columns, each once"),
        ("", "its first line must name the columns"),
    ],
)
def test_lists_that_are_none(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_list(folder, text)


def test_named_columns(folder: Path) -> None:
    text = "path,where,kind\nx,scans/0.png,b\ny,scans/1.png,a\n"
    _, found = pack_list(folder, text, columns=Columns("where", "kind"))
    assert [found[image]["label"] for image in IMAGES[:2]] == [1, 0]
    assert found[IMAGES[0]]["json"] == {"path": "x"}
    with pytest.raises(ValueError, match="no column 'gone' for labels; it has path, where, kind"):
        pack_list(folder, text, columns=Columns("where", "gone"))


@pytest.mark.parametrize("head", ["path,Label,Split", "Path, label,SPLIT ", " PATH ,LABEL, split"])
def test_columns_are_found_in_any_case_and_with_blanks(folder: Path, head: str) -> None:
    """Else labels and splits would be passed over without a word."""
    rows = "scans/0.png,ant,Train\nscans/1.png, bee ,train\nscans/2.png,ant, VALIDATION\n"
    result, found = pack_list(folder, f"{head}\n{rows}")
    assert result["classes"] == ["ant", "bee"]
    assert [found[image]["label"] for image in IMAGES[:2]] == [0, 1]
    assert found[IMAGES[0]]["json"] is None
    assert read_back(folder / "out", "val")[IMAGES[2]]["label"] == 0


def test_columns_that_differ_only_in_case(folder: Path) -> None:
    _, found = pack_list(folder, "path,Label,label\nscans/0.png,7,1\nscans/1.png,7,2\n")
    assert [found[image]["label"] for image in IMAGES[:2]] == [1, 2]
    with pytest.raises(ValueError, match=r"has the columns 'LABEL', 'Label'; name one by --label-column"):
        pack_list(folder, "path,LABEL,Label\nscans/0.png,7,1\n")


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "NA", "null", "<NA>", " "])
def test_a_missing_label_makes_no_text_of_numbers(folder: Path, missing: str) -> None:
    result, found = pack_list(folder, f"path,label\nscans/0.png,10\nscans/1.png,2.0\nscans/2.png,{missing}\n")
    assert [found[image]["label"] for image in IMAGES[:3]] == [10, 2, None]
    assert result["classes"] is None
    assert "1 images have no label in column label" in result["notes"]


def test_a_missing_label_is_no_class_of_its_own(folder: Path) -> None:
    """But words that may be classes, such as None, are."""
    text = "path,label\nscans/0.png,ant\nscans/1.png,nan\nscans/2.png,\nscans/3.png,None\n"
    result, found = pack_list(folder, text)
    assert result["classes"] == ["None", "ant"]
    assert [found[image]["label"] for image in IMAGES[:4]] == [1, None, None, 0]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_numbers_to_predict_are_no_classes(folder: Path, kind: str) -> None:
    values = [0.1 * number for number in range(6)]
    if kind == "csv":
        rows = "".join(f"scans/{number}.png,{value:g}\n" for number, value in enumerate(values))
        result, found = pack_list(folder, f"path,Label\n{rows}")
        expected = [{"Label": float(f"{value:g}")} for value in values]
    else:
        paths = [f"scans/{number}.png" for number in range(6)]
        pq.write_table(pa.table({"path": paths, "Label": values}), folder / "list.parquet")
        result = pack(folder / "list.parquet", folder / "out", progress=False)
        found = read_back(folder / "out", "train")
        expected = [{"Label": value} for value in values]
    assert result["classes"] is None
    assert [found[image]["label"] for image in IMAGES] == [None] * 6
    assert [found[image]["json"] for image in IMAGES] == expected
    assert any("column Label holds numbers with fractions, such as 0.1" in note for note in result["notes"])
    with pytest.raises(ValueError, match="which are no classes; leave out --label-column"):
        pack(folder / f"list.{kind}", folder / "other", columns=Columns(label="label"), progress=False)
