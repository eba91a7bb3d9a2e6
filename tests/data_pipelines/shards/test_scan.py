"""Indexes of our own shards, of foreign ones, and of damaged ones."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import encode, picture, sample_files, write_tar

from data_pipelines.shards.index import PER_SAMPLE, TABLES, Findings, Index
from data_pipelines.shards.index_format import read_index, write_joined
from data_pipelines.shards.scan import INDEX_SUFFIX, build_index, load_index
from data_pipelines.shards.tar import BLOCK, Member, TarDamageError, members


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_says(tmp_path: Path, format: int) -> None:
    draw = random.Random(0)
    long = "" if format == tarfile.USTAR_FORMAT else "/".join(["a-rather-long-folder"] * 8) + "/" + "ä" * 70
    names = ["a.jpg", "./b/c.cls", "deep/" * 20 + "d.png", long + "e.json", "empty.txt"]
    files = [(name, draw.randbytes(draw.choice([0, 1, 511, 512, 513, 3000]))) for name in names]
    path = write_tar(tmp_path / "x.tar", files, format)
    with tarfile.open(path, "a", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert list(members(path)) == expected


def test_every_cut_is_noticed_and_everything_before_it_is_used(tmp_path: Path) -> None:
    """At a member's boundary, in a header, in the bytes: WebDataset says nothing of the first."""
    whole = write_tar(tmp_path / "whole.tar", sample_files(range(4)))
    everything, content = list(members(whole)), whole.read_bytes()
    cut = tmp_path / "cut.tar"
    for end in (*(member.offset - BLOCK for member in everything), 700, everything[5].offset + 1, everything[3].offset):
        cut.write_bytes(content[:end])
        found: list[Member] = []
        with pytest.raises(TarDamageError, match="cut short"):
            found.extend(members(cut))
        assert found == [member for member in everything if member.offset + member.size <= end and member.offset <= end]


def test_a_corrupt_header_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", sample_files(range(3)))
    content = bytearray(path.read_bytes())
    content[list(members(path))[2].offset - BLOCK + 3] ^= 1
    path.write_bytes(content)
    index = build_index(path)
    assert index.findings[0].truncated
    assert index.keys == ("000000",)
    assert "corrupt header" in index.problems[0]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("stem", ["a.b.c", "v1.2/22.0/1.2", "scan.0001"])
def test_label_and_json_of_a_dotted_name_belong_to_its_image(stem: str, apart: bool, tmp_path: Path) -> None:
    """Also where they lie apart, as in tars sorted by kind."""
    files = [(f"{stem}.jpg", b"image"), (f"{stem}.cls", b"3"), (f"{stem}.json", b"{}")]
    between = [("z.jpg", b"other")]
    order = [files[0], *between, *files[1:]] if apart else [*files, *between]
    index = build_index(write_tar(tmp_path / "x.tar", order))
    assert index.labels.tolist() == [3, -1]
    assert index.json_sizes.tolist() == [2, 0]
    assert not index.findings


@pytest.mark.parametrize("apart", [False, True])
def test_a_bad_label_of_a_dotted_name_is_counted(apart: bool, tmp_path: Path) -> None:
    files = [("a.b.jpg", b"image"), ("a.b.cls", b"cat"), ("a.c.cls", b"of no image")]
    order = [files[0], ("z.jpg", b"other"), *files[1:]] if apart else files
    index = build_index(write_tar(tmp_path / "x.tar", order))
    assert index.labels.tolist()[0] == -1
    assert index.findings[0].num_bad_labels == 1


def test_what_the_index_holds(tmp_path: Path) -> None:
    files = [
        ("a.json", b"{}"),
        ("a.jpg", b"image"),
        ("a.cls", b"7\n"),
        ("sub/b.JPEG", b"other"),
        ("c.cls", b"3"),  # no image
        ("._a.jpg", b"litter of another system"),
        ("d.webp", b"w"),
        ("d.cls", b"cat"),  # not an integer
    ]
    path = write_tar(tmp_path / "x.tar", files)
    index = build_index(path)
    content = path.read_bytes()
    assert index.keys == ("a", "sub/b", "d")
    images = [content[o : o + s] for o, s in zip(index.image_offsets, index.image_sizes, strict=True)]
    assert images == [b"image", b"other", b"w"]
    assert index.labels.tolist() == [7, -1, -1]
    entry = index.entry(0, 0)
    assert content[entry.json_offset :][: entry.json_size] == b"{}"
    assert index.json_sizes.tolist() == [2, 0, 0]
    assert index.image_bytes.tolist() == [5 + 5 + 1]
    found = index.findings[0]
    assert (found.num_without_image, found.num_bad_labels, found.num_duplicates) == (1, 1, 0)
    assert len(index.problems) == 2


def test_dots_in_names_merge_and_it_is_said(tmp_path: Path) -> None:
    files = [
        (name, name.encode()) for name in ("img_0.5x.jpg", "img_0.7x.jpg", "img_1.jpg", "img_1.depth.png", "img_1.jpg")
    ]
    path = write_tar(tmp_path / "x.tar", files)
    index = build_index(path)
    assert index.keys == ("img_0", "img_1")
    content = path.read_bytes()
    images = [content[o : o + s] for o, s in zip(index.image_offsets, index.image_sizes, strict=True)]
    assert images == [b"img_0.5x.jpg", b"img_1.jpg"]  # the first; the plain suffix before the compound one
    assert index.findings[0].num_duplicates == 2
    assert "img_0.7x.jpg" in index.problems[0]


def test_an_array_is_the_image_only_where_nothing_else_is(tmp_path: Path) -> None:
    names = ("a.npy", "a.jpg", "b.tif", "b.npy", "c.features.npy", "c.mask.npy", "c.left.png", "d.mask.npy", "d.npy")
    names += ("e.tiff", "f.first.npy", "f.second.npy", "a.more.npy")
    path = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    index = build_index(path)
    content = path.read_bytes()
    images = [content[o : o + s] for o, s in zip(index.image_offsets, index.image_sizes, strict=True)]
    assert images == [b"a.jpg", b"b.tif", b"c.left.png", b"d.npy", b"e.tiff", b"f.first.npy"]
    assert not index.problems  # several arrays beside an image are usual


def slow_index(path: Path) -> dict[str, tuple[Any, ...]]:
    """Key -> image and label, by grouping members in a dictionary."""
    found: dict[str, dict[str, tuple[Any, ...]]] = {}
    for name, offset, size in members(path):
        key, _, suffix = name.partition(".")
        found.setdefault(key, {}).setdefault(suffix, (offset, size))
    content = path.read_bytes()
    return {
        key: (*parts["jpg"], int(content[parts["cls"][0] :][: parts["cls"][1]]) if "cls" in parts else -1)
        for key, parts in found.items()
        if "jpg" in parts
    }


def test_members_of_a_key_may_lie_apart(tmp_path: Path) -> None:
    """As in tars sorted by kind, where all images come before all labels; and in any order at all."""
    draw = random.Random(1)
    files = [
        (f"{key}.{kind}", str(draw.randrange(99)).encode()) for key in range(40) for kind in ("jpg", "cls", "json")
    ]
    for number in range(20):
        chosen = [draw.choice(files) for _ in range(60)] if number else sorted(files, key=lambda file: file[0][-1])
        path = write_tar(tmp_path / f"{number}.tar", chosen)
        index = build_index(path)
        entries = [index.entry(0, row) for row in range(len(index))]
        assert [(e.key, (e.image_offset, e.image_size, e.label)) for e in entries] == list(slow_index(path).items())


def same(a: Index, b: Index) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in (*TABLES, *PER_SAMPLE, "keys_bytes"))
    return arrays and a.names == b.names and a.findings == b.findings


def test_stored_beside_the_shard_and_read_back_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(
        tmp_path / "x.tar", [*sample_files(range(3)), ("ä\udcff.png", encode(picture(0))), ("b.cls", b"1")]
    )
    first = load_index(path)
    assert path.with_name("x.tar" + INDEX_SUFFIX).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.tar", "x.tar" + INDEX_SUFFIX]  # no temporary name left
    monkeypatch.setattr("data_pipelines.shards.scan.build_index", lambda shard: pytest.fail("built again"))
    assert same(first, load_index(path))


@pytest.mark.parametrize("damage", ["size", "time", "garbage", "cut", "empty"])
def test_a_stale_or_damaged_index_is_built_again(tmp_path: Path, damage: str) -> None:
    path = write_tar(tmp_path / "x.tar", sample_files(range(3)))
    load_index(path)
    stored = path.with_name("x.tar" + INDEX_SUFFIX)
    if damage == "size":
        write_tar(path, sample_files(range(5)))
    elif damage == "time":
        write_tar(path, sample_files([3, 4, 5]))
        os.utime(path, ns=(1, 1))
    else:
        content = stored.read_bytes()
        stored.write_bytes({"garbage": b"x" * 400, "cut": content[: len(content) // 2], "empty": b""}[damage])
    assert same(load_index(path), build_index(path))


@pytest.mark.parametrize(
    "forged",
    [
        {"image_blocks": [0, 0, 10**6]},  # beyond the shard
        {"image_sizes": [1, 1, 2**32 - 1]},
        {"image_blocks": [1, 2, 2**64 - 1]},
        {"image_blocks": [1, 2, 3]},  # within it, and not what the digest stands for
        {"labels": [0, 1, -2]},
        {"key_ends": [12, 6, 18]},
        {"key_ends": [6, 12, 17]},
        {"labels": [0, 1]},  # of another number of samples
        {"labels": [0.0, 1.0, 2.0]},
        {"keys_ends": [17]},
        {"ends": [4]},
        {"names": ("other.tar",)},
        {"findings": {7: Findings(("of a shard that is not there",))}},
    ],
)
def test_an_index_from_elsewhere_is_not_taken_at_its_word(tmp_path: Path, forged: dict[str, Any]) -> None:
    path = write_tar(tmp_path / "x.tar", sample_files(range(3)))
    sound = load_index(path)
    changed = {}
    for name, value in forged.items():
        kind = None if name in ("names", "findings") else "<u8" if max(value) > 2**32 else getattr(sound, name).dtype
        changed[name] = value if kind is None else np.array(value, dtype=kind)
    with path.with_name("x.tar" + INDEX_SUFFIX).open("wb") as file:
        write_joined(file, [lambda: dataclasses.replace(sound, **changed)])
    assert same(load_index(path), build_index(path))


def test_any_flipped_bit_of_the_stored_index_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [*sample_files(range(3)), ("000001.json", b"{}")])
    fresh = load_index(path)
    stored = path.with_name("x.tar" + INDEX_SUFFIX)
    content, draw = stored.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        stored.write_bytes(damaged)
        assert same(load_index(path), fresh)


def test_long_keys_and_large_labels_are_kept_whole(tmp_path: Path) -> None:
    files = [("a" * 3000 + ".jpg", b"i"), ("a" * 3000 + ".cls", b"9" * 18)]
    path = write_tar(tmp_path / "x.tar", files, tarfile.PAX_FORMAT)
    index = load_index(path)
    assert index.labels.tolist() == [10**18 - 1]
    assert read_index(path.with_name("x.tar" + INDEX_SUFFIX)).keys == ("a" * 3000,)


def test_a_read_only_folder_keeps_its_index_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SELFSIGHT_CACHE", str(cache))
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_tar(folder / "x.tar", sample_files(range(3)))
    folder.chmod(0o555)
    try:
        first = load_index(path)
        assert [p.name for p in folder.iterdir()] == ["x.tar"]
        assert len(list(cache.rglob("*" + INDEX_SUFFIX))) == 1
        monkeypatch.setattr("data_pipelines.shards.scan.build_index", lambda shard: pytest.fail("built again"))
        assert same(first, load_index(path))
    finally:
        folder.chmod(0o755)


def test_problems_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "x.tar", sample_files(range(3)))
    path.write_bytes(path.read_bytes()[:-11000])
    with caplog.at_level(logging.WARNING):
        index = load_index(path)
    assert index.findings[0].truncated
    assert "cut short" in caplog.text
