"""Verify finds what is wrong, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from making import encode, picture, sample_files, write_tar

from data_pipelines.verify import verify
from data_pipelines.write import pack


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    for number in range(20):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(encode(picture(number)))
    pack(tmp_path / "images", tmp_path / "out", samples_per_shard=10, progress=False)
    return tmp_path / "out"


def test_a_sound_pack(packed: Path) -> None:
    report = verify(packed, progress=False)
    assert report["ok"]
    assert report["problems"] == []
    assert (report["samples"], report["labelled"], report["shards"]) == (20, 20, 2)
    assert (report["width"], report["height"]) == ([24, 24], [20, 20])
    assert json.loads((packed / "verify.json").read_text()) == report


def problems(packed: Path) -> str:
    report = verify(packed, progress=False)
    assert not report["ok"]
    return "\n".join(report["problems"])


def test_a_flipped_bit(packed: Path) -> None:
    shard = packed / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    told = problems(packed)
    assert "other_bytes (1): train-000001.tar" in told
    assert "damaged_image (1): " in told


def test_a_truncated_shard(packed: Path) -> None:
    shard = packed / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "train-000000.tar: cut short" in problems(packed)


def test_missing_and_additional_shards(packed: Path) -> None:
    (packed / "train-000000.tar").rename(packed / "train-000007.tar")
    told = problems(packed)
    assert "missing_shard (1): train-000000.tar" in told
    assert "unlisted_shard (1): train-000007.tar" in told


def test_foreign_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sample_files(range(5))
    files[4] = (files[4][0], files[4][1][:50])
    files += [("000001.png", encode(picture(9))), ("x.png", encode(picture(8))), ("x.cls", b"dog"), ("y.cls", b"1")]
    write_tar(tmp_path / "data-0.tar", files)
    report = verify(tmp_path / "data-*.tar", report=tmp_path / "report.json")
    assert [bad["key"] for bad in report["bad"]] == ["000002"]
    told = "\n".join(report["problems"])
    for words in (
        "repeated_member (1): 000001 of data-0.tar",
        "no_image (1): y of data-0.tar",
        "bad_label (1): x.cls of data-0.tar",
        "damaged_image (1): 000002 of data-0.tar: image file is truncated",
    ):
        assert words in told
    assert (report["samples"], report["labelled"]) == (6, 5)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "4 kinds of error; 1 of 6 samples (16.7 %) cannot be decoded; a run ends" in capsys.readouterr().out


def test_a_read_only_folder_gets_no_report(packed: Path) -> None:
    packed.chmod(0o555)
    try:
        assert verify(packed, progress=False)["ok"]
        assert not (packed / "verify.json").exists()
    finally:
        packed.chmod(0o755)
