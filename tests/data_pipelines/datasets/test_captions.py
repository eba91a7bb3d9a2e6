"""Captions: indexed with their images, packed from beside them, and drawn from `.txt` or a field of the `.json`."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
from making import encode, picture, write_tar

from data_pipelines.datasets.captions import Captions, which_have
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.packing.sources.base import Columns
from data_pipelines.packing.write import pack
from data_pipelines.shards import index_format
from data_pipelines.shards.index_format import join, read_index, write_joined
from data_pipelines.shards.scan import load_index


def files_of(number: int, stem: str = "{:06d}") -> list[tuple[str, bytes]]:
    name = stem.format(number)
    return [
        (f"{name}.txt", f"picture {number}\n\n  the  same\n".encode()),
        (f"{name}.png", encode(picture(number))),
        (f"{name}.json", json.dumps({"caption": f"of json {number}", "several": ["a", "", "b"]}).encode()),
    ]


def number_of(dataset: Dataset, sample: int) -> int:
    return next(n for n in range(9) if dataset.read(sample).image == encode(picture(n)))


@pytest.mark.parametrize("stem", ["{:06d}", "a/{:03d}", "scan{:02d}.left"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_captions_belong_to_the_image_of_their_key(stem: str, shuffled: bool, tmp_path: Path) -> None:
    files = [file for number in range(6) for file in files_of(number, stem)]
    if shuffled:
        random.Random(0).shuffle(files)
    write_tar(tmp_path / "train-000000.tar", files)
    with open_dataset(tmp_path) as dataset:
        assert which_have(dataset).all()
        for sample in range(6):
            number = number_of(dataset, sample)
            assert Captions(dataset, "txt").of(sample) == (f"picture {number}", "the same")
            assert Captions(dataset, "json:caption").of(sample) == (f"of json {number}",)
            assert Captions(dataset, "json:several").of(sample) == ("a", "b")
        for where in ("txt", "json:caption"):
            Captions(dataset, where).check("here")
        with pytest.raises(ValueError, match=r"all of 6 samples of here have no caption \('title' of its \.json\)"):
            Captions(dataset, "json:title").check("here")


def test_what_is_no_place_of_captions_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", files_of(0))
    with open_dataset(tmp_path) as dataset:
        for where in ("cls", "json:", "json", "txts"):
            with pytest.raises(ValueError, match="must be txt or json:FIELD"):
                Captions(dataset, where)


def test_an_image_without_one_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [*files_of(0), *(f for f in files_of(1) if "txt" not in f[0])])
    with open_dataset(tmp_path) as dataset:
        with pytest.raises(ValueError, match=r"1 of 2 samples of here have no caption \(its \.txt\), such as 000001"):
            Captions(dataset, "txt").check("here")
        with pytest.raises(ValueError, match=r"000001 in .*train-000000\.tar has no caption"):
            Captions(dataset, "txt").of(1)


def test_an_index_of_an_earlier_version_says_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "train-000000.tar", [f for n in range(4) for f in files_of(n) if "txt" not in f[0]])
    index = load_index(shard)
    real = index_format.create

    def create(file, tables, arrays):  # as it was
        tables = {name: table for name, table in tables.items() if name != "texts_known"}
        return real(file, tables, {name: kind for name, kind in arrays.items() if not name.startswith("text")})

    place = tmp_path / "train-000000.tar.index"
    with monkeypatch.context() as patch, place.open("wb") as file:
        patch.setattr(index_format, "create", create)
        patch.setattr(index_format, "PER_SAMPLE", index_format.PER_SAMPLE[:-2])
        write_joined(file, [lambda: index])
    assert read_index(place).knows_maps
    assert not read_index(place).knows_texts
    with open_dataset(tmp_path) as dataset:
        with pytest.raises(ValueError, match=r"earlier version.*captions.*remove the \.index files"):
            which_have(dataset)
        assert not join([dataset.index, index]).knows_texts


def test_captions_beside_images_are_packed_and_packed_on(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        (photos / f"{number}.png").write_bytes(encode(picture(number)))
        (photos / f"{number}.txt").write_text(f"picture {number}\n")
    (photos / "4.txt").write_bytes(b"\xff\xfe broken")
    made = pack(photos, tmp_path / "shards", progress=False)
    assert made["maps"]["text"]["samples"] == 4
    assert "no UTF-8" in made["maps"]["text"]["refusals"][0]
    again = pack(tmp_path / "shards" / "train-*.tar", tmp_path / "again", progress=False)
    assert again["maps"]["text"]["samples"] == 4
    for folder in ("shards", "again"):
        with open_dataset(tmp_path / folder) as dataset:
            for sample in range(5):
                number = number_of(dataset, sample)
                assert which_have(dataset)[sample] == (number != 4)
                if number != 4:
                    assert Captions(dataset, "txt").of(sample) == (f"picture {number}",)


def test_a_column_of_captions_is_packed(tmp_path: Path) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "caption"])
        for number in range(4):
            (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
            rows.writerow([f"{number}.png", f"picture {number}, of a list"])
    pack(tmp_path / "list.csv", tmp_path / "shards", columns=Columns(image="path"), progress=False)
    with open_dataset(tmp_path / "shards") as dataset:
        for sample in range(4):
            found = Captions(dataset, "json:caption").of(sample)
            assert found == (f"picture {number_of(dataset, sample)}, of a list",)
