"""Tars as a source: what of them is packed, and what is said of the rest."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from making import encode, picture, write_tar
from packs import read_back

from data_pipelines.packing.sources.splits import split_of
from data_pipelines.packing.write import pack
from data_pipelines.shards.scan import load_index

IMAGES = [encode(picture(number)) for number in range(12)]


def array(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, picture(number))
    return file.getvalue()


def test_keys_are_kept_and_made_unique_over_the_tars(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/a.tar", [("cat.png", IMAGES[0]), ("cat.cls", b"4"), ("both.png", IMAGES[1])])
    write_tar(tmp_path / "in/b.tar", [("dog.left.png", IMAGES[2]), ("both.png", IMAGES[3]), ("x/y z.png", IMAGES[4])])
    result = pack(tmp_path / "in", tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    keys = {number: found[IMAGES[number]]["key"] for number in range(5)}
    assert (keys[0], keys[2], keys[4]) == ("cat", "dog", "x-y_z")
    assert keys[1] != keys[3]
    assert keys[1].startswith("both-")
    assert (result["classes"], result["splits"]["train"]["class_counts"]) == (None, [0, 0, 0, 0, 1])


def test_a_sample_is_what_our_reader_takes_for_one(tmp_path: Path) -> None:
    """Members of a key apart, several images of a key, compound suffixes: the same image as `Dataset` reads."""
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("1.depth.png", IMAGES[0]),
            ("1.png", IMAGES[1]),
            ("1.jpg", IMAGES[2]),
            ("2.mask.png", IMAGES[3]),
            ("3.txt", b"text"),
            ("__meta__/4.png", IMAGES[4]),
            ("5.png", IMAGES[5]),
            ("1.cls", b"7"),
            ("1.cls", b"8"),
            ("5.cls", b"seven"),
            ("6.features.npy", array(6)),
            ("6.npy", array(7)),
            ("7.npy", array(8)),
            ("7.webp", IMAGES[7]),
        ],
    )
    index = load_index(tar)
    content = tar.read_bytes()
    expected = {
        content[offset : offset + size]: None if label < 0 else label
        for offset, size, label in zip(
            index.image_offsets.tolist(), index.image_sizes.tolist(), index.labels.tolist(), strict=True
        )
    }
    result = pack(tar, tmp_path / "out", progress=False)
    assert {image: sample["label"] for image, sample in read_back(tmp_path / "out", "train").items()} == expected
    assert result["skipped"] == [{"path": "a.tar/3", "reason": "a key without an image"}]
    assert result["notes"] == [
        "members other than one image, its maps, .cls, .json and .txt a key are left out: "
        "1 .jpg, 1 .features.npy, 1 .npy",
        "1 .cls members are no number of 0 or more; their images have no label",
    ]


@pytest.mark.parametrize("outer", ["", "./", "photos/2024/"])
def test_archives_of_class_folders(tmp_path: Path, outer: str) -> None:
    files = [(f"{outer}train/{'ab'[number % 2]}/{number}.5.png", IMAGES[number]) for number in range(6)]
    files += [(f"{outer}val/a/6.5.png", IMAGES[6]), (f"{outer}.hidden.png", b"x")]
    result = pack(write_tar(tmp_path / "a.tar", files), tmp_path / "out", progress=False)
    assert result["classes"] == ["a", "b"]
    found = read_back(tmp_path / "out", "train")
    assert [found[IMAGES[number]]["label"] for number in range(6)] == [0, 1] * 3
    assert read_back(tmp_path / "out", "val")[IMAGES[6]]["label"] == 0


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["README.md", "ds/README.txt", "ds/LICENSE", "ds/train/labels.csv", "ds/classes.json"])
def test_what_lies_beside_class_folders_makes_no_shards_of_them(tmp_path: Path, name: str, first: bool) -> None:
    """Else the images of val would be trained on, and all labels be gone."""
    places = [("train/cat", 0), ("train/dog", 1), ("val/cat", 2), ("val/dog", 3)]
    files = [(f"ds/{folder}/{number}.png", IMAGES[number]) for folder, number in places]
    result = pack(
        write_tar(tmp_path / "a.tar", [(name, b"x"), *files] if first else [*files, (name, b"x")]),
        tmp_path / "out",
        progress=False,
    )
    assert result["classes"] == ["cat", "dog"]
    for split in ("train", "val"):
        found = read_back(tmp_path / "out", split)
        expected = {IMAGES[number]: number % 2 for folder, number in places if folder.startswith(split)}
        assert {image: sample["label"] for image, sample in found.items()} == expected


@pytest.mark.parametrize("kind", ["cls", "json", "CLS"])
def test_labels_and_json_of_images_in_folders_are_those_of_shards(tmp_path: Path, kind: str) -> None:
    files = [(f"{folder}/{number}.png", IMAGES[number]) for number, folder in enumerate(["ant", "val"])]
    files += [(f"{folder}/{number}.{kind}", b"7") for number, folder in enumerate(["ant", "val"])]
    result = pack(write_tar(tmp_path / "a.tar", files), tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    assert result["classes"] is None
    assert [(found[image]["label"], found[image]["json"]) for image in IMAGES[:2]] == (
        [(None, 7)] * 2 if kind == "json" else [(7, None)] * 2
    )


@pytest.mark.parametrize("more", ["cls", "json", "logo"])
def test_folders_of_splits_in_shards_are_no_less_splits(tmp_path: Path, more: str) -> None:
    """Whatever makes shards of a tar, the images of val are not trained on."""
    places = ["ds/train/ant/0", "ds/train/bee/1", "ds/val/ant/2"]
    files = [(f"{place}.png", IMAGES[number]) for number, place in enumerate(places)]
    files += [("logo.png", IMAGES[3])] if more == "logo" else [(f"{place}.{more}", b"5") for place in places]
    source = write_tar(tmp_path / "a.tar", files)
    pack(source, tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "val")
    assert [(image, sample["label"]) for image, sample in found.items()] == [(IMAGES[2], 5 if more == "cls" else None)]
    assert len(read_back(tmp_path / "out", "train")) == len([name for name, _ in files if name.endswith("png")]) - 1
    result = pack(source, tmp_path / "one", split_folders=False, progress=False)
    assert result["splits"].keys() == {"train"}


def test_archives_named_train_and_val_are_splits(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, name in enumerate(["train", "val"]):
        members = [
            (f"{name}-images/{label}/{number}.png", IMAGES[2 * number + place]) for place, label in enumerate("ab")
        ]
        write_tar(tmp_path / f"in/{name}.tar", members)
    result = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert result["classes"] == ["a", "b"]
    for number, name in enumerate(["train", "val"]):
        found = read_back(tmp_path / "out", name)
        assert [found[IMAGES[2 * number + place]]["label"] for place in range(2)] == [0, 1]


@pytest.mark.parametrize("outer", ["", "./", "/data/"])
def test_an_archives_duplicates_can_be_left_out(tmp_path: Path, outer: str) -> None:
    members = [(f"{outer}{name}.png", IMAGES[number]) for number, name in enumerate(["cat/1", "cat/2", "dog/3"])]
    tar = write_tar(tmp_path / "a.tar", members)
    names = [json.dumps({"shard": str(tar), "key": key}) for key in load_index(tar).keys if key.endswith("cat/2")]
    (tmp_path / "list").write_text("\n".join(names))
    result = pack(tar, tmp_path / "out", leave_out=tmp_path / "list", progress=False)
    assert (result["num_left_out"], result["classes"]) == (1, ["cat", "dog"])
    assert read_back(tmp_path / "out", "train").keys() == {IMAGES[0], IMAGES[2]}


@pytest.mark.parametrize("first", ["empty", "no bytes"])
@pytest.mark.parametrize("folder", ["", "folder/"])
def test_labels_survive_a_first_tar_without_samples(tmp_path: Path, first: str, folder: str) -> None:
    (tmp_path / "in").mkdir()
    tar = write_tar(tmp_path / "in/train-000000.tar", [])
    if first == "no bytes":
        tar.write_bytes(b"")
    members = [(f"{folder}1.png", IMAGES[1]), (f"{folder}1.cls", b"5"), (f"{folder}1.json", b"{}")]
    write_tar(tmp_path / "in/train-000001.tar", members)
    pack(tmp_path / "in", tmp_path / "out", progress=False)
    sample = read_back(tmp_path / "out", "train")[IMAGES[1]]
    assert (sample["label"], sample["json"]) == (5, {})


def test_labels_among_archives_are_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/a.tar", [("cat/1.png", IMAGES[1])])
    write_tar(tmp_path / "in/b.tar", [("2.png", IMAGES[2]), ("2.cls", b"5")])
    with pytest.raises(ValueError, match=r"b\.tar holds labels \(2\.cls\).*one kind at a time"):
        pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert pack(tmp_path / "in", tmp_path / "out", labels=False, progress=False)["splits"]["train"]["samples"] == 2


def test_labels_that_mean_other_classes_are_not_mixed(tmp_path: Path) -> None:
    for number, classes in enumerate([["ant", "bee"], ["cat", "dog"], ["ant", "bee"]]):
        (tmp_path / f"in/{number}").mkdir(parents=True)
        write_tar(tmp_path / f"in/{number}/a-{number}.tar", [("1.png", IMAGES[number]), ("1.cls", b"1")])
        (tmp_path / f"in/{number}/dataset.json").write_text(json.dumps({"classes": classes}))
    with pytest.raises(ValueError, match=r"other classes in .*/in/0 and .*/in/1.*one by one.*--no-labels"):
        pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert pack(tmp_path / "in", tmp_path / "out", labels=False, progress=False)["splits"]["train"]["samples"] == 3
    same = pack(tmp_path / "in/{0,2}/a-*.tar", tmp_path / "same", progress=False)
    assert same["classes"] == ["ant", "bee"]


def test_of_a_tar_cut_short_the_rest_is_packed_or_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{number}.png", IMAGES[number]) for number in range(6)])
    tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.tar: cut short.*--bad skip"):
        pack(tar, tmp_path / "out", bad="refuse", progress=False)
    assert not (tmp_path / "out").exists()
    result = pack(tar, tmp_path / "out", progress=False)
    assert 0 < result["splits"]["train"]["samples"] < 6
    (skipped,) = result["skipped"]
    assert skipped["path"] == "a.tar"
    assert "what lies before that is used" in skipped["reason"]


def test_names_that_mean_harm_stay_names(tmp_path: Path) -> None:
    names = ["../../etc/passwd.png", "/root/x.png", "caf\udce9.png", "é.png", "a" * 200 + ".png", "line\nbreak.png"]
    files = [(name, IMAGES[number]) for number, name in enumerate(names)]
    tar = write_tar(tmp_path / "a.tar", files, tarfile.GNU_FORMAT)
    pack(tar, tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    assert found.keys() == set(IMAGES[: len(names)])
    assert all(set(sample["key"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for sample in found.values())


def test_links_and_what_is_behind_the_end_are_told(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        info = tarfile.TarInfo("1.png")
        info.size = len(IMAGES[0])
        archive.addfile(info, io.BytesIO(IMAGES[0]))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    tar.write_bytes(tar.read_bytes() + write_tar(tmp_path / "b", [("3.png", IMAGES[1])]).read_bytes())
    result = pack(tar, tmp_path / "out", progress=False)
    assert read_back(tmp_path / "out", "train").keys() == {IMAGES[0]}
    assert result["skipped"] == [
        {"path": "a.tar/2.png", "reason": "a link, whose bytes are not in the archive as they are"}
    ]
    assert result["notes"] == ["a.tar: another tar behind its end marker is left out"]


def test_splits_by_the_names_of_files_and_folders(tmp_path: Path) -> None:
    for folder, names in (("a", ["train/0", "validation/0"]), ("b", ["train-000000", "test-000000"]), ("c", ["x-0"])):
        for number, name in enumerate(names):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_tar(tmp_path / folder / f"{name}.tar", [("k.png", IMAGES[number])])
    assert pack(tmp_path / "a", tmp_path / "out-a", progress=False)["splits"].keys() == {"train", "val"}
    assert pack(tmp_path / "b", tmp_path / "out-b", progress=False)["splits"].keys() == {"train", "test"}
    assert pack(tmp_path / "c", tmp_path / "out-c", progress=False)["splits"].keys() == {"train"}
    names = ["cifar10-train-00000-of-00002.arrow", "cifar10-test.arrow", "photos_valid.tar"]
    assert [split_of(name) for name in names] == ["train", "test", "val"]
    write_tar(tmp_path / "b/other.tar", [("k.png", IMAGES[5])])
    with pytest.raises(ValueError, match=r"1 of 3 files belong to no split, the first of them other\.tar"):
        pack(tmp_path / "b", tmp_path / "out-d", progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_tars_are_not_packed_onto_themselves(tmp_path: Path, overwrite: bool) -> None:
    tar = write_tar(tmp_path / "train-000000.tar", [("1.png", IMAGES[0])])
    pack(tar, tmp_path / "out", progress=False)
    before = (tmp_path / "out/train-000000.tar").read_bytes()
    with pytest.raises(ValueError, match="holds the tars that are to be packed; take another folder"):
        pack(tmp_path / "out", tmp_path / "out", seed=1, overwrite=overwrite, progress=False)
    assert (tmp_path / "out/train-000000.tar").read_bytes() == before


def test_no_image_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image in"):
        pack(write_tar(tmp_path / "a.tar", [("a.txt", b"x")]), tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    "name", ["scan.{:04d}.png", "a/p1.s.{:d}.png", "v1.2/x.{:d}.5.png", "photo.{}.png", "cam{}.day1.png"]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_images_of_dotted_names_are_all_kept_with_their_labels(tmp_path: Path, name: str, labelled: bool) -> None:
    words = ["rome", "oslo", "paris", "bern", "wien", "bonn"]
    names = [name.format(words[number] if name.startswith("photo") else number) for number in range(6)]
    files = [(one, IMAGES[number]) for number, one in enumerate(names)]
    files += [(one.removesuffix("png") + "cls", b"%d" % number) for number, one in enumerate(names) if labelled]
    result = pack(write_tar(tmp_path / "x.tar", files), tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    if labelled or "/" not in name:
        expected = [number if labelled else None for number in range(6)]
        assert [found[image]["label"] for image in IMAGES[:6]] == expected
    assert len(found) == 6
    assert result["num_skipped"] == 0


@pytest.mark.parametrize("name", ["a.b.c", "v1.2/22.0/1.2"])
def test_a_label_of_a_dotted_name_is_its_images(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "x.tar", [(f"{name}.png", IMAGES[0]), (f"{name}.cls", b"7"), (f"{name}.json", b"{}")])
    pack(tar, tmp_path / "out", progress=False)
    sample = read_back(tmp_path / "out", "train")[IMAGES[0]]
    assert (sample["label"], sample["json"]) == (7, {})
    assert load_index(tar).labels.tolist() == [7]


def test_fields_of_a_sample_are_no_images_of_their_own(tmp_path: Path) -> None:
    files = [
        (f"{n}.{field}.png", IMAGES[2 * n + place]) for n in range(3) for place, field in enumerate(("rgb", "seg"))
    ]
    files += [(f"{n}.cls", b"%d" % n) for n in range(3)]
    result = pack(write_tar(tmp_path / "x.tar", files), tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    assert [found[IMAGES[2 * n]]["label"] for n in range(3)] == [0, 1, 2]
    assert result["notes"] == [
        "members other than one image, its maps, .cls, .json and .txt a key are left out: 3 .seg.png"
    ]


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([["0.left", "0.right", "1.left", "1.right", "2.left", "2.right"], ["3.left", "3.right"]], [0, 2, 4, 6]),
        ([["3.left", "3.right"], ["0.left", "0.right", "1.left", "1.right"]], [0, 2, 4]),
        ([["scan.0", "scan.1"], ["other.7"], ["x.8.jpg.9"], ["y.0", "y.2"]], list(range(6))),
        ([["trip.rome", "trip.oslo"], ["walk.bern", "walk.rome"]], [0, 1, 2, 3]),
    ],
)
def test_of_views_or_samples_all_tars_decide_together(
    tmp_path: Path, shards: list[list[str]], expected: list[int]
) -> None:
    """A last shard of one key says little by itself; what the keys hold would change from shard to shard."""
    (tmp_path / "in").mkdir()
    number = 0
    for place, names in enumerate(shards):
        files = []
        for name in names:
            files += [(f"{name}.png", IMAGES[number])]
            number += 1
        files += [(f"{key}.cls", b"%d" % int(key)) for key in {name[0] for name in names} if key.isdigit()]
        write_tar(tmp_path / f"in/train-{place:06d}.tar", files)
    result = pack(tmp_path / "in", tmp_path / "out", progress=False)
    found = read_back(tmp_path / "out", "train")
    assert found.keys() == {IMAGES[place] for place in expected}
    told = [note for note in result["notes"] if "are samples of their own, not views of one" in note]
    assert len(told) == (len(expected) == number)


@pytest.mark.parametrize("name", ["cats/._1.png", "._1.png", "a/b/._x.y.png", "__MACOSX/cats/._1.png"])
def test_what_a_mac_leaves_beside_images_is_no_sample(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "x.tar", [(name, b"\0\5\x16\7"), ("cats/1.png", IMAGES[0]), ("cats/1.cls", b"3")])
    assert load_index(tar).keys == ("cats/1",) or list(load_index(tar).keys) == ["cats/1"]
    result = pack(tar, tmp_path / "out", progress=False)
    assert (result["splits"]["train"]["samples"], result["num_skipped"]) == (1, 0)


@pytest.mark.parametrize("folder", ["", "cats/"])
def test_a_tar_without_an_image_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/a.tar", [(f"{folder}1.png", IMAGES[0])])
    write_tar(tmp_path / "in/b.tar", [])
    assert pack(tmp_path / "in", tmp_path / "out", progress=False)["notes"] == ["b.tar holds no image"]
