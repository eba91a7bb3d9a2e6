"""Many shards under one index: the same samples, found at once, and never those of other shards."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from making import sample_files, write_tar

from data_pipelines.checks.verify import verify
from data_pipelines.datasets import dataset_index
from data_pipelines.datasets.dataset import Dataset, open_dataset
from data_pipelines.datasets.dataset_index import joint_place, open_index, write_index
from data_pipelines.files import lock
from data_pipelines.shards.index import PER_SAMPLE, TABLES, DamageError
from data_pipelines.shards.index_format import join, read_index, write_joined
from data_pipelines.shards.scan import INDEX_SUFFIX, build_index, load_index


def make(folder: Path, count: int = 6) -> list[Path]:
    folder.mkdir(exist_ok=True)
    shards = []
    for shard in range(count):
        files = sample_files(range(10 * shard, 10 * shard + (0, 3, 1, 7)[shard % 4]))
        files += [(f"{10 * shard:06d}.json", b"{}")] * (shard == 3)  # one shard with json, the others without
        shards.append(write_tar(folder / f"train-{shard:06d}.tar", files))
    return shards


def contents(dataset: Dataset) -> list[tuple[str, str, bytes, int | None]]:
    samples = (dataset.read(number) for number in range(dataset.num_samples))
    return [(sample.key, sample.shard.name, sample.image, sample.label) for sample in samples]


@pytest.fixture
def always_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_index, "_MANY_SHARDS", 2)
    monkeypatch.setattr("data_pipelines.shards.index_format._SMALL", 0)  # mapped into memory, whatever its size


def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.shards.scan.build_index", lambda shard: pytest.fail("built again"))


def test_joined_in_memory_and_in_a_file_the_samples_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make(tmp_path / "data")
    parts = [build_index(shard) for shard in shards]
    joined = join(parts)
    with open_dataset(tmp_path / "data") as small:
        expected, checksum, labels = contents(small), small.checksum, small.labels.tolist()
    assert len(expected) == len(joined) == 3 + 1 + 7 + 3
    place = write_index(tmp_path / "data", "train")
    assert place == tmp_path / "data" / "train.index"
    no_building(monkeypatch)
    with open_dataset(tmp_path / "data") as large:
        assert contents(large) == expected
        assert (large.checksum, large.labels.tolist()) == (checksum, labels)
        assert large.num_image_bytes == sum(len(image) for _, _, image, _ in expected)
    stored = read_index(place)
    assert stored.is_sound()
    for number, part in enumerate(parts):
        again = stored.part(number)
        assert again.digest(0) == part.digest(0)
        assert again.keys == part.keys
        assert [again.entry(0, row) for row in range(len(part))] == [part.entry(0, row) for row in range(len(part))]


def test_many_shards_get_one_when_they_are_first_opened(
    tmp_path: Path, always_joint: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make(tmp_path / "data")
    with open_dataset(tmp_path / "data") as dataset:
        expected = contents(dataset)
    assert joint_place(tmp_path / "data", "train").is_file()
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.startswith(".")]
    for shard in shards:
        shard.with_name(shard.name + INDEX_SUFFIX).unlink()
    no_building(monkeypatch)
    with open_dataset(tmp_path / "data") as dataset:
        assert contents(dataset) == expected
    some = f"{tmp_path}/data/train-00000[135].tar"  # no folder's: its joint index is the user's own
    with open_dataset(some) as dataset:
        assert [name for _, name, _, _ in contents(dataset)] == [
            name for _, name, _, _ in expected if name[11] in "135"
        ]
    assert len(list(Path(os.environ["SELFSIGHT_CACHE"]).rglob("*" + INDEX_SUFFIX))) == 1


@pytest.mark.parametrize("change", ["new", "missing", "changed", "touched"])
def test_of_other_shards_only_those_are_built(
    tmp_path: Path, always_joint: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    shards = make(tmp_path / "data")
    open_dataset(tmp_path / "data").close()
    for shard in shards:
        shard.with_name(shard.name + INDEX_SUFFIX).unlink()
    if change == "new":
        write_tar(tmp_path / "data" / "train-000009.tar", sample_files([7, 8]))
    elif change == "missing":
        shards[1].unlink()
    elif change == "changed":
        write_tar(shards[1], sample_files([7, 8]))
    else:
        os.utime(shards[1], ns=(5, 5))
    built = []
    monkeypatch.setattr(
        "data_pipelines.shards.scan.build_index", lambda shard: (built.append(shard.name), build_index(shard))[1]
    )
    with open_dataset(tmp_path / "data") as dataset:
        found = contents(dataset)
    expected = {"new": ["train-000009.tar"], "missing": []}.get(change, ["train-000001.tar"])
    assert built == expected
    monkeypatch.setattr(dataset_index, "_MANY_SHARDS", 99)
    joint_place(tmp_path / "data", "train").unlink()
    with open_dataset(tmp_path / "data") as dataset:
        assert contents(dataset) == found


def test_a_damaged_one_is_built_again_or_refused_where_it_is_read(tmp_path: Path, always_joint: None) -> None:
    shards = make(tmp_path / "data")
    with open_dataset(tmp_path / "data") as dataset:
        expected = contents(dataset)
    place = joint_place(tmp_path / "data", "train")
    content = place.read_bytes()
    for damaged in (b"", content[:100], content[:-1], b"x" + content[1:], content[:150] + b"\xff" + content[151:]):
        place.unlink()
        place.write_bytes(damaged)
        with open_dataset(tmp_path / "data") as dataset:
            assert contents(dataset) == expected
    sound = read_index(place)
    for name, value in (("image_blocks", 10**6), ("image_sizes", 10**9), ("labels", -5), ("key_ends", 10**6)):
        array = getattr(sound, name).copy()
        array[4] = value
        place.unlink()
        with place.open("wb") as file:  # nobody reads ten million entries at the start to find it
            write_joined(file, [lambda: dataclasses.replace(sound, **{name: array})])  # noqa: B023
        with open_dataset(tmp_path / "data") as dataset:
            assert dataset.read(0).key == "000010"
            with pytest.raises(DamageError, match=r"train-000003.tar is damaged at its sample 0; remove the .index"):
                dataset.read(4)
    place.unlink()
    assert len(open_index(shards, place)) == len(expected)


def test_verify_finds_what_lies_within_the_bounds_and_is_not_true(tmp_path: Path) -> None:
    make(tmp_path / "data")
    place = write_index(tmp_path / "data", "train")
    assert place is not None
    sound = read_index(place)

    def untrue() -> list[str]:
        found = verify(tmp_path / "data", report=tmp_path / "report.json", progress=False)
        return [problem for problem in found["problems"] if "train.index" in problem]

    assert not untrue()
    swapped = sound.image_blocks.copy()
    swapped[[1, 2]] = swapped[[2, 1]]
    with place.open("wb") as file:
        write_joined(file, [lambda: dataclasses.replace(sound, image_blocks=swapped)])
    assert len(untrue()) == 1


def test_one_of_many_ranks_joins_and_the_others_wait_for_it(
    tmp_path: Path, always_joint: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data")
    place = joint_place(tmp_path / "data", "train")
    other = place.with_name(f".{place.name}.lock").open("ab")
    assert lock(other)

    def meanwhile(seconds: float) -> None:
        write_index(tmp_path / "data", "train")  # by the rank that holds the lock
        monkeypatch.setattr(dataset_index, "store", lambda *_: pytest.fail("written twice"))
        other.close()

    monkeypatch.setattr(dataset_index.time, "sleep", meanwhile)
    with open_dataset(tmp_path / "data") as dataset:
        assert len(contents(dataset)) == 14


def test_without_a_place_to_write_it_is_joined_in_memory(
    tmp_path: Path, always_joint: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "data").chmod(0o555)
    try:
        with open_dataset(tmp_path / "data") as dataset:
            assert len(contents(dataset)) == 14
    finally:
        (tmp_path / "data").chmod(0o755)


def test_a_part_is_the_whole_of_its_shard(tmp_path: Path) -> None:
    shards = make(tmp_path / "data")
    joined = join([load_index(shard) for shard in shards])
    rejoined = join([joined.part(number) for number in range(len(shards))])
    for name in (*TABLES, *PER_SAMPLE, "keys_bytes"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(rejoined, name))
