"""Files that are whole or not there, with the rights that the user's umask leaves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.files import atomic_write, staged, write_json, write_text


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027, 0o000], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_json(tmp_path / "a.json", {})
    write_text(tmp_path / "b.txt", "")
    with atomic_write(tmp_path / "c.tar") as file:
        file.write(b"x")
    with staged(tmp_path / "folder") as folder:
        folder.mkdir()
        write_text(folder / "d.txt", "")
    for name in ("a.json", "b.txt", "c.tar", "folder/d.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.write_text("before")
    with pytest.raises(TypeError), atomic_write(place) as file:
        file.write("after")  # type: ignore[arg-type]
    assert place.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
