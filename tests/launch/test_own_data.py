from __future__ import annotations

from pathlib import Path

import pytest
from making import encode, picture

from data_pipelines.packing.grouping import NO_GROUPS, Grouping
from launch.own_data import Prepared, prepare
from pretrain.config.load import load_config


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(9):
        (tmp_path / "photos" / f"{number}.png").write_bytes(encode(picture(number, 70, 80)))
    return tmp_path / "photos"


def prepared(photos: Path, *overrides: str, preset: str | None = None) -> Prepared:
    return prepare(preset, overrides, str(photos), NO_GROUPS)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.epocs=3"], r"did you mean train.epochs\?"),
        (["optm.lr=1"], "optim"),
        (["method.name=mim"], "the method is mim, and a preset is picked for mae and dino only"),
        (["method={name:"], "method={name:"),
        (["method={name: vqkd}"], "the method is vqkd"),
        (["method.name=dino", "method.mask.ratio=.5"], "method.mask"),
    ],
)
def test_a_wrong_setting_is_told_of_before_anything_is_packed(overrides: list[str], says: str, photos: Path) -> None:
    with pytest.raises(ValueError, match=says):
        prepared(photos, *overrides)
    assert not (photos.parent / "cache").exists()


@pytest.mark.parametrize(
    ("overrides", "method", "patch"),
    [
        ([], "mae", 8),
        (["method.name=dino"], "dino", 8),
        (["method={name: dino}"], "dino", 8),
        (["method=dino"], "dino", 8),
        (["encoder.patch=16"], "mae", 16),
        (["encoder.patch=10", "method.name=dino"], "dino", 10),
    ],
)
def test_what_is_chosen_gives_way_to_what_is_set(overrides: list[str], method: str, patch: int, photos: Path) -> None:
    preset, settings, _ = prepared(photos, *overrides)
    config = load_config(preset, settings)
    assert (config.method.name, config.encoder.patch) == (method, patch)
    if method == "mae":
        assert config.method.mask.unit == patch


def test_the_command_that_probes_is_told_where_there_is_something_to_test_on(photos: Path) -> None:
    assert prepared(photos).probe is None
    for number in range(40):
        place = photos / "ab"[number % 2] / f"p{number // 4}_{number}.png"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encode(picture(number, 70, 80)))
    for image in photos.glob("*.png"):
        image.unlink()
    told = prepare(None, ["name=x"], str(photos), Grouping(0.2, r"(p\d+)_"))
    assert told.probe == f"selfsight probe runs/x --data {photos} --val-share 0.2 --group-pattern '(p\\d+)_'"


def test_images_that_are_not_there_are_said_not_to_be_there(photos: Path) -> None:
    for preset in (None, "mae_own_data"):
        with pytest.raises(FileNotFoundError, match="photoz, and there is no such file or folder"):
            prepared(photos.with_name("photoz"), preset=preset)


def test_an_encoder_that_the_user_sets_is_not_announced_as_another(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(photos, "engine.device=cpu")
    assert "tiny with 6 blocks" in capsys.readouterr().out
    prepared(photos, "engine.device=cpu", "encoder.depth=3")
    assert "6 blocks" not in capsys.readouterr().out
