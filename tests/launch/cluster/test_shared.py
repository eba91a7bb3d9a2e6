from __future__ import annotations

from pathlib import Path

from launch.cluster.shared import file_system, local_lines

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
scratch /fast\\040scratch lustre rw 0 0
"""


def test_what_only_this_machine_sees_is_told(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert file_system(Path("/home/me"), mounts) == "nfs4"
    assert file_system(Path("/fast scratch/x"), mounts) == "lustre"
    assert file_system(Path("/opt"), mounts) == "ext4"
    assert file_system(Path("/homes"), mounts) == "ext4"
    (line,) = local_lines({"the run folder": Path("/home/me/runs"), "the data": Path("/tmp/shards")}, mounts)
    assert line.startswith("the data /tmp/shards is on a disk of this machine (tmpfs)")


def test_where_nothing_is_shared_nothing_is_told(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda1 / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n")
    assert local_lines({"a": Path("/tmp/x"), "b": Path("/opt")}, mounts) == []
    assert local_lines({"a": Path("/tmp/x")}, tmp_path / "none") == []
