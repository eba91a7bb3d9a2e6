"""`selfsight pack`: its options reach the pack, and what a user gets wrong is told in one message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        pixels = np.full((20 * (number + 1), 30 * (number + 1), 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "list.csv").write_text("file,grade,site\n" + "".join(f"{n}.png,{'ab'[n % 2]},{n}\n" for n in range(7)))
    return folder


def run(*args: object) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pack", *map(str, args)])
    assert exit_.value.code == 0


def test_all_that_can_be_asked_for(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "duplicates.jsonl").write_text('{"path": "5.png"}\n')
    out = tmp_path / "out"
    options = ["--image-column", "file", "--label-column", "grade", "--leave-out", tmp_path / "duplicates.jsonl"]
    options += [
        "--max-short-side",
        50,
        "--quality",
        80,
        "--subsampling",
        "4:4:4",
        "--check",
        "full",
        "--val-share",
        0.3,
    ]
    run(images / "list.csv", out, "--from", "list", *options)
    told = capsys.readouterr().out.splitlines()
    assert any(line.startswith("train: 3 samples in 1 shard") for line in told)
    assert any(line.startswith("val: 2 samples in 1 shard") for line in told)
    assert any(line.startswith("re-encoded 3 images (60.0%)") for line in told)
    assert any("images/s" in line and "MB/s" in line for line in told)
    assert "left out 1 images as asked" in told
    assert "skipped 6.png: no such file" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "80"], "--quality and --subsampling are of re-encoded images"),
        (["--max-short-side", "320", "--quality", "99"], "quality is 99"),
        (["--bad", "maybe"], "bad is 'maybe'; it must be skip or refuse"),
        (["--check", "some"], "check is 'some'; it must be header or full"),
        (["--from", "rar"], "--from is 'rar'; it must be one of folder, stacks, tars, parquet, arrow, list"),
        (["--leave-out", "none.jsonl"], "none.jsonl"),
    ],
)
def test_mistakes(
    images: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pack", str(images), str(tmp_path / "out"), *options])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_an_interrupted_pack_says_how_to_go_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipelines.packing.write.pack", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["pack", str(images), str(tmp_path / "out")])
    assert exit_.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
