"""Every kind of source gives the same samples, and survives the same accidents."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import encode, picture, write_tar
from packs import CLASSES, MAKERS, content, read_back

from data_pipelines.images import pixels
from data_pipelines.packing.sources import opening
from data_pipelines.packing.write import pack

SPLITS = {"train": range(40), "val": range(40, 52)}
KINDS = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: make(folder / kind, SPLITS) for kind, make in MAKERS.items()}


@KINDS
def test_images_labels_and_json_arrive(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    result = pack(sources[kind], tmp_path, samples_per_shard=15, progress=False)
    assert result["pack"]["kind"] == kind
    assert result["classes"] == list(CLASSES)
    for split, numbers in SPLITS.items():
        found = read_back(tmp_path, split)
        assert len(found) == len(numbers)
        for number in numbers:
            sample = found[encode(picture(number))]
            assert sample["label"] == number % 3
            assert sample["json"] == {"site": f"s{number}"}
            assert str(number) in sample["key"]
    assert result["splits"]["train"]["class_counts"] == [14, 13, 13]
    assert [shard["samples"] for shard in result["splits"]["train"]["shards"]] == [13, 13, 14]


@KINDS
def test_the_order_is_shuffled_and_the_same_every_time(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    for name, seed, workers in (("a", 0, 1), ("b", 0, 3), ("c", 1, 2)):
        pack(sources[kind], tmp_path / name, samples_per_shard=9, seed=seed, workers=workers, progress=False)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")
    keys = [sample["key"] for sample in read_back(tmp_path / "a", "train").values()]
    assert keys != sorted(keys)


SLOW_PACK = """
import random, sys, time
from pathlib import Path
from data_pipelines.packing import shard_writer, write
member = shard_writer._member
def slowly(name, content):
    time.sleep(0.004)
    return member(name, content)
shard_writer._member = slowly
print("ready", flush=True)
write.pack(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=4, workers=2, progress=False)
"""


@KINDS
def test_killed_at_any_time_it_ends_as_if_undisturbed(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    out, rng = tmp_path / "killed", random.Random(kind)
    command = [sys.executable, "-c", SLOW_PACK, str(sources[kind]), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # all is imported
    shards_done = rng.randrange(1, 6)
    while process.poll() is None and len(list(out.glob(".pack/*.tar.json"))) < shards_done:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (out / "dataset.json").exists()
    whole = {
        path.name: path.stat().st_mtime_ns for path in out.glob("*.tar") if (out / f".pack/{path.name}.json").exists()
    }
    assert whole
    pack(sources[kind], out, samples_per_shard=4, progress=False)
    pack(sources[kind], tmp_path / "undisturbed", samples_per_shard=4, progress=False)
    assert content(out) == content(tmp_path / "undisturbed")
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole  # what was done was kept


@KINDS
def test_a_changed_source_is_noticed(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path / "a", {"train": range(12)})
    source = MAKERS[kind](tmp_path / "b", {"train": range(12)})
    place = tmp_path / "a" / source.relative_to(tmp_path / "b")
    pack(place, tmp_path / "out", progress=False)
    assert pack(source, tmp_path / "out", progress=False)  # elsewhere, and the same
    other = MAKERS[kind](tmp_path / "c", {"train": range(1, 13)})
    with pytest.raises(FileExistsError, match="the images are others"):
        pack(other, tmp_path / "out", progress=False)


@KINDS
def test_val_is_held_back_of_every_class(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path / "source", {"train": range(30)})
    result = pack(source, tmp_path / "out", val_share=0.2, progress=False)
    assert result["splits"]["val"]["class_counts"] == [2, 2, 2]
    assert result["splits"]["train"]["class_counts"] == [8, 8, 8]
    assert not read_back(tmp_path / "out", "train").keys() & read_back(tmp_path / "out", "val").keys()


@KINDS
def test_labels_can_be_left(kind: str, tmp_path: Path) -> None:
    source = MAKERS[kind](tmp_path / "source", {"train": range(5)})
    result = pack(source, tmp_path / "out", labels=False, progress=False)
    assert result["classes"] is None
    assert result["splits"]["train"]["class_counts"] is None
    assert {sample["label"] for sample in read_back(tmp_path / "out", "train").values()} == {None}


def test_kinds_are_recognised_or_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    for kind, source in sources.items():
        opened = opening.open_source(source, tmp_path)
        assert opened.kind == kind
        opened.close()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.png").write_bytes(encode(picture(1)))
    (tmp_path / "mixed/b.tar").write_bytes((sources["tars"] / "train-000000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"holds folder and tars; say which to pack \(--from"):
        pack(tmp_path / "mixed", tmp_path / "out", progress=False)
    assert pack(tmp_path / "mixed", tmp_path / "out", kind="folder", progress=False)["splits"]["train"]["samples"] == 1
    assert pack(tmp_path / "mixed", tmp_path / "out2", kind="tars", progress=False)["splits"]["train"]["samples"] == 7
    globbed = pack(f"{sources['tars']}/train-00000[01].tar", tmp_path / "out3", progress=False)
    assert globbed["splits"]["train"]["samples"] == 14
    braces = pack(f"{sources['tars']}/val-{{000000..000001}}.tar", tmp_path / "out4", progress=False)
    assert braces["splits"]["val"]["samples"] == 12


def test_a_list_beside_images_is_told_of(tmp_path: Path) -> None:
    source = MAKERS["list"](tmp_path / "source", {"train": range(4)})
    result = pack(source.parent, tmp_path / "out", labels=False, progress=False)
    assert result["pack"]["kind"] == "folder"
    assert result["notes"] == [f"list.csv is not read; to take labels and metadata from it, pack {source}"]


def test_arrays_beside_images_are_left_out(tmp_path: Path) -> None:
    source = MAKERS["folder"](tmp_path / "source", {"train": range(4)})
    np.save(source / "train/ant/img0.npy", picture(0))  # of its features, say
    np.save(source / "train/ant/alone.npy", picture(9))
    result = pack(source, tmp_path / "out", progress=False)
    assert result["splits"]["train"]["samples"] == 5
    assert result["notes"] == ["1 .npy files beside an image of the same name are left out"]


def test_what_else_is_in_a_folder_is_told_of(tmp_path: Path) -> None:
    source = MAKERS["folder"](tmp_path / "source", {"train": range(4)})
    for name in ("a.bmp", "b.BMP", "c", "notes.txt", ".hidden.bmp", "list.csv"):
        (source / "train" / "ant" / name).write_bytes(b"x")
    (source / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    result = pack(source, tmp_path / "out", progress=False)
    (note,) = result["notes"]
    assert note.endswith(": 2 .bmp, 1 without a suffix, 1 .txt")
    assert result["skipped"] == [{"path": "train/ant/gone.png", "reason": "a link to nothing"}]
    only = tmp_path / "only"
    only.mkdir()
    for number in range(30):
        (only / f"1.2.{number}").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"holds no image \(.jpg, .*\), but 1 \.0, .*, 20 of other suffixes"):
        pack(only, tmp_path / "out2", progress=False)


def test_tables_without_pyarrow_say_what_to_install(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("table_files", "tables"):
        monkeypatch.delitem(sys.modules, f"data_pipelines.packing.sources.{name}", raising=False)
    with pytest.raises(ValueError, match=r"pip install '.\[parquet\]'"):
        pack(sources["parquet"], tmp_path / "out", progress=False)


def test_what_cannot_be_a_source_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    for spec, options, error, message in (
        (tmp_path / "notes.txt", {}, ValueError, r"is no source of images \(\.txt\)"),
        (tmp_path / "a.tar.gz", {}, ValueError, "is compressed; unpack it first"),
        (tmp_path / "none", {}, FileNotFoundError, "name the folder of your images"),
        (sources["folder"], {"kind": "zip"}, ValueError, "--from is 'zip'; it must be one of folder, stacks, tars"),
        (sources["folder"], {"kind": "list"}, ValueError, "name the list itself"),
        (sources["folder"], {"kind": "tars"}, FileNotFoundError, r"holds no \.tar file"),
        (sources["folder"], {"root": tmp_path}, ValueError, "--root is for lists"),
        (sources["tars"], {"columns": opening.Columns(label="x")}, ValueError, "--label-column are for tables"),
    ):
        with pytest.raises(error, match=message):
            pack(spec, tmp_path / "out", progress=False, **options)
    with pytest.raises(ValueError, match=r"a split is named '\.\./x'"):
        pack(sources["folder"] / "train", tmp_path / "out", split="../x", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["folder", "list", "tars"])
def test_a_file_too_large_for_an_image_is_left_out_unread(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A film under the name of an image would fill the memory."""
    images = [encode(picture(0)), encode(picture(1))]
    monkeypatch.setattr(pixels, "MAX_FILE_BYTES", 20_000)
    folder = tmp_path / "in"
    folder.mkdir()
    files = {"0.png": images[0], "film.jpg": bytes(20_001)}
    for name, stored in files.items():
        (folder / name).write_bytes(stored)
    source = folder
    if kind == "list":
        source = tmp_path / "list.csv"
        source.write_text("path\nin/0.png\nin/film.jpg\n")
    if kind == "tars":
        source = write_tar(tmp_path / "a.tar", list(files.items()))
    result = pack(source, tmp_path / "out", progress=False)
    assert result["splits"]["train"]["samples"] == 1
    assert result["skipped"][0]["reason"] == "a file of more than 20,000 bytes, which no image needs"
    with pytest.raises(ValueError, match=r"film\.jpg: a file of more than 20,000 bytes"):
        pack(source, tmp_path / "out2", bad="refuse", progress=False)


def test_a_link_to_no_json_is_no_sidecar(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(encode(picture(0)))
    (tmp_path / "in/0.json").symlink_to(tmp_path / "gone")
    assert pack(tmp_path / "in", tmp_path / "out", progress=False)["splits"]["train"]["samples"] == 1


def test_numbers_in_one_file_and_text_in_another_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, labels in enumerate([[2, 10], ["2", "b"]]):
        columns = {"image": [encode(picture(2 * number + place)) for place in range(2)], "label": labels}
        pq.write_table(pa.table(columns), tmp_path / f"in/train-{number}.parquet")
    with pytest.raises(ValueError, match=r"numbers as labels, such as \d+, and text, such as '2'.*one by one"):
        pack(tmp_path / "in", tmp_path / "out", progress=False)


def test_a_label_column_that_is_no_label_is_told_of(tmp_path: Path) -> None:
    columns = {"image": [encode(picture(0))], "label": [[0.5, 1.0]]}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    result = pack(tmp_path / "in.parquet", tmp_path / "out", progress=False)
    assert result["notes"] == ["column label is neither text nor whole numbers: no label, but in the json"]
