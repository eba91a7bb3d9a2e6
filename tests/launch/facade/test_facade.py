from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import selfsight
import torch
from PIL import Image


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
def model(tmp_path_factory: pytest.TempPathFactory) -> selfsight.Model:
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
    return selfsight.load(folder, device="cpu")


def test_importing_it_imports_nothing_heavy() -> None:
    check = "import sys, selfsight; print(sorted({'torch', 'numpy', 'timm', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_names_what_it_has() -> None:
    assert dir(selfsight) == ["Embedding", "Model", "ProbeResults", "Run", "load", "pretrain", "probe"]
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


def test_a_refused_training_raises_with_the_message(photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no preset 'mae_own'; did you mean"):
        selfsight.pretrain("mae_own", data=photos, quiet=True)


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
