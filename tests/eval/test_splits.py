"""The data of a probe, here or at a URL."""

from __future__ import annotations

from pathlib import Path

import pytest
from making import sample_files, write_tar
from serving import SECRET, describe, serve

from eval.splits import open_splits


def test_splits_at_a_url_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "served" / "set"
    folder.mkdir(parents=True)
    write_tar(folder / "train-000000.tar", sample_files(range(20)))
    write_tar(folder / "val-000000.tar", sample_files(range(20, 30)))
    describe(folder)
    with serve(tmp_path / "served") as server:
        train, val, num_classes = open_splits(f"{server.url}/set")
        local_train, local_val, _ = open_splits(str(folder))
        assert (train.checksum, val.checksum, num_classes) == (local_train.checksum, local_val.checksum, 10)
        assert val.read(3).image == local_val.read(3).image
        with pytest.raises(ValueError, match="the same samples"):
            open_splits(f"{server.url}/set/train-000000.tar")
        (folder / "val-000000.tar").unlink()
        describe(folder)
        with pytest.raises(FileNotFoundError, match="no val split to test on") as found:
            open_splits(f"{server.url}/set?token={SECRET}")
        assert SECRET not in str(found.value)
