"""Packing: WebDataset reads it, it is the same every time, and a kill leaves nothing half done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import webdataset
from making import encode, picture

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.files import lock
from data_pipelines.packing import write as write_module
from data_pipelines.packing.pack_folder import alone_in
from data_pipelines.packing.sources import folder as folder_module
from data_pipelines.packing.write import pack
from data_pipelines.shards.scan import INDEX_SUFFIX

CLASSES = ("ant", "bee", "cat")
EVERY_KIND = (("jpg", "JPEG"), ("JPEG", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))


def make_tree(root: Path, count: int = 40, classes: tuple[str, ...] = CLASSES) -> Path:
    for number in range(count):
        folder = root / classes[number % len(classes)] / ("deep" if number % 5 == 0 else "")
        folder.mkdir(parents=True, exist_ok=True)
        suffix, format = EVERY_KIND[number % len(EVERY_KIND)]
        (folder / f"img_{number / 10}x.{suffix}").write_bytes(encode(picture(number), format))
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


def content(folder: Path) -> dict[str, str]:
    """A hash of every file but the indexes, which hold the shards' time of change."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(INDEX_SUFFIX))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_webdataset_and_we_read_back_every_image(tree: Path, tmp_path: Path) -> None:
    result = pack(tree, tmp_path, samples_per_shard=12, progress=False)
    shards = sorted(tmp_path.glob("train-*.tar"))
    assert [shard.name for shard in shards] == [f"train-{number:06d}.tar" for number in range(4)]
    originals = {path.read_bytes(): path for path in tree.rglob("*.*") if path.is_file()}
    assert len(originals) == 40
    found = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
    dataset = open_dataset(tmp_path)
    assert dataset.num_samples == len(found) == result["splits"]["train"]["samples"] == 40
    assert len({sample["__key__"] for sample in found}) == 40
    for number, sample in enumerate(found):
        (suffix,) = {"jpg", "jpeg", "png", "webp"} & sample.keys()
        label = CLASSES.index(originals.pop(sample[suffix]).relative_to(tree).parts[0])
        assert int(sample["cls"]) == label
        ours = dataset.read(number)
        assert (ours.key, ours.image, ours.label) == (sample["__key__"], sample[suffix], label)
    assert not originals
    assert dataset.shard_sizes == (10, 10, 10, 10)
    assert dataset.classes == CLASSES
    assert all(shard.with_name(shard.name + INDEX_SUFFIX).is_file() for shard in shards)


def test_dataset_json(tree: Path, tmp_path: Path) -> None:
    result = pack(tree, tmp_path, metadata={"licence": "CC0"}, progress=False)
    assert result == json.loads((tmp_path / "dataset.json").read_text())
    (shard,) = result["splits"]["train"]["shards"]
    stored = (tmp_path / shard["name"]).read_bytes()
    assert shard["sha256"] == hashlib.sha256(stored).hexdigest()
    assert shard["bytes"] == len(stored)
    assert result["splits"]["train"]["class_counts"] == [14, 13, 13]
    assert result["images"] == {"width": [24, 24, 24], "height": [20, 20, 20], "modes": {"RGB": 40}}
    assert result["metadata"] == {"licence": "CC0"}
    pixels = np.stack([picture(number) for number in range(40)]) / 255
    np.testing.assert_allclose(result["mean"], pixels.mean((0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(result["std"], pixels.std((0, 1, 2)), atol=0.02)  # JPEG and WebP lose some


def test_the_same_tree_and_seed_give_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copyfile)  # other times
    for name, root, seed, workers in (("a", tree, 0, 1), ("b", elsewhere, 0, 4), ("c", tree, 1, 2)):
        pack(root, tmp_path / name, samples_per_shard=7, val_share=0.2, seed=seed, workers=workers, progress=False)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_classes_are_mixed_and_val_is_stratified(tree: Path, tmp_path: Path) -> None:
    result = pack(tree, tmp_path, val_share=0.25, progress=False)
    assert result["splits"]["val"]["class_counts"] == [4, 3, 3]
    assert result["splits"]["train"]["class_counts"] == [10, 10, 10]
    labels = open_dataset(tmp_path).labels
    assert (np.diff(labels) == 0).sum() < 20
    keys = [set(open_dataset(tmp_path, split).index.keys) for split in ("train", "val")]
    assert not keys[0] & keys[1]


def test_split_folders_and_flat_folders(tmp_path: Path) -> None:
    make_tree(tmp_path / "images/train", 9)
    make_tree(tmp_path / "images/validation", 4, CLASSES[:2])
    result = pack(tmp_path / "images", tmp_path / "out", progress=False)
    assert {split: entry["samples"] for split, entry in result["splits"].items()} == {"train": 9, "val": 4}
    assert result["classes"] == list(CLASSES)
    assert result["splits"]["val"]["class_counts"] == [2, 2, 0]
    with pytest.raises(ValueError, match=r"a split val already \(train, val\).* where the images lie"):
        pack(tmp_path / "images", tmp_path / "other", val_share=0.1, progress=False)
    (tmp_path / "flat").mkdir()
    for number in range(3):
        (tmp_path / f"flat/{number}.png").write_bytes(encode(picture(number)))
    flat = pack(tmp_path / "flat", tmp_path / "flat-out", split="all", progress=False)
    assert flat["classes"] is None
    assert open_dataset(tmp_path / "flat-out", "all").labels.tolist() == [-1] * 3
    (tmp_path / "flat/cat").mkdir()
    (tmp_path / "flat/cat/4.png").write_bytes(encode(picture(4)))
    with pytest.raises(ValueError, match="beside the class folders, some of them in the topmost folder"):
        pack(tmp_path / "flat", tmp_path / "mixed", progress=False)


def test_keys_that_would_meet_stay_apart(tmp_path: Path) -> None:
    names = ["a b.png", "a_b.png", "a.b.png", "a.b.jpg", "é" * 50 + ".png", "x" * 150 + ".png", ".hidden.png"]
    (tmp_path / "images").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(encode(picture(number)))
    pack(tmp_path / "images", tmp_path / "out", progress=False)
    dataset = open_dataset(tmp_path / "out")
    keys = dataset.index.keys
    assert len(keys) == len(set(keys)) == 6
    assert not any("." in key or " " in key for key in keys)
    assert {dataset.read(number).image for number in range(6)} == {encode(picture(number)) for number in range(6)}


def test_a_split_or_shard_of_which_no_image_can_be_read_is_left_out(tmp_path: Path) -> None:
    for number in range(6):
        folder = tmp_path / "in" / ("val" if number < 2 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(picture(number)) if number > 1 else b"broken")
    result = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert result["splits"].keys() == {"train"}
    assert "no image of val can be read: there is no val" in result["notes"]
    assert result["num_skipped"] == 2
    assert not list((tmp_path / "out").glob("val-*"))
    assert verify(tmp_path / "out", progress=False)["ok"]
    assert pack(tmp_path / "in", tmp_path / "out", progress=False) == result


def test_sidecars_and_unreadable_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_tree(tmp_path / "images", 6)
    (images / "ant/broken.jpg").write_bytes(b"not an image")
    (images / "ant/img_0.3x.json").write_bytes(b'{"site": 4}')
    result = pack(images, tmp_path / "out")
    assert result["skipped"] == [{"path": "ant/broken.jpg", "reason": "not a JPEG, PNG, WebP, TIFF or npy image"}]
    assert result["splits"]["train"]["samples"] == 6
    assert "skipped ant/broken.jpg" in capsys.readouterr().out
    samples = webdataset.WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False)
    assert [sample["json"] for sample in samples if "json" in sample] == [b'{"site": 4}']


def test_the_size_of_shards(tree: Path, tmp_path: Path) -> None:
    total = sum(path.stat().st_size for path in tree.rglob("*.*") if path.is_file())
    result = pack(tree, tmp_path, bytes_per_shard=total // 4, progress=False)
    assert [shard["samples"] for shard in result["splits"]["train"]["shards"]] == [8] * 5


SLOW_PACK = """
import sys, time
from pathlib import Path
from data_pipelines.packing import shard_writer, write
member = shard_writer._member
def slowly(name, content):
    time.sleep(0.01)
    return member(name, content)
shard_writer._member = slowly
write.pack(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=4, workers=2, progress=False)
"""


@pytest.mark.parametrize("shards_done", [0, 3])
def test_killed_and_called_again_it_ends_as_if_undisturbed(tree: Path, tmp_path: Path, shards_done: int) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SLOW_PACK, str(tree), str(out)])
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < shards_done or not list(out.glob(".*.tar.*.tmp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "dataset.json").exists()
    whole = {
        path.name: path.stat().st_mtime_ns for path in out.glob("*.tar") if (out / f".pack/{path.name}.json").exists()
    }
    with pytest.raises(FileExistsError, match="holds part of another pack: seed is 1, there 0"):
        pack(tree, out, samples_per_shard=4, seed=1, progress=False)
    pack(tree, out, samples_per_shard=4, progress=False)
    pack(tree, tmp_path / "undisturbed", samples_per_shard=4, progress=False)
    assert content(out) == content(tmp_path / "undisturbed")
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole  # what was done was kept


def test_done_is_done_and_another_pack_is_refused(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack(tree, tmp_path / "out", samples_per_shard=30, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(write_module, "write_shard", lambda *_: pytest.fail("written again"))
        assert pack(tree, tmp_path / "out", samples_per_shard=30, progress=False) == first
    with pytest.raises(FileExistsError, match="samples_per_shard is 10, there 30"):
        pack(tree, tmp_path / "out", samples_per_shard=10, progress=False)
    other = make_tree(tmp_path / "other", 41)
    with pytest.raises(FileExistsError, match="the images are others"):
        pack(other, tmp_path / "out", samples_per_shard=30, progress=False)
    pack(other, tmp_path / "out", samples_per_shard=50, overwrite=True, progress=False)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["train-000000.tar"]
    assert open_dataset(tmp_path / "out").num_samples == 41


def test_a_plan_of_which_nothing_was_written_binds_nobody(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(write_module, "_check_space", full)
        with pytest.raises(OSError, match="no space"):
            pack(tree, tmp_path / "out", samples_per_shard=10, progress=False)
    assert pack(tree, tmp_path / "out", samples_per_shard=30, progress=False)["splits"]["train"]["samples"] == 40


def test_shards_of_other_origin_are_left_alone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="did not write"):
            pack(tree, tmp_path, overwrite=overwrite, progress=False)
    assert content(tmp_path).keys() == {"train-000000.tar"}


@pytest.mark.parametrize("stored", ["[" * 100_000, '{"pack": 3, "classes": ["a"]}', "no json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_strange_dataset_json_is_refused_in_words(tree: Path, tmp_path: Path, stored: str, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dataset.json").write_text(stored)
    with pytest.raises((FileExistsError, ValueError), match=r"take another folder|remove it or write it again"):
        pack(tree, tmp_path / "out", overwrite=overwrite, progress=False)
    assert (tmp_path / "out/dataset.json").read_text() == stored


def test_overwriting_removes_only_what_pack_wrote(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    pack(tree, out, samples_per_shard=10, progress=False)
    (out / "extra-000000.tar").write_bytes(b"precious")
    with monkeypatch.context() as patched:  # killed after some shards are gone
        patched.setattr(write_module.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(tree, out, samples_per_shard=1000, overwrite=True, progress=False)
    assert not (out / "dataset.json").exists()
    (out / "extra-000000.tar").rename(tmp_path / "extra.tar")  # else the next pack would call the folder not its own
    pack(tree, out, samples_per_shard=1000, progress=False)
    assert [path.name for path in out.glob("*.tar")] == ["train-000000.tar"]
    assert (tmp_path / "extra.tar").read_bytes() == b"precious"


def test_a_shard_without_its_receipt_is_removed_too(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:  # killed between a shard's final name and its receipt
        patched.setattr(write_module, "load_index", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(tree, out, samples_per_shard=10, workers=1, progress=False)
    assert list(out.glob("*.tar"))
    (out / ".train-000009.tar.x.tmp").write_bytes(b"of the killed call")
    pack(tree, out, samples_per_shard=1000, overwrite=True, progress=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json",
        "train-000000.tar",
        "train-000000.tar" + INDEX_SUFFIX,
        "train" + INDEX_SUFFIX,
    ]


@pytest.mark.parametrize("name", ["../precious-000000.tar", "notes.txt"])
def test_a_folder_from_elsewhere_cannot_have_files_removed(tree: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    (out / ".pack").mkdir(parents=True)
    (out / ".pack/doomed.json").write_text(json.dumps([name]))
    (out / name).write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="no name of a shard; nothing was removed"):
            pack(tree, out, overwrite=overwrite, progress=False)
    assert (out / name).read_bytes() == b"precious"


def test_two_packs_at_once_are_refused(tree: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(FileExistsError, match="another pack is writing"):
        pack(tree, tmp_path, progress=False)


def test_the_lock_of_a_pack_that_ends_just_now_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def removed_meanwhile(file: BinaryIO) -> bool:
        (tmp_path / ".pack.lock").unlink()
        return lock(file)

    monkeypatch.setattr("data_pipelines.packing.pack_folder.lock", removed_meanwhile)
    with pytest.raises(FileExistsError, match="another pack is writing"), alone_in(tmp_path):
        pass
    monkeypatch.undo()
    with alone_in(tmp_path):
        pass


def test_a_failure_leaves_no_half_shard(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = folder_module.read_exactly

    def fail(path: Path, size: int) -> bytes:
        if path.name == "img_2.2x.png":
            raise OSError("the disk is gone")
        return read(path, size)

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "read_exactly", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            pack(tree, tmp_path / "a", samples_per_shard=4, progress=False)
    assert not list((tmp_path / "a").glob(".*.tmp"))
    assert not (tmp_path / "a/dataset.json").exists()
    for root in ("a", "b"):
        pack(tree, tmp_path / root, samples_per_shard=4, progress=False)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_full_disk_is_told_in_a_line(tree: Path, tmp_path: Path) -> None:
    """By a limit on the size of files, which acts as a disk that is full, or a quota."""
    call = 'ulimit -f 8; exec "$0" -m launch pack "$1" "$2" --no-progress'
    ended = subprocess.run(
        ["bash", "-c", call, sys.executable, str(tree), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert f"{tmp_path / 'out'}/train-0" in ended.stderr
    assert not list((tmp_path / "out").glob("*.tar"))
    assert pack(tree, tmp_path / "out", progress=False)["splits"]["train"]["samples"] > 0


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name the folder of your images"):
        pack(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no image \(\.jpg"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="val_share is 1"):
        pack(tmp_path, tmp_path / "out", val_share=1.0)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.png").write_bytes(encode(picture(number)))
    (tmp_path / "in/cut.jpg").write_bytes(encode(picture(9, 200, 200), "JPEG")[:-2000])
    result = pack(tmp_path / "in", tmp_path / "out")
    assert result["statistics"]["bad"] == 1
    (named,) = result["statistics"]["bad_samples"]
    assert named.startswith("cut of train-000000.tar: ")
    assert f"packed, and cannot be decoded: {named}" in capsys.readouterr().out


@pytest.mark.parametrize("escape", ["\x1b[31m", "\x07", "\x9b2J", "\u202e", "\r"])
def test_no_name_writes_to_the_terminal(escape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("a", f"b{escape}"):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "good.png").write_bytes(encode(picture(len(label))))
    (tmp_path / f"in/a/bad{escape}.png").write_bytes(b"none")
    pack(tmp_path / "in", tmp_path / "out")
    told = capsys.readouterr()
    assert escape not in (told.out + told.err).replace("\r\n", "\n") or escape == "\r"
    assert f"bad{repr(escape)[1:-1]}.png: not a JPEG" in told.out
    assert f"b{repr(escape)[1:-1]} 1" in told.out
    with pytest.raises(ValueError, match="bad") as refused:
        pack(tmp_path / "in", tmp_path / "other", bad="refuse", progress=False)
    assert escape not in str(refused.value)
