"""Making a store: what is in it, that it goes on after any end, and that several processes make the same one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_pipelines.datasets.dataset import open_dataset
from eval.embed import embed, open_all
from eval.features import extract
from eval.store.description import Description, rows_per_part
from eval.store.parts import part_rows
from eval.store.reading import open_store
from eval.target import open_target
from tests.eval.store.conftest import save

ROOT = Path(__file__).parents[3]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "parquet").glob("part-*")}


def test_a_store_holds_every_sample_with_all_that_is_known_of_it(make, data, target):
    folder = make()
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    found = json.loads((folder / "train" / "store.json").read_text())
    assert (found["num_samples"], found["parts"], found["complete"]["rows"]) == (150, 5, 150)
    assert found["layout"]["inputs"]["class of last 4"] == [0, 48]
    assert found["crops"] == {"size": 16, "channels": 3, "bits": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    table = pq.read_table(folder / "train" / "parquet")
    names = ["sample", "key", "label", "metadata", "digest"]
    assert table.column_names == [*names, *(f"class of block -{back}" for back in (4, 3, 2)), "class", "mean"]
    dataset = open_dataset(data)
    assert table["sample"].to_pylist() == list(range(150))
    assert table["key"].to_pylist() == [dataset.key(sample)[0] for sample in range(150)]
    assert table["label"].to_pylist() == [None if label < 0 else label for label in dataset.labels.tolist()]
    assert json.loads(table["metadata"][7].as_py()) == {"patient": "p0", "age": 7}
    subject = open_target(str(target))
    known = extract(subject.encoder, dataset, size=16, mean=subject.mean, std=subject.std, progress=False)
    stored = np.stack(table["class"].to_numpy(zero_copy_only=False))[dataset.labels >= 0]
    np.testing.assert_allclose(stored, known.inputs["class"].numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_there_is_not_made_again(make, monkeypatch):
    folder = make() / "train"
    before = {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make()
    assert {path.name: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    whole = files(folder)
    (folder / "parquet" / "part-00002-of-00005.parquet").unlink()
    damaged = folder / "parquet" / "part-00004-of-00005.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    made = []
    monkeypatch.setattr("eval.store.embedding.write_part", lambda path, *more: made.append((path.name, more)))
    make()
    assert [name for name, _ in made] == ["part-00002-of-00005.parquet", "part-00004-of-00005.parquet"]
    monkeypatch.undo()
    monkeypatch.setattr("eval.embed.rows_per_part", lambda num_bytes: 32)
    make()
    assert files(folder) == whole


def test_several_processes_make_the_store_of_one(make):
    whole = files(make() / "train")
    folder = make("shared", rank=1, world_size=3) / "train"
    assert sorted(files(folder)) == ["part-00001-of-00005.parquet", "part-00004-of-00005.parquet"]
    assert json.loads((folder / "store.json").read_text())["complete"] is None
    with pytest.raises(ValueError, match="2 of 5 parts are there"):
        open_store(folder)
    for rank in (2, 0):
        make("shared", rank=rank, world_size=3)
    assert files(folder) == whole
    assert json.loads((folder / "store.json").read_text())["complete"]["rows"] == 150


def test_other_features_are_refused_with_the_difference(make, tmp_path, data, write_shard):
    make()
    with pytest.raises(ValueError, match=r"crops\.size: 16 there, 8 asked"):
        make(image_size=8)
    with pytest.raises(ValueError, match=r"encoder: .* there, .* asked.*choose another --out"):
        make(whose=save(tmp_path / "other", seed=4))
    with pytest.raises(ValueError, match='tokens: null there, "float16" asked'):
        make(tokens=True)
    write_shard(data / "train-000001.tar", [0] * 75, seed=9)
    with pytest.raises(ValueError, match="data: "):
        make()


def test_what_cannot_be_read_is_counted_named_and_left_out(make, data, write_shard, tmp_path):
    tar = data / "train-000000.tar"
    content = bytearray(tar.read_bytes())
    place = content.index(b"train-000000-00040.png") + 512
    content[place : place + 64] = bytes(64)
    tar.write_bytes(content)
    folder = make()
    complete = json.loads((folder / "train" / "store.json").read_text())["complete"]
    assert complete == {"rows": 149, "unreadable": 1, "unreadable_keys": ["train-000000-00040"]}
    features = open_store(folder)["train"].feature_set()
    assert features.ids.tolist() == [number for number in range(150) if number != 40]


def test_killed_at_any_time_it_goes_on(target, data, tmp_path):
    """The process dies while it computes its third part; a whole one is made by who comes next."""
    code = f"""
import os, signal, sys
import eval.embed, eval.store.embedding as embedding
eval.embed.rows_per_part = lambda num_bytes: 32
plain = embedding._write_part
def write(block, dataset, folder, description, number):
    if number == 2:
        (folder / "parquet" / ".part-00002-of-00005.parquet.ab.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    plain(block, dataset, folder, description, number)
embedding._write_part = write
eval.embed.embed({str(target)!r}, {str(data)!r}, {str(tmp_path / "killed")!r}, progress=False, batch_size=16)
"""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "killed" / "train"
    assert sorted(files(folder)) == ["part-00000-of-00005.parquet", "part-00001-of-00005.parquet"]
    time.sleep(0.01)
    before = (folder / "parquet" / "part-00000-of-00005.parquet").stat().st_mtime_ns
    resume = pytest.MonkeyPatch()
    resume.setattr("eval.embed.rows_per_part", lambda num_bytes: 32)
    embed(str(target), str(data), tmp_path / "killed", progress=False, say=lambda line: None)
    resume.undo()
    assert (folder / "parquet" / "part-00000-of-00005.parquet").stat().st_mtime_ns == before
    assert not list((folder / "parquet").glob(".part*"))
    assert len(open_store(folder)["train"]) == 150


def test_no_room_is_told_in_bytes_before_any_work(make, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"would take 36\.0 kB \(36,000 bytes\), and the disk .* \(1,000 bytes\) free"):
        make()


def test_parts_are_of_a_size_that_fits_into_memory():
    assert rows_per_part(1000) == 8192
    assert rows_per_part(5120 * 4) == 8192  # ViT-L without tokens
    assert rows_per_part(5120 * 4 + 196 * 1024 * 2) == 512  # and with
    assert rows_per_part(1 << 40) == 64
    description = Description({"num_samples": 100, "rows_per_part": 32}, {})
    assert [len(description.part(number)) for number in range(description.num_parts)] == [32, 32, 32, 4]


def test_a_part_of_another_store_is_refused(make):
    folder = make() / "train"
    with pytest.raises(ValueError, match="another encoder, data or crops"):
        part_rows(folder / "parquet" / "part-00000-of-00005.parquet", "0" * 64)


def test_splits(data):
    assert [name for name, _ in open_all(str(data), "all")] == ["train", "val"]
    assert [name for name, _ in open_all(str(data / "val-000000.tar"), "all")] == ["train"]
    with pytest.raises(ValueError, match="all or one of train, val, test"):
        open_all(str(data), "trian")
    with pytest.raises(FileNotFoundError):
        open_all(str(data), "test")


def test_tokens(make, data, target):
    folder = make(tokens=True)
    found = open_store(folder)["train"].feature_set()
    assert (found.tokens.grid, found.tokens.dim, len(found.tokens)) == ((4, 4), 12, 150)
    rows = torch.tensor([149, 3, 3])
    tokens = found.tokens[rows]
    assert (tokens.shape, tokens.dtype) == ((3, 16, 12), torch.float32)
    torch.testing.assert_close(tokens.mean(dim=1), found.inputs["mean"][rows], rtol=2e-3, atol=2e-3)


def test_two_that_make_the_same_store_at_once_both_end_well(make, monkeypatch):
    """Who finds all parts there tidies up, also what the other one is about to rename."""
    import eval.store.embedding as embedding

    plain, folder = embedding.write_part, make()
    for path in (folder / "train" / "parquet").glob("part-*"):
        path.unlink()

    def overtaken(path, *rest):
        plain(path, *rest)  # the other one's
        raise FileNotFoundError(path)  # ours, whose file is gone

    monkeypatch.setattr(embedding, "write_part", overtaken)
    assert embedding.Description.read(make() / "train").rows == 150
