"""Stacks from folders of frames to probes: packed, verified, shown, learned from, embedded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.checks.show import samples_sheet
from data_pipelines.checks.verify import verify
from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.images.stacks import decode_stack
from data_pipelines.moving import build_moving, thrown_back
from data_pipelines.packing.sources.stack_folders import natural
from data_pipelines.packing.write import pack
from eval.target import open_target
from launch.cli import main
from launch.crop_sheet import crop_sheet
from pretrain.config.load import load_config
from pretrain.run import pretrain
from pretrain.stream.trace import Trace

FRAMES = 5


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert not ended.value.code


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    build_moving(folder / "clips", train=12, val=6, frames=FRAMES)
    command("pack", str(folder / "clips"), str(folder / "shards"), "--from", "stacks", "--no-progress")
    return folder / "shards"


def test_numerals_move_and_are_thrown_back() -> None:
    assert thrown_back(np.array([-3.0, 0.0, 4.0, 12.0, 23.0]), 10).tolist() == [3, 0, 4, 8, 3]
    assert sorted(["f10.png", "f2.png", "f1.png", "a3"], key=natural) == ["a3", "f1.png", "f2.png", "f10.png"]


def test_a_folder_of_frames_becomes_a_sample(shards: Path) -> None:
    with open_dataset(shards) as dataset:
        assert dataset.num_samples == 12
        stored = dataset.read(3)
        assert len(stored.frames) == FRAMES
        assert len(set(stored.frames)) == FRAMES
        assert set(dataset.read_metadata(3)) == {"speed", "angle"}
        assert dataset.classes is not None
        folder = shards.parent / "clips" / "train" / dataset.classes[int(dataset.labels[3])]
        folders = [clip for clip in folder.iterdir() if clip.is_dir()]
        clips = [[(clip / f"{n}.jpg").read_bytes() for n in range(FRAMES)] for clip in folders]
        assert list(stored.frames) in clips
        assert (len(dataset.mean or ()), len(dataset.std or ())) == (3, 3)
        sheet = samples_sheet(dataset, 4, 0)
        assert sheet.width > sheet.height / 2
    told = json.loads((shards / "dataset.json").read_text())
    assert f"18 stacks of {FRAMES} to {FRAMES} frames" in told["notes"]
    report = verify(shards, frames=4, progress=False)
    assert report["ok"], report["problems"]
    assert report["samples"] == 18


def test_statistics_of_all_frames(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of as many frames as there are, each is measured once, and all weigh alike."""
    with open_dataset(shards) as dataset:
        stacks = [[picture.pixels / 255 for picture in decode_stack(dataset.read(n))] for n in range(12)]
    for frames, shown in ((1, slice(1)), (FRAMES, slice(None))):
        capsys.readouterr()
        command("data", "stats", str(shards), "--frames", str(frames), "--no-progress")
        found = json.loads(capsys.readouterr().out)
        pixels = np.concatenate([np.stack(stack[shown]).reshape(-1, 3) for stack in stacks])
        np.testing.assert_allclose(found["mean"], pixels.mean(axis=0), atol=1e-7)
        np.testing.assert_allclose(found["std"], pixels.std(axis=0), atol=1e-7)
        assert found["statistics"].get("frames", 1) == frames
        assert found["statistics"]["bad"] == 0


def test_what_is_no_stack_is_told(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for name in ("a/0.png", "a/1.png", "b/0.png", "c/0.png", "c/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "in" / name)
    (tmp_path / "in" / "c" / "1.png").write_bytes(b"no image")
    result = pack(tmp_path / "in", tmp_path / "out", kind="stacks", progress=False)
    assert "b holds one image, which is no stack, and is left out" in result["notes"]
    assert [skipped["path"] for skipped in result["skipped"]] == ["c"]
    assert result["skipped"][0]["reason"].startswith("frame 1 of 2: ")
    again = pack(tmp_path / "in", tmp_path / "out", kind="stacks", progress=False)
    assert again == result
    image.save(tmp_path / "in" / "lost.png")
    with pytest.raises(ValueError, match="holds images as well as folders of images"):
        pack(tmp_path / "in", tmp_path / "other", kind="stacks", progress=False)


SMALL = [
    "encoder.dim=24", "encoder.depth=1", "encoder.heads=2", "encoder.patch=16", "method.mask.unit=16",
    "method.decoder_dim=16", "method.decoder_depth=1", "method.decoder_heads=2", "train.epochs=null", "train.steps=2",
    "train.batch_size=4", "optim.warmup_epochs=0", "tracking.wandb=disabled", "tracking.pictures_every_steps=0",
    "data.workers=0", "engine.device=cpu", "engine.threads=1",
]  # fmt: skip


@pytest.mark.parametrize("family", ["timesformer", "vit"])
def test_a_run_learns_from_stacks_and_is_probed(family: str, shards: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"data.train={shards}", f"runs={tmp_path}"]
    if family == "vit":
        settings.append("encoder={family: vit, dim: 24, depth: 1, heads: 2, patch: 16, pool: mean}")
    config = load_config("mae_timesformer_clips_cpu", settings)
    with open_dataset(shards) as dataset:
        sheet = crop_sheet(config, [dataset], 2)
    assert sheet.width > 4 * 144  # four frames beside each other
    run = pretrain(config)
    card: dict[str, Any] = json.loads((run / "encoder" / "config.json").read_text())
    assert (card["frames"], card["channels"], len(card["mean"])) == (4, 3, 3)
    rows = list(Trace(str(run), []).rows(1, crops=True))
    assert [len(set(row["frames"])) for row in rows] == [4] * 4
    target = open_target(str(run))
    assert target.frames == 4
    places = ["--data", str(shards), "--out", str(tmp_path / "store")]
    command("embed", str(run), *places, "--split", "val", "--device", "cpu", "--no-progress")
    store = json.loads((tmp_path / "store" / "val" / "store.json").read_text())
    assert "frames" in json.dumps(store)
