from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import selfsight
import torch
from PIL import Image

from data_pipelines.images.pixels import turned


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "photos"
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            path = folder / split / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pretrain.encoders.saved import EncoderCard, fresh_encoder, save_encoder
    from pretrain.encoders.vit.config import VitConfig

    card = EncoderCard(
        VitConfig(size="tiny", dim=32, depth=2, heads=2, patch=8),
        (32, 32),
        3,
        (0.5, 0.5, 0.5),
        (0.2, 0.2, 0.2),
        "dino",
        "class",
        1,
        1.0,
        "tiny",
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "encoder"
    save_encoder(folder, fresh_encoder(card).state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def model(encoder: Path) -> selfsight.Model:
    return selfsight.load(encoder, device="cpu")


def test_importing_it_imports_nothing_heavy() -> None:
    check = "import sys, selfsight; print(sorted({'torch', 'numpy', 'timm', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_names_what_it_has() -> None:
    functions = ["backbone", "finetune", "load", "pretrain", "probe"]
    assert dir(selfsight) == ["Embedding", "Model", "ProbeResults", "Run", *functions]
    with pytest.raises(AttributeError, match=r"selfsight has no 'encode'; it has Embedding, .*, probe"):
        _ = selfsight.encode


def test_features_of_a_folder_are_those_of_its_images_one_by_one(model: selfsight.Model, photos: Path) -> None:
    features = model.embed(photos, batch_size=3)
    assert features.values.shape == (8, 32)
    assert features.values.dtype == np.float32
    assert features.classes == ("class0", "class1")
    for key, label, split, value in zip(features.keys, features.labels, features.splits, features.values, strict=True):
        assert key.startswith(f"{split}/class{label}/")
        tokens = model.encoder(model.transform(photos / key)[None])
        torch.testing.assert_close(torch.from_numpy(value), tokens.prefix_tokens[0, 0].detach(), rtol=1e-4, atol=1e-5)


def test_features_of_shards_are_those_of_the_images(model: selfsight.Model, photos: Path, tmp_path: Path) -> None:
    from data_pipelines.packing.write import pack

    pack(photos, tmp_path / "shards", progress=False)
    of_images, of_shards = model.embed(photos), model.embed(tmp_path / "shards")
    assert of_shards.splits.tolist() == ["train"] * 6 + ["val"] * 2
    np.testing.assert_allclose(np.sort(of_images.values, axis=0), np.sort(of_shards.values, axis=0), atol=1e-5)
    assert len(model.embed(tmp_path / "shards", split="val")) == 2


@pytest.mark.parametrize("make", [str, Path, Path.read_bytes, Image.open, lambda path: np.asarray(Image.open(path))])
def test_the_transform_takes_an_image_however_it_is_given(model: selfsight.Model, photos: Path, make) -> None:
    path = photos / "train" / "class0" / "0.png"
    found = model.transform(make(path))
    assert found.shape == (3, 32, 32)
    assert torch.equal(found, model.transform(path))


def test_an_image_that_cannot_be_read_is_left_out_and_told_of(model: selfsight.Model, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    said: list[str] = []
    assert model.embed(tmp_path, say=said.append).keys.tolist() == ["a.png"]
    assert len(said) == 1
    assert "1 images are left out" in said[0]


def test_a_feature_or_split_that_is_not_there(model: selfsight.Model, photos: Path) -> None:
    with pytest.raises(ValueError, match=r"feature is 'cls'; this encoder has class, mean"):
        model.embed(photos, feature="cls")
    with pytest.raises(FileNotFoundError, match=r"no split 'test'; it has train, val"):
        model.embed(photos, split="test")


def test_features_are_written_and_read_again(model: selfsight.Model, photos: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    features = model.embed(photos)
    with np.load(features.save_npz(tmp_path / "f.npz")) as stored:
        assert np.array_equal(stored["values"], features.values)
        assert stored["keys"].tolist() == features.keys.tolist()
    table = pq.read_table(features.to_parquet(tmp_path / "f.parquet"))
    assert np.array_equal(np.array(table["feature"].to_pylist(), np.float32), features.values)
    assert table["class"].to_pylist() == [features.classes[label] for label in features.labels]


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_pillow_image_is_turned_as_its_file_is(model: selfsight.Model, tmp_path: Path, turn: int) -> None:
    pixels = np.random.default_rng(turn).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(model.transform(Image.open(tmp_path / "a.png")), model.transform(tmp_path / "a.png"))
    upright = Image.fromarray(turned(pixels, turn))
    assert torch.equal(model.transform(tmp_path / "a.png"), model.transform(upright))


def test_damaged_exif_of_a_pillow_image_leaves_it_as_it_is(model: selfsight.Model) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    expected = model.transform(image)
    image.info["exif"] = b"no exif"
    assert torch.equal(model.transform(image), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_a_pillow_image_of_any_mode_of_eight_bits_is_that_of_its_colours(model: selfsight.Model, mode: str) -> None:
    grey = Image.fromarray(np.full((40, 40), 255, np.uint8))
    grey.paste(0, (0, 0, 20, 40))
    by_way = {"La": "LA", "RGBa": "RGBA"}.get(mode)
    image = grey.convert(by_way).convert(mode) if by_way else grey.convert(mode)
    assert image.mode == mode
    torch.testing.assert_close(model.transform(image), model.transform(grey), atol=0.03, rtol=0)


def test_transparent_pixels_of_a_pillow_image_are_black(model: selfsight.Model) -> None:
    clear = Image.new("RGBA", (40, 40), (200, 100, 50, 0))
    black = model.transform(Image.new("RGB", (40, 40)))
    for mode in ("RGBA", "RGBa"):
        assert torch.equal(model.transform(clear.convert(mode)), black)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_levels_of_sixteen_bits_of_a_pillow_image_are_kept(model: selfsight.Model, mode: str) -> None:
    levels = np.random.default_rng(0).integers(0, 65521, (40, 40)).astype(np.uint16)
    image = Image.fromarray(levels.astype(np.int32))
    if mode != "I":
        image = Image.frombytes(mode, (40, 40), levels.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    assert image.mode == mode
    assert torch.equal(model.transform(image), model.transform(levels))


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        (np.zeros((40, 40), np.float32), "mode F does not say which level is white; give an array of uint8"),
        (np.full((40, 40), 70_000, np.int32), "mode I has levels 70000 .. 70000; give an array of uint8"),
        (np.full((40, 40), -1, np.int32), "mode I has levels -1 .. -1; give an array of uint8"),
    ],
)
def test_levels_without_a_known_scale_are_refused(model: selfsight.Model, levels: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        model.transform(Image.fromarray(levels))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_refused_before_any_work(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device is cuda, .*cpu"):
        selfsight.load(tmp_path / "nothing", device="cuda")
    with pytest.raises(ValueError, match=r"device is cuda, .*cpu"):
        selfsight.probe(encoder, tmp_path / "nothing", device="cuda")


@pytest.mark.parametrize(
    ("preset", "data", "overrides", "folder"),
    [
        ("my.yaml", None, {}, "elsewhere/abc"),
        (Path("my.yaml"), "shards", {}, "elsewhere/abc"),
        ("my.yaml", None, {"name": "new"}, "elsewhere/new"),
        ("my.yaml", None, {"runs": Path("there")}, "there/abc"),
        ("other.yaml", None, {}, "elsewhere/other"),  # which extends the first, and has a name of its own
        ("demo", "shards", {}, "runs/demo"),
        ("name=first", "photos", {}, "runs/first"),
        (None, "photos", {}, "runs/photos"),
        (None, None, {"data.train": "raw"}, "runs/raw"),
        (None, None, {"data.train": "raw", "runs": "there", "method.no_such": 1}, "there/raw"),
        (None, Path("my photos.v2"), {}, "runs/my-photos"),
        (None, "photos", {"name": "1e3"}, "runs/1e3"),
    ],
)
def test_the_folder_of_a_run_is_the_one_that_it_trains_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Any, data: Any, overrides: dict[str, Any], folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("extends: demo\nruns: elsewhere\nname: abc\ndata: {train: shards}\n")
    (tmp_path / "other.yaml").write_text("extends: my.yaml\n")
    started: list[str] = []

    def command(module: str, *arguments: str) -> list[str]:
        started.extend(arguments)
        (tmp_path / "my.yaml").write_text("")  # a file that changes meanwhile
        return [sys.executable, "-c", ""]

    monkeypatch.setattr("selfsight.run.python_module", command)
    assert selfsight.pretrain(preset, data, quiet=True, **overrides).folder == Path(folder)
    assert started[0] == "pretrain"


def test_the_folder_of_a_picked_preset_is_that_of_the_command(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from data_pipelines.packing.grouping import NO_GROUPS
    from launch.own_data import prepare, run_folder
    from pretrain.config.load import load_config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    for overrides in ([f"data.train={photos}"], [f"data.train={photos}", "name='1e3'", "runs=there"]):
        chosen = prepare(None, overrides, None, NO_GROUPS)
        config = load_config(chosen.preset, chosen.overrides)
        assert run_folder(None, overrides, None) == Path(config.runs) / config.name


def test_a_probe_takes_a_number_of_seeds_and_one_probe_by_name_and_is_quiet(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    results = selfsight.probe(
        encoder, photos, seeds=2, also="logistic", epochs=1, device="cpu", out=tmp_path / "p.json", progress=False
    )
    assert capfd.readouterr() == ("", "")
    assert results["protocol"]["seeds"] == [0, 1]
    assert (tmp_path / "p.json").is_file()
    assert list(results.accuracy()) == ["k-NN class", "k-NN mean", "linear", "logistic"]
    assert "k-NN class*" in str(results)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"epoch": 3}, TypeError, "unexpected keyword argument 'epoch'"),
        ({"seeds": 0}, ValueError, "seeds is 0; take 1 or more"),
        ({"seeds": []}, ValueError, "seeds is 0; take 1 or more"),
        ({"epochs": 0}, ValueError, "epochs is 0; take 1 or more"),
        ({"also": "logistics"}, ValueError, "there is no probe 'logistics'; there are"),
        ({"full": True}, ValueError, "full is a setting of none of"),
    ],
)
def test_wrong_options_of_a_probe_are_told_before_images_are_packed(
    encoder: Path, photos: Path, monkeypatch: Any, options: dict[str, Any], error: Any, told: str
) -> None:
    monkeypatch.setattr("selfsight.probing.shards_of", lambda *_: pytest.fail("it packs"))
    with pytest.raises(error, match=told):
        selfsight.probe(encoder, photos, **options)
    with pytest.raises(FileNotFoundError, match="nothing is not a folder"):
        selfsight.probe(photos / "nothing", photos)


def test_a_refused_training_raises_with_the_message(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no preset 'mae_own'; did you mean"):
        selfsight.pretrain("mae_own", data=photos, quiet=True)


@pytest.mark.parametrize(
    ("target", "preset", "overrides", "folder"),
    [
        ("ENCODER", None, {}, "runs/runs0-finetune"),
        ("ENCODER", "finetune_vit_cifar_cpu", {"name": "mine", "runs": Path("there")}, "there/mine"),
        ("none", "finetune_vit_cifar_cpu", {}, "runs/finetune_vit_cifar_cpu"),
    ],
)
def test_fine_tuning_runs_the_command_and_names_the_folder_that_it_trains_in(
    encoder: Path, photos: Path, monkeypatch: Any, target: str, preset: Any, overrides: dict[str, Any], folder: str
) -> None:
    from data_pipelines.packing.grouping import Grouping
    from launch.finetune_command import prepare
    from pretrain.config.load import load_config

    started: list[str] = []

    def command(module: str, *arguments: str) -> list[str]:
        started.extend(arguments)
        return [sys.executable, "-c", ""]

    monkeypatch.setattr("selfsight.run.python_module", command)
    monkeypatch.setattr("launch.own_data.shards_of", lambda data, *_, **__: data)
    monkeypatch.setattr("launch.finetune_command._following", lambda *_: [])  # what the data decide
    target = str(encoder) if target == "ENCODER" else target
    train = {"batch_size": 8}
    run = selfsight.finetune(target, photos, preset, val_share=0.1, quiet=True, train=train, **overrides)
    assert started[:2] == ["finetune", target]
    assert {"train.batch_size=8", f"--data={photos}", "--val-share=0.1"} <= set(started)
    given = [argument for argument in started[2:] if "=" in argument and not argument.startswith("--")]
    config = load_config(*prepare(target, preset, given, str(photos), Grouping(0.1)))
    assert run.folder == Path(folder) == Path(config.runs) / config.name


def test_fine_tuning_from_nothing_or_nowhere_is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match="which encoder"):
        selfsight.finetune("none", photos)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        selfsight.finetune("nowhere", photos)


@pytest.mark.parametrize("name", ["eval", "pretrain", "launch", "data_pipelines"])
def test_a_file_of_the_users_by_the_name_of_a_package_of_ours_is_not_imported(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("raise SystemExit('the user's file ran')")
    code = (
        "import selfsight, eval.splits, pretrain.config, launch.ranks, data_pipelines.rng; selfsight.load; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_file_of_the_users_that_is_imported_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "pretrain.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import pretrain, selfsight"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert f"{tmp_path}/pretrain.py is imported as pretrain, and Selfsight has a package of that name" in done.stderr
