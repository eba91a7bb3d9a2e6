from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from making import npy, tiff, write_tar
from PIL import Image
from typer.testing import CliRunner

import data_pipelines.transforms.transform
import launch.crop_sheet
from launch.cli import app, main
from launch.crop_sheet import told
from launch.dedupe_command import whitened


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write(path: Path, seeds: dict[str, int]) -> None:
    write_tar(path, [(f"{key}.png", png(pixels(seed))) for key, seed in seeds.items()])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training images, of which t7 is also in val, as v7."""
    folder = tmp_path_factory.mktemp("shards")
    write(folder / "train-000000.tar", {f"t{number}": number for number in range(40)})
    write(folder / "val-000000.tar", {"v7": 7, "v99": 99})
    return folder


def run(*args: object) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, args)])
    assert result.exit_code == 0, result.output
    return result.output


def test_dedupe_writes_the_list_the_sheet_and_a_table(shards: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "list.jsonl", tmp_path / "sheets" / "pairs.png"
    output = run("dedupe", shards, "--out", out, "--sheet", sheet)
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["split"], line["key"], line["kind"], line["duplicate_of"]["key"]) == ("train", "t7", "exact", "v7")
    assert "train, of val" in output
    assert "1 of 42 samples" in output
    assert Image.open(sheet).width > 200


def test_control_letters_of_a_shards_name_do_not_reach_the_terminal(shards: Path, tmp_path: Path) -> None:
    cut = (shards / "train-000000.tar").read_bytes()[:2000]
    (tmp_path / "train-\x1b[31m000001.tar").write_bytes(cut)
    done = subprocess.run(
        [sys.executable, "-m", "launch", "verify", tmp_path, "--no-progress"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "train-\\x1b[31m000001.tar: cut_short" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_val_may_lie_elsewhere(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.jsonl"
    run("dedupe", shards / "train-*.tar", "--val", shards / "val-000000.tar", "--out", out, "--no-progress")
    assert [json.loads(line)["key"] for line in out.read_text().splitlines()] == ["t7"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--by", "looks"], "phash or features"),
        (["--by", "features"], "needs --encoder"),
        (["--encoder", "runs/x"], "goes with --by features"),
        (["--threshold", "1.5"], "whole number of bits"),
        (["--threshold", "40"], "0 .. 32 of 128"),
        (["--by", "features", "--encoder", "x", "--threshold", "1.5"], "least cosine"),
    ],
)
def test_dedupe_refuses_what_does_not_go_together(
    shards: Path, tmp_path: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["data", "dedupe", str(shards), "--out", str(tmp_path / "list.jsonl"), *args])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "list.jsonl").exists()


@pytest.mark.parametrize("option", ["--out", "--sheet"])
def test_dedupe_sees_first_that_it_cannot_write(
    shards: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading takes hours where there is much."""
    with pytest.raises(SystemExit) as exit_:
        main(["data", "dedupe", str(shards), "--out", str(tmp_path / "list.jsonl"), option, str(tmp_path)])
    assert exit_.value.code == 2
    told = capsys.readouterr()
    assert f"{tmp_path} is a folder; name a file" in told.err
    assert "reading" not in told.out


def test_whitened_features_are_uncorrelated_and_what_is_constant_is_gone() -> None:
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([5.0, 3, 1, 1, 1, 0])
    )
    features[:, 1] += 2 * features[:, 0]
    white = whitened(features + 100)
    assert white.shape == (500, 5)
    torch.testing.assert_close(white.T @ white / 500, torch.eye(5), atol=1e-4, rtol=0)


def test_dedupe_by_features_finds_the_same_image(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Target:
        encoder = torch.nn.Module()
        image_size, channels, bits, mean, std = 16, 3, 8, (0.5,) * 3, (0.25,) * 3

    class Features:
        def __init__(self, images: torch.Tensor) -> None:
            self.pooled = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    Target.encoder.forward = Features
    monkeypatch.setattr("eval.target.open_target", lambda name: Target)
    write(tmp_path / "train-000000.tar", {f"t{number}": number for number in range(40)})
    noisy = np.clip(pixels(3).astype(int) + np.random.default_rng(0).integers(-2, 3, (40, 48, 3)), 0, 255)
    write_tar(tmp_path / "val-000000.tar", [("v.png", png(noisy.astype(np.uint8)))])
    out = tmp_path / "list.jsonl"
    run("dedupe", tmp_path, "--by", "features", "--encoder", "any", "--device", "cpu", "--out", out, "--no-progress")
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["key"], line["kind"], line["duplicate_of"]["key"]) == ("t3", "near", "v")
    assert 0 <= line["distance"] < 0.1


def test_show_draws_samples_and_statistics(shards: Path, tmp_path: Path) -> None:
    output = run("show", shards, "--out", tmp_path / "look", "--count", 10)
    assert {path.name for path in (tmp_path / "look").iterdir()} == {"samples.png", "statistics.png"}
    assert "40 samples in 1 shard" in output
    for path in (tmp_path / "look").iterdir():
        Image.open(path).load()


def test_show_needs_no_more_images_than_there_are(shards: Path, tmp_path: Path) -> None:
    """A batch that a run refuses is no reason not to look at the crops."""
    output = run("show", shards, "--preset", "mae_vit_cifar_cpu", "--out", tmp_path, "--rows", 3, "--no-progress")
    assert "train.batch_size is 128" in output
    assert Image.open(tmp_path / "crops.png").height > 100


PRESETS = ["mae_vit_cifar_cpu", "mae_swin_cifar_cpu", "beit_vit_cifar_cpu", "dino_vit_cifar_cpu", "dinov2_vitl16_in1k"]


@pytest.mark.parametrize("preset", PRESETS)
def test_show_draws_the_crops_that_the_loader_makes(
    shards: Path, tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters below the crops are those that the loader drew."""
    draw, loaded, shown = data_pipelines.transforms.transform.draw, [], []
    monkeypatch.setattr(
        data_pipelines.transforms.transform, "draw", lambda *args: loaded.append(draw(*args)) or loaded[-1]
    )
    monkeypatch.setattr(launch.crop_sheet, "told", lambda params: shown.append(params) or told(params))
    args = ["train.batch_size=32", "method.tokenizer=x"] if "beit" in preset else ["train.batch_size=32"]
    run("show", shards, "--preset", preset, *args, "--out", tmp_path, "--rows", 3, "--step", 1, "--no-progress")
    assert len(loaded) == 4  # the next divisor of the batch
    drawn = {params for row in loaded for params in row}
    assert set(shown) == drawn
    assert Image.open(tmp_path / "crops.png").height > 100


NATIVE = "shape: native, patch: 8, max_tokens: 16"


@pytest.mark.parametrize(
    ("preset", "settings", "crops"),
    [
        ("dino_navit_native", ["encoder.patch=8", f"views.local_crops={{{NATIVE}, count: 2}}"], 4),
        ("mae_vit_cifar_cpu", ["encoder={family: navit, size: tiny, patch: 8}", "method.mask.unit=8"], 1),
    ],
)
def test_show_draws_crops_of_their_own_shape(
    shards: Path, tmp_path: Path, preset: str, settings: list[str], crops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles: list[tuple[int, int]] = []
    tile = launch.crop_sheet._tile
    monkeypatch.setattr(launch.crop_sheet, "_tile", lambda *args: tiles.append(args[0].size) or tile(*args))
    glob = ", ".join([f"{{{NATIVE}, area: [9, 16]}}"] * (2 if crops == 4 else 1))
    args = [f"views.global_crops=[{glob}]", *settings, "train.batch_size=32"]
    run("show", shards, "--preset", preset, *args, "--out", tmp_path, "--rows", 3, "--no-progress")
    assert len(tiles) == 4 * crops
    assert all(width % 8 == height % 8 == 0 and width * height <= 16 * 64 for width, height in tiles)


@pytest.mark.parametrize(("preset", "channels"), [("mae_vit_16bit_grey", 1), ("mae_vit_13band", 13)])
def test_deep_images_of_any_channels(tmp_path: Path, preset: str, channels: int) -> None:
    """As TIFF and as npy: shown, and found to be duplicates of each other."""

    def deep(seed: int) -> np.ndarray:
        return np.stack([pixels(seed + channel)[:, :, 0].astype(np.uint16) * 40 for channel in range(channels)], axis=2)

    contiguous = {"photometric": "minisblack", "planarconfig": "contig"} if channels > 1 else {}
    files = [(f"{number}.tiff", tiff(deep(100 * number), **contiguous)) for number in range(16)]
    write_tar(tmp_path / "train-000000.tar", [*files, ("copy.npy", npy(deep(300))), ("close.npy", npy(deep(500) + 20))])
    out = tmp_path / "list.jsonl"
    run("dedupe", tmp_path, "--out", out, "--sheet", tmp_path / "pairs.png", "--no-progress")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {(line["key"], line["kind"], line["duplicate_of"]["key"]) for line in lines}
    assert found == {("copy", "pixels", "3"), ("close", "near", "5")}
    small = ["train.batch_size=8", "views.global_crops=[{size: 32}]"]
    run("show", tmp_path, "--preset", preset, *small, "--out", tmp_path / "look", "--rows", 2, "--no-progress")
    for name in ("crops", "samples", "statistics"):
        assert len(Image.open(tmp_path / "look" / f"{name}.png").convert("L").getcolors()) > 100


def test_show_refuses_before_it_writes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["train.batch_size=8"], "--preset"),
        (["--bands", "1,2"], "one channel or three"),
        (["--bands", "1,2,3"], "the image's 3"),
        (["--preset", "no_such"], "no preset"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "show", str(shards), "--out", str(tmp_path / "look"), *args])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "look").exists()


@pytest.mark.parametrize("command", [["show", "--out", "F/look"], ["dedupe", "--out", "F/x.jsonl"]])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    shards: Path, tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    name, *args = (part.replace("F", str(tmp_path / "file")) for part in command)
    with pytest.raises(SystemExit):
        main(["data", name, str(shards), *args])
    output = capsys.readouterr()
    assert "choose another place" in output.err
    assert "looking" not in output.out
    assert "reading" not in output.out


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_pack_leaves_out_what_dedupe_lists(tmp_path: Path, source: str) -> None:
    """From photos to clean shards, from the photos again or from the shards; then nothing is left to find."""
    photos, shards, clean = (tmp_path / name for name in ("photos", "shards", "clean"))
    for split, label, seeds in (("train", "cat", range(8)), ("train", "dog", range(6, 14)), ("val", "cat", (3, 50))):
        (photos / split / label).mkdir(parents=True)
        for seed in seeds:  # 6 and 7 are both cats and dogs
            (photos / split / label / f"{seed} b.png").write_bytes(png(pixels(seed)))
    main_args = ["pack", str(photos), str(shards), "--no-progress"]
    assert CliRunner().invoke(app, main_args).exit_code == 0
    listed, again = tmp_path / "list.jsonl", tmp_path / "again.jsonl"
    run("dedupe", shards, "--out", listed, "--no-progress")
    assert len(listed.read_text().splitlines()) == 3
    given = photos if source == "folder" else shards
    result = CliRunner().invoke(app, ["pack", str(given), str(clean), "--leave-out", str(listed), "--no-progress"])
    assert result.exit_code == 0, result.output
    splits = json.loads((clean / "dataset.json").read_text())["splits"]
    assert {name: entry["samples"] for name, entry in splits.items()} == {"train": 13, "val": 2}
    run("dedupe", clean, "--out", again, "--no-progress")
    assert again.read_text() == ""


def test_statistics_without_progress_are_json(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["data", "stats", str(shards), "--no-progress"])
    assert exit_.value.code == 0
    assert len(json.loads(capsys.readouterr().out)["mean"]) == 3
