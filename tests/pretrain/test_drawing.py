"""Pictures over time: of the same images, and without a trace in what is learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_train import run_all
from tiny import config_data

from pretrain.config.load import parse_config
from pretrain.run import pretrain


def losses(data: dict[str, Any]) -> list[tuple[Any, ...]]:
    lines = (Path(data["runs"]) / data["name"] / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["grad_norm"], row["ids_digest"]) for row in map(json.loads, lines)]


def drawn(data: dict[str, Any], name: str) -> dict[int, np.ndarray[Any, Any]]:
    folder = Path(data["runs"]) / data["name"] / "pictures"
    return {int(path.stem[-8:]): np.asarray(Image.open(path)) for path in folder.glob(f"{name}-*.png")}


#: What each shows, and how many of its columns of 64 px are the image itself (MAE and MIM: and its mask).
KINDS = {
    "dino": ("attention-of-the-teacher's-class-token", 1),
    "mae": ("reconstructions", 2),
    "codes": ("attention", 1),
}


@pytest.mark.parametrize("method", list(KINDS))
def test_pictures_show_the_same_images_and_leave_no_trace(method: str, shards: Path, tmp_path: Path) -> None:
    encoder = {"family": "beit", "dim": 32, "depth": 2, "heads": 2, "patch": 4} if method == "codes" else {}
    plain = config_data(method, "vit", shards, tmp_path / "plain", train={"steps": 4}, checkpoint={"every_steps": 2})
    plain["encoder"] = encoder or plain["encoder"]
    drawing = {**plain, "runs": str(tmp_path / "drawn"), "tracking": {**plain["tracking"], "pictures_every_steps": 1}}
    for data in (plain, drawing):
        pretrain(parse_config(data))
    assert losses(plain) == losses(drawing)

    name, num_fixed = KINDS[method]
    pictures = drawn(drawing, f"{name}*")
    assert sorted(pictures) == [1, 2, 3, 4]
    fixed = {step: picture[:, : 64 * num_fixed] for step, picture in pictures.items()}
    assert all(np.array_equal(fixed[1], each) for each in fixed.values())
    assert not np.array_equal(pictures[1][:, 64 * num_fixed :], pictures[4][:, 64 * num_fixed :])
    crops = drawn(drawing, "crops")
    assert not np.array_equal(crops[1], crops[2])  # those of the step itself: what the loader gives


def test_two_ranks_under_zero_3_draw_what_one_process_draws(shards: Path, tmp_path: Path) -> None:
    one = config_data("dino", "vit", shards, tmp_path / "one", train={"steps": 3}, tracking={"pictures_every_steps": 2})
    rounded = {**one, "runs": str(tmp_path / "bf16"), "engine": {**one["engine"], "precision": "bf16"}}
    two = {**one, "runs": str(tmp_path / "two"), "engine": {**one["engine"], "zero_stage": 3}}
    plain = {**two, "runs": str(tmp_path / "plain"), "tracking": {**one["tracking"], "pictures_every_steps": 0}}
    for data in (one, rounded):
        pretrain(parse_config(data))
    run_all([two, plain], 2, tmp_path)
    assert losses(two) == losses(plain)
    there, here = drawn(two, "attention*"), drawn(one, "attention*")
    assert sorted(there) == sorted(here) == [1, 2, 3]
    for step, picture in there.items():
        assert picture.shape == here[step].shape == drawn(rounded, "attention*")[step].shape
        difference = np.abs(picture.astype(int) - here[step].astype(int))
        assert (difference[:, :64] == 0).all()  # the images
        assert np.median(difference) <= 1


def test_a_resumed_run_draws_what_it_would_have_drawn(shards: Path, tmp_path: Path) -> None:
    data = config_data("mae", "swin", shards, tmp_path, train={"steps": 4}, checkpoint={"every_steps": 2})
    data["tracking"]["pictures_every_steps"] = 1
    run = pretrain(parse_config(data))
    first = drawn(data, "reconstructions")
    for path in [*(run / "pictures").iterdir(), *(run / "encoder").iterdir()]:
        path.unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")  # as if it had been killed after step 2
    pretrain(parse_config(data))
    again = drawn(data, "reconstructions")
    assert sorted(again) == [3, 4]
    assert all(np.array_equal(again[step], first[step]) for step in again)


def test_images_that_are_gone_do_not_end_a_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError("the shard is gone")

    monkeypatch.setattr("pretrain.tracking.drawing.loader_of", gone)
    data = config_data("mae", "vit", shards, tmp_path, train={"steps": 2})
    data["tracking"]["pictures_every_steps"] = 1
    pretrain(parse_config(data))
    assert sorted(drawn(data, "reconstructions")) == [1, 2]
    assert "can't be read again (the shard is gone)" in capsys.readouterr().out
