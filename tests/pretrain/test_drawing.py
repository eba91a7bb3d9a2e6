"""Pictures over time: of the same images, and without a trace in what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_train import run_all
from tiny import config_data

from pretrain.config import parse_config
from pretrain.train import pretrain


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


def test_two_ranks_under_zero_3_and_a_resume_draw_what_one_process_draws(shards: Path, tmp_path: Path) -> None:
    tracking = {"pictures_every_steps": 2}
    one = config_data("dino", "vit", shards, tmp_path / "one", train={"steps": 4}, tracking=tracking)
    two = {**one, "runs": str(tmp_path / "two"), "engine": {**one["engine"], "zero_stage": 3}}
    plain = {**two, "runs": str(tmp_path / "plain"), "tracking": {**one["tracking"], "pictures_every_steps": 0}}
    first_half = {**two, "checkpoint": {"every_steps": 2}, "runs": str(tmp_path / "halves")}
    rounded = {**one, "runs": str(tmp_path / "bf16"), "engine": {**one["engine"], "precision": "bf16"}}
    for data in (one, rounded):
        pretrain(parse_config(data))
    run_all([two, plain], 2, tmp_path)
    assert losses(two) == losses(plain)

    name = "attention*"
    there, here = drawn(two, name), drawn(one, name)
    assert drawn(rounded, name)[4].shape == here[4].shape
    assert sorted(there) == sorted(here) == [1, 2, 4]
    for step, picture in there.items():
        difference = np.abs(picture.astype(int) - here[step].astype(int))
        assert picture.shape == here[step].shape
        assert (difference[:, :64] == 0).all()
        assert np.median(difference) <= 1
    run_all([first_half], 2, tmp_path)
    run = Path(first_half["runs"]) / first_half["name"]
    for path in (run / "pictures").iterdir():
        path.unlink()
    again = {**first_half, "tracking": {**first_half["tracking"], "pictures_every_steps": 1}}
    _go_back(run, to=2)
    run_all([again], 2, tmp_path)
    resumed = drawn(again, name)
    assert sorted(resumed) == [3, 4]
    assert np.array_equal(resumed[4], there[4])


def _go_back(run: Path, to: int) -> None:
    """As if the run had been killed after its checkpoint of step `to`."""
    import shutil

    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > to:
            shutil.rmtree(path)
    shutil.rmtree(run / "encoder")
