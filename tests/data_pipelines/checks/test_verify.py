"""Verify finds what is wrong, and nothing else."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import bands, encode, picture, sample_files, tiff, write_tar
from PIL import Image

from data_pipelines.checks.verify import verify
from data_pipelines.datasets.bad_samples import Decoder, TooManyBadSamplesError, check_losses
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.packing.write import pack
from data_pipelines.shards.scan import load_index
from launch.cli import main

PIXELS = picture(0)


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


def cases(report: dict[str, Any]) -> dict[str, int]:
    return {case: entry["count"] for case, entry in report["cases"].items()}


def edit_info(packed: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads((packed / "dataset.json").read_text())
    change(info)
    (packed / "dataset.json").write_text(json.dumps(info))


def test_counts_and_labels_are_compared_with_the_description(packed: Path) -> None:
    edit_info(packed, lambda info: info["splits"]["train"]["class_counts"].reverse())
    assert verify(packed, progress=False)["ok"]  # 10 of each
    edit_info(packed, lambda info: info["splits"]["train"].update(class_counts=[9, 11]))
    assert cases(verify(packed, progress=False)) == {"other_counts": 2}
    edit_info(packed, lambda info: info["splits"]["train"].update(class_counts=[10, 10]))
    edit_info(packed, lambda info: info["splits"]["train"]["shards"][1].update(samples=9))
    assert cases(verify(packed, progress=False)) == {"other_counts": 1}
    edit_info(packed, lambda info: info.update(classes=["a"], splits={}))
    report = verify(packed, progress=False)
    assert cases(report) == {"label_out_of_range": 10}
    assert report["cases"]["label_out_of_range"]["examples"][0]["reason"] == "label 1 of 1 classes"


def test_a_description_from_elsewhere_is_not_taken_at_its_word(packed: Path) -> None:
    for text in ("[1]", '{"splits": 3}', '{"splits": {"train": {}}}', '{"splits": {"train": {"shards": [{"a": 1}]}}}'):
        (packed / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset\.json"):
            verify(packed, progress=False)


def test_the_same_shard_twice_and_the_same_keys(packed: Path) -> None:
    (packed / "val-000000.tar").write_bytes((packed / "train-000001.tar").read_bytes())
    for quick in (False, True):
        report = verify(packed, quick=quick, progress=False)
        assert cases(report) == {"same_shard": 1, "unlisted_shard": 1, "repeated_key": 10}
        assert report["cases"]["same_shard"]["examples"] == [
            {"shard": "val-000000.tar", "key": None, "reason": "as train-000001.tar"}
        ]
        assert len(report["cases"]["repeated_key"]["examples"]) == 10


def test_repeated_keys_are_counted_over_several_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.checks.check_shards._KEYS_AT_A_TIME", 4)
    for number, keys in enumerate((range(10), range(5, 15), range(9, 20))):
        write_tar(tmp_path / f"x-{number}.tar", [(f"{key}.png", encode(picture(key))) for key in keys])
    assert cases(verify(tmp_path, quick=True, progress=False)) == {"repeated_key": 5 + 6}


def test_indexes_of_other_shards(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x-0.tar", [("a.png", encode(PIXELS))])
    load_index(shard)
    os.utime(shard, ns=(1, 1))
    assert cases(verify(shard, progress=False)) == {"stale_index": 1}
    assert cases(verify(shard, progress=False)) == {}
    write_tar(shard, [("b.png", encode(PIXELS))])  # of the same size
    os.utime(shard, ns=(1, 1))
    report = verify(shard, progress=False)
    assert cases(report) == {"foreign_index": 1}
    assert "remove x-0.tar.index" in report["problems"][0]


def test_what_cannot_be_read_is_told(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, inode = os.pread, (packed / "train-000001.tar").stat().st_ino

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if os.fstat(descriptor).st_ino == inode and size > 500:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    report = verify(packed, progress=False)
    assert cases(report) == {"unreadable": 10}
    assert "Input/output error" in report["problems"][0]
    monkeypatch.setattr("data_pipelines.checks.check_shards.scan_shard", lambda shard: pread(99, 1000, 0))
    assert cases(verify(packed, progress=False))["unreadable"] == 2


def test_a_quick_look_reads_no_image(packed: Path) -> None:
    shard = packed / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    status = shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = verify(packed, quick=True, progress=False)
    assert report["ok"]
    assert report["samples"] == 20
    assert report["run"] == "not known: no image was decoded"
    assert not verify(packed, progress=False)["ok"]


def test_workers_change_nothing(packed: Path) -> None:
    shard = packed / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-4000])
    load_index(shard)
    one, four = (verify(packed, workers=workers, progress=False) for workers in (1, 4))
    assert one == four


@pytest.mark.parametrize(("bad", "told"), [(0, "every sample can be used"), (1, "neighbour"), (3, "max_bad_share")])
def test_what_a_run_will_do(tmp_path: Path, bad: int, told: str) -> None:
    files = [(f"{n}.png", encode(PIXELS) if n >= 2 * bad or n % 2 else b"") for n in range(150)]
    write_tar(tmp_path / "x-0.tar", files)
    report = verify(tmp_path, progress=False)
    assert told in report["run"]
    assert report["num_bad"] == bad


def run_reads(spec: str, channels: int) -> str | None:
    """What a run of all samples, one after the other, ends with; None: it does not."""
    try:
        with open_dataset(spec) as dataset:
            check_losses(dataset, 0.01)
            decoder = Decoder(dataset, channels)
            for sample in range(dataset.num_samples):
                decoder.read(sample)
    except (ValueError, OSError) as error:
        return str(error)
    return None


GREY = encode(np.asarray(Image.fromarray(PIXELS).convert("L")))
RGBA = encode(np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)]))
BANDS = tiff(bands(1, 5), planarconfig="contig", photometric="minisblack")
EMPTY = bytes(10240)  # a tar that is whole
#: Shards, as letters for their samples or as bytes, and the channels of a run.
DATASETS: dict[str, tuple[list[str | bytes], int]] = {
    "sound": (["....", "...."], 3),
    "grey among colour": (["..gg", "gggg"], 3),
    "opacity among colour": (["..aa", "...."], 3),
    "bands among colour": (["....", "..5."], 3),
    "colour among bands": (["5555", "55.5"], 5),
    "grey among bands": (["5555", "55g5"], 5),
    "bands only": (["5555"], 5),
    "an empty tar": (["....", EMPTY, "....", EMPTY, "...."], 3),
    "nothing but an empty tar": ([EMPTY], 3),
    "a shard of no bytes": (["....", b"", "...."], 3),
    "a web page": (["....", b"<html>" * 200, "...."], 3),
    "rows that go around the end": (["x" * 8 + "." * 4 + "x" * 8], 3),
    "one of many": (["." * 150 + "x"], 3),
    "several of many": (["." * 150 + "x" * 4], 3),
    "all": (["xx", "x"], 3),
}


@pytest.mark.parametrize("name", DATASETS)
def test_what_verify_foretells_is_what_a_run_does(tmp_path: Path, name: str) -> None:
    shards, channels = DATASETS[name]
    kinds = {
        ".": ("png", encode(PIXELS)),
        "g": ("png", GREY),
        "a": ("png", RGBA),
        "5": ("tif", BANDS),
        "x": ("jpg", b""),
    }
    for number, shard in enumerate(shards):
        place = tmp_path / f"train-{number:06d}.tar"
        if isinstance(shard, bytes):
            place.write_bytes(shard)
        else:
            write_tar(place, [(f"{number}-{n:04d}.{kinds[k][0]}", kinds[k][1]) for n, k in enumerate(shard)])
    write_tar(tmp_path / "val-000000.tar", [("v.png", encode(PIXELS))])  # no matter to a run on train
    ended = run_reads(str(tmp_path), channels)
    report = verify(tmp_path, progress=False)
    foretold = "a run ends" in report["run"] or "does not start" in report["run"]
    assert foretold == (ended is not None), (report["run"], ended)
    assert not (report["ok"] and ended), "what ends a run is an error"
    assert ("mixed_channels" in cases(report)) == ("among" in name and "bands" in name)
    if channels == 5:
        assert report["run"].startswith("train: ") == (ended is not None)
        assert "data.channels=5" in report["run"]


def test_an_empty_tar_and_mixed_channels_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [(f"{n}.png", encode(PIXELS)) for n in range(9)] + [("9.tif", BANDS)])
    (tmp_path / "train-000001.tar").write_bytes(EMPTY)
    report = verify(tmp_path, progress=False)
    assert cases(report) == {"mixed_channels": 1, "empty_shard": 1, "deep": 1}
    told = "\n".join(report["problems"])
    assert "mixed_channels (1): 9 of train-000000.tar: 5 channels, and 3 would serve most" in told
    assert "empty_shard (1): train-000001.tar" in told
    assert report["run"] == (
        "1 of 10 samples (10 %) cannot be used, by a run of data.channels=3; a run ends, as that is more than "
        "data.max_bad_share=0.01, unless it permits more"
    )


def test_a_row_of_bad_samples_ends_a_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", [(f"{n:02d}.png", b"" if 3 <= n < 19 else encode(PIXELS)) for n in range(30)])
    assert "ends at 18 of x-0.tar, where 16 in a row" in verify(tmp_path, progress=False)["run"]
    with (
        open_dataset(str(tmp_path / "x-0.tar")) as dataset,
        pytest.raises(TooManyBadSamplesError, match="16 samples in a row"),
    ):
        Decoder(dataset, max_bad_share=1.0).read(3)


def test_many_findings_keep_the_report_small(tmp_path: Path) -> None:
    write_tar(tmp_path / "x-0.tar", [(f"{n}.png", b"") for n in range(1500)])
    report = verify(tmp_path, progress=False)
    assert (report["num_bad"], len(report["bad"])) == (1500, 1000)
    assert (report["cases"]["empty_image"]["count"], len(report["cases"]["empty_image"]["examples"])) == (1500, 20)


def exit_code(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--no-progress", *args])
    return int(ended.value.code or 0)


def test_exit_codes(tmp_path: Path) -> None:
    write_tar(tmp_path / "note-0.tar", [("a.jpg", encode(PIXELS))])
    write_tar(tmp_path / "error-0.tar", [("a.jpg", b"")])
    assert [exit_code(str(tmp_path / f"{name}-0.tar")) for name in ("note", "error")] == [0, 1]
    assert exit_code("--cases") == 0
    assert exit_code() == 2
