"""Which split is held out: val, or test where there is no val."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import sample_files, write_tar

from data_pipelines.datasets.held_out import held_out_of, open_held_out


@pytest.mark.parametrize(
    ("splits", "expected"), [(("train", "val", "test"), "val"), (("train", "test"), "test"), (("test",), "test")]
)
def test_test_serves_where_there_is_no_val(splits: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    for number, split in enumerate(splits):
        write_tar(tmp_path / f"{split}-000000.tar", sample_files(range(10 * number, 10 * number + 3 + number)))
    dataset, split = open_held_out(tmp_path)
    assert (split, dataset.num_samples) == (expected, 3 + splits.index(expected))
    assert held_out_of(tmp_path) == expected


def test_neither_is_told(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "train-000000.tar", sample_files(range(3)))
    with pytest.raises(FileNotFoundError, match=r"holds no val-\*\.tar; its shards begin with train"):
        open_held_out(tmp_path)
    assert held_out_of(tmp_path) is None
    assert open_held_out(tar)[0].num_samples == 3  # named by itself
