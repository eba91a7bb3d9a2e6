"""What of a source is packed: leaving out, refusing, keys, and a memory that hardly grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from making import encode, picture, write_tar
from packs import content, make_folder, make_shards, read_back

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.packing import describe as describe_module
from data_pipelines.packing import write as write_module
from data_pipelines.packing.listing import Listing, ListingEntry, Membership
from data_pipelines.packing.write import pack


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_images_are_left_out_by_path_or_key(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", {"train": range(12)})
    before = pack(source, tmp_path / "before", progress=False)
    assert before["num_left_out"] == 0
    keys = {image: sample["key"] for image, sample in read_back(tmp_path / "before", "train").items()}
    lines = write_lines(
        tmp_path / "out.jsonl",
        {"path": "train/ant/img3.png", "reason": "a duplicate"},
        {"shard": str(tmp_path / "before/train-000000.tar"), "key": keys[encode(picture(5))], "split": "train"},
        {"key": "of another data set"},
    )
    result = pack(source, tmp_path / "after", leave_out=lines, progress=False)
    assert result["num_left_out"] == 2
    left = {image: sample["key"] for image, sample in read_back(tmp_path / "after", "train").items()}
    assert left == {image: key for image, key in keys.items() if image not in (encode(picture(3)), encode(picture(5)))}
    with pytest.raises(FileExistsError, match="leave_out is None"):
        pack(source, tmp_path / "after", progress=False)


def test_of_tars_a_key_is_left_out_of_its_shard_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, name in enumerate(("a", "b")):
        write_tar(
            tmp_path / f"in/{name}.tar",
            [("same.png", encode(picture(number))), (f"{name}.png", encode(picture(8 + number)))],
        )
    for line in ({"shard": "b.tar", "key": "same"}, {"shard": str(tmp_path / "in/b.tar"), "key": "same"}):
        lines = write_lines(tmp_path / "out.jsonl", line)
        pack(tmp_path / "in", tmp_path / "out", leave_out=lines, overwrite=True, progress=False)
        assert read_back(tmp_path / "out", "train").keys() == {encode(picture(number)) for number in (0, 8, 9)}


def test_a_list_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", {"train": range(3)})
    for text, message in (
        ('{"path": "cat/1.jpg"}\n', r"names no image .* the first image has the path 'train/ant/img0\.png'"),
        ("cat/1.jpg\n", r"line 1 is 'cat/1\.jpg'; a line is JSON"),
        ('\n{"reason": "x"}\n', "line 2 is"),
        (
            "".join(f'{{"path": "train/{name}/img{n}.png"}}\n' for n, name in enumerate(("ant", "bee", "cat"))),
            "all 3 images",
        ),
    ):
        (tmp_path / "out.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "out", leave_out=tmp_path / "out.jsonl", progress=False)
    (tmp_path / "out.jsonl").write_text("")  # a search that found nothing
    assert pack(source, tmp_path / "out", leave_out=tmp_path / "out.jsonl", progress=False)["num_left_out"] == 0


def with_bad(folder: Path, good: int = 20, bad: int = 3) -> Path:
    make_folder(folder, {"train": range(good)})
    for number in range(bad):
        (folder / f"train/ant/bad{number}.jpg").write_bytes(b"not an image")
    return folder


def test_bad_images_end_the_pack_by_choice_and_skipping_goes_on(tmp_path: Path) -> None:
    source = with_bad(tmp_path / "in")
    with pytest.raises(ValueError, match=r"bad\d\.jpg: not a JPEG.*--bad skip"):
        pack(source, tmp_path / "out", bad="refuse", samples_per_shard=5, workers=1, progress=False)
    assert not (tmp_path / "out/dataset.json").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    result = pack(source, tmp_path / "out", samples_per_shard=5, progress=False)
    assert result["num_skipped"] == 3
    pack(source, tmp_path / "other", samples_per_shard=5, progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "other")
    with pytest.raises(ValueError, match="3 images cannot be used"):  # all is done, and not as it is asked for now
        pack(source, tmp_path / "out", bad="refuse", samples_per_shard=5, progress=False)
    with pytest.raises(ValueError, match="bad is 'ignore'; it must be skip or refuse"):
        pack(source, tmp_path / "out", bad="ignore", progress=False)


def test_a_split_or_a_source_of_bad_images_only(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", {"train": range(4)})
    (source / "val/ant").mkdir(parents=True)
    (source / "val/ant/bad.jpg").write_bytes(b"")
    result = pack(source, tmp_path / "out", progress=False)
    assert {split: entry["samples"] for split, entry in result["splits"].items()} == {"train": 4}
    assert "no image of val can be read: there is no val" in result["notes"]
    with pytest.raises(ValueError, match="none of the 1 images can be read; the first, ant/bad"):
        pack(source / "val", tmp_path / "none", progress=False)


def test_damage_behind_the_header_is_found_by_a_full_check(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in", {"train": range(4)})
    cut = source / "train/ant/cut.jpg"
    cut.write_bytes(encode(picture(9, 200, 200), "JPEG")[:-2000])
    assert pack(source, tmp_path / "header", progress=False)["num_skipped"] == 0
    result = pack(source, tmp_path / "full", check="full", progress=False)
    assert [entry["path"] for entry in result["skipped"]] == ["train/ant/cut.jpg"]
    assert result["splits"]["train"]["samples"] == 4


def test_more_skipped_than_fit_are_listed_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe_module, "MAX_LISTED", 4)
    result = pack(with_bad(tmp_path / "in", bad=6), tmp_path / "out", progress=False)
    assert (result["num_skipped"], len(result["skipped"])) == (6, 4)
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert sorted(line["path"] for line in lines) == [f"train/ant/bad{number}.jpg" for number in range(6)]
    pack(make_folder(tmp_path / "good", {"train": range(3)}), tmp_path / "out", overwrite=True, progress=False)
    assert not (tmp_path / "out/skipped.jsonl").exists()


def test_too_little_space_is_told_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "in", {"train": range(3)})
    usage = write_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(write_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"the shards need about [\d,]+ bytes and .* has 1,000 free"):
        pack(source, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_index_of_all_shards_is_written(tmp_path: Path) -> None:
    pack(make_shards(tmp_path / "in", {"train": range(20), "val": range(5)}), tmp_path / "out", progress=False)
    assert {path.name for path in (tmp_path / "out").glob("*.index")} >= {"train.index", "val.index"}
    (tmp_path / "out").chmod(0o555)
    assert open_dataset(tmp_path / "out").num_samples == 20
    (tmp_path / "out").chmod(0o755)


def test_entries_are_read_back_as_they_were_added(tmp_path: Path) -> None:
    listing = Listing(tmp_path)
    entries = [
        ListingEntry(f"caf\udce9/{number}.png", number, number + 1, 1 << 40, number, number) for number in range(50)
    ]
    for number, entry in enumerate(entries):
        listing.add(entry, Membership("train", number % 3), None if number % 2 else f"own {number // 4}")
    listing.add(entries[7], Membership())
    listing.finish()
    assert [listing.entry(number) for number in range(50)] == entries
    assert listing.repeats.tolist() == [50]
    assert listing.sizes[:50].tolist() == [entry.size + entry.json_size for entry in entries]
    assert [listing.memberships[number].label for number in listing.membership_numbers[:4]] == [0, 1, 2, 0]
    keys = [listing.key(number) for number in range(50)]
    assert len(set(keys)) == 50
    assert keys[48] == "own_12"
    assert keys[1] == "caf_-1"
    assert keys[0].startswith("own_0-")  # two have that name
    assert not list(tmp_path.iterdir())  # the temporary file has no name
    listing.close()


MEMORY = """
import sys
from pathlib import Path
from types import SimpleNamespace
from data_pipelines.packing.listing import ListingEntry, Membership, Listing
from data_pipelines.packing.scan import scan
from data_pipelines.packing.write import _cut

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10

def plan(count):
    memberships = [Membership(None, f"class{number}") for number in range(100)]
    listing = Listing(Path(sys.argv[1]))
    for number in range(count):
        path = f"class{number % 100}/an image of some name {number:09d}.jpg"
        listing.add(ListingEntry(path, 100000), memberships[number % 100])
    listing.finish()
    source = SimpleNamespace(listing=listing, memberships=memberships, skipped=[], notes=[], classes=None)
    found = scan(source, val_share=0.1)
    settings = {"seed": 0, "samples_per_shard": 10000, "bytes_per_shard": 1 << 29}
    return found, [list(_cut(found, members, None, name, settings)) for name, members in found.splits.items()]

kept = plan(1000)
before = anonymous()
kept = plan(int(sys.argv[2]))
print(anonymous() - before)
"""


def test_an_entry_takes_some_dozens_of_bytes_of_memory(tmp_path: Path) -> None:
    count = 200_000
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(count)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 120 * count
