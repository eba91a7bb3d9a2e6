"""Exports opened by those who will read them, and what is refused: nothing half-made or wrong keeps its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import pretrain.interop.export as module
import pretrain.interop.onnx_graph as onnx_graph
from eval.target import open_target
from launch.cli import app, is_user_error
from launch.export_command import probe_tables
from pretrain.config import EncoderConfig
from pretrain.encoders import build_encoder
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.pvt_v2.config import PvtV2Config
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.twins.config import TwinsConfig
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig
from pretrain.encoders.vit.config import VitConfig
from pretrain.interop.export import check_export, export_encoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = {"dim": 32, "depth": 2, "heads": 2, "patch": 8}
VIT = VitConfig(**SMALL)
CONV = VitConfig(**SMALL, stem="conv", pool="mean")
SWIN = SwinConfig(dim=16, depths=(2, 1), heads=(1, 2), patch=2, window=4)
PVT = PvtConfig(dims=(16, 32), depths=(1, 1), heads=(1, 2), mlp_ratios=(2, 2), sr=(2, 1), patch=4)
IN_TIMM = {
    "vit": VIT,
    "vit mean, registers, sin-cos, layer scale": VitConfig(
        **SMALL, pool="mean", registers=2, positions="sincos", layer_scale=0.1
    ),
    "vit without class token": VitConfig(**SMALL, pool="mean", class_token=False),
    "swin": SWIN,
    "swin v2": SwinConfig(version=2, dim=16, depths=(2, 1), heads=(1, 2), patch=2, window=4),
    "beit": BeitConfig(**SMALL),
    "pvt v2": PvtV2Config(dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2)),
    "twins": TwinsConfig(dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), window=2),
    "distillation token": VitConfig(**SMALL, distillation_token=True),
    "any timm model": TimmConfig(model="resnet18", args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
}
UM_MAE_SWIN = UmMaeSwinConfig(dim=16, depths=(2, 1), heads=(1, 2), patch=2, window=4)
ALL = IN_TIMM | {"vit conv": CONV, "pvt": PVT, "um_mae_swin": UM_MAE_SWIN}
FILES = {"timm": "out.safetensors", "safetensors": "out.safetensors", "hf": "hub", "onnx": "out.onnx"}


def card_of(config: EncoderConfig, size: tuple[int, int] = (32, 32), channels: int = 3, step: int = 40) -> EncoderCard:
    return EncoderCard(config, size, channels, MEAN[:channels], STD[:channels], "dino", "mean", step, 1.25, "photos")


def saved(folder: Path, config: EncoderConfig, **values: Any) -> Path:
    """An encoder folder whose weights are all drawn, so that none that is left out goes unseen."""
    torch.manual_seed(0)
    card = card_of(config, **values)
    encoder = build_encoder(config, card.image_size, card.channels)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_encoder(folder, encoder.state_dict(), card)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "encoder", VIT)


def random_images(size: tuple[int, int] = (32, 32), channels: int = 3, count: int = 4) -> Tensor:
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def expected(folder: Path, images: Tensor) -> Any:
    """What the encoder makes of images in 0 .. 1, each channel normalised by hand."""
    encoder, card = load_encoder(folder)
    channels = [(images[:, i] - card.mean[i]) / card.std[i] for i in range(card.channels)]
    return encoder(torch.stack(channels, dim=1))


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", ALL)
def test_one_file_opens_again_by_itself(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "encoder", ALL[name])
    done = export_encoder(folder, tmp_path / "out.safetensors", "safetensors")
    encoder, card = load_encoder(tmp_path / "out.safetensors")
    assert card == card_of(ALL[name])
    original = load_encoder(folder)[0].state_dict()
    assert all(torch.equal(value, original[key]) for key, value in encoder.state_dict().items())
    assert (done.difference, done.tolerance) == (0.0, 1e-5)
    assert left_in(tmp_path) == {"encoder", "out.safetensors"}


def test_an_exported_file_can_be_probed_and_exported_on(tmp_path: Path, source: Path) -> None:
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    export_encoder(source, once, "safetensors")
    target = open_target(str(once))
    assert (target.mean, target.std, target.step, target.image_size) == (MEAN, STD, 40, 32)
    export_encoder(once, twice, "timm")
    headers = []
    for path in (once, twice):
        with safe_open(path, "pt") as file:
            headers.append(file.metadata())
    assert headers[0] == headers[1]
    assert all(torch.equal(value, load_file(twice)[key]) for key, value in load_file(once).items())


@pytest.mark.parametrize("name", IN_TIMM)
def test_timm_opens_the_file_by_the_recipe_in_its_header(tmp_path: Path, name: str) -> None:
    folder, out = saved(tmp_path / "encoder", IN_TIMM[name]), tmp_path / "out.safetensors"
    done = export_encoder(folder, out, "timm")
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert tuple(json.loads(header["selfsight"])["mean"]) == MEAN
    model = timm.create_model(**json.loads(header["timm"]), checkpoint_path=str(out)).eval()
    images = random_images()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(model((images - mean) / std), expected(folder, images).pooled, atol=1e-5, rtol=0)
    assert 0 <= done.difference <= 1e-5


def test_the_printed_lines_work(tmp_path: Path, source: Path) -> None:
    images = random_images()
    normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    pooled = expected(source, images).pooled
    for kind in ("timm", "hf", "safetensors"):
        out = tmp_path / kind / FILES[kind]
        space: dict[str, Any] = {"images": normalised}
        exec(export_encoder(source, out, kind).usage, space)
        features = space["features"]
        torch.testing.assert_close(features.pooled if kind == "safetensors" else features, pooled)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (VIT, {}),
        (VIT, {"size": (16, 48)}),
        (VIT, {"channels": 1}),
        *((config, {}) for name, config in IN_TIMM.items() if not name.startswith("vit")),
    ],
)
def test_timm_reads_the_hub_folder_and_normalises_as_in_training(
    tmp_path: Path, config: EncoderConfig, values: dict[str, Any]
) -> None:
    folder, out = saved(tmp_path / "encoder", config, **values), tmp_path / "hub"
    export_encoder(folder, out, "hf")
    assert left_in(out) == {"README.md", "config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    card = card_of(config, **values)
    assert tuple(data["input_size"]) == (card.channels, *card.image_size)
    assert (tuple(data["mean"]), tuple(data["std"])) == (card.mean, card.std)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.875)
    images = random_images(card.image_size, card.channels)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(model((images - mean) / std), expected(folder, images).pooled, atol=1e-5, rtol=0)
    assert model.num_features == json.loads((out / "config.json").read_text())["num_features"]
    # for fine-tuning: a classifier of one's own on the same weights
    tuned = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5).state_dict()
    assert all(torch.equal(value, tuned[key]) for key, value in model.state_dict().items())
    assert len(tuned) > len(model.state_dict())
    assert load_encoder(out)[1] == card


@pytest.mark.parametrize(
    "config",
    [
        VitConfig(**SMALL | {"depth": 1}, pool="mean", registers=2, positions="sincos", layer_scale=0.1),
        VitConfig(**SMALL | {"depth": 1}, class_token=False, pool="mean", stem="conv"),
        SwinConfig(dim=16, depths=(2,), heads=(1,), patch=2, window=4),
        BeitConfig(**SMALL | {"depth": 1}),
    ],
)
def test_onnx_takes_raw_images_and_any_number_of_them(tmp_path: Path, config: EncoderConfig) -> None:
    folder, out = saved(tmp_path / "encoder", config), tmp_path / "out.onnx"
    done = export_encoder(folder, out, "onnx")
    assert (done.tolerance, done.difference < 1e-4) == (1e-4, True)
    space: dict[str, Any] = {"images": random_images().numpy()}
    exec(done.usage, space)
    np.testing.assert_allclose(space["pooled"], expected(folder, random_images()).pooled, atol=1e-4)
    session = onnxruntime.InferenceSession(str(out))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == (list(MEAN), list(STD))
    assert "0 .. 1" in metadata["image_range"]
    names = [output.name for output in session.get_outputs()]
    encoder = load_encoder(folder)[0]
    assert names == ["pooled", "tokens", "class"][: 3 if encoder.has_class_token else 2]
    for count in (1, 4):
        images = random_images(count=count)
        features = expected(folder, images)
        found = dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))
        np.testing.assert_allclose(found["pooled"], features.pooled, atol=1e-4)
        np.testing.assert_allclose(found["tokens"], features.tokens, atol=1e-4)
        if encoder.has_class_token:
            np.testing.assert_allclose(found["class"], features.prefix_tokens[:, 0], atol=1e-4)
    graph = onnx.load(out).graph
    assert not any(str(Path(__file__).parents[2]) in str(node) for node in graph.node)  # no paths of this machine


def change_a_weight(path: Path) -> None:
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["blocks.1.mlp.fc2.weight"][3, 5] += 0.01
    save_file(tensors, path, header)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def forget_a_key(path: Path) -> None:
    tensors = load_file(path)
    del tensors["blocks.0.norm1.bias"]
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(tensors, path, header)


def not_a_number(path: Path) -> None:
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["norm.bias"][0] = float("nan")
    save_file(tensors, path, header)


@pytest.mark.parametrize("damage", [change_a_weight, cut_short, forget_a_key, not_a_number])
@pytest.mark.parametrize("kind", ["safetensors", "timm", "hf"])
def test_a_damaged_export_is_caught_and_removed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: Callable[[Path], None]
) -> None:
    def check_damaged(path: Path, *rest: Any) -> float:
        damage(path / "model.safetensors" if path.is_dir() else path)
        return check_export(path, *rest)

    monkeypatch.setattr(module, "check_export", check_damaged)
    with pytest.raises(ValueError, match=r"so it was removed|nothing was kept") as caught:
        export_encoder(source, tmp_path / FILES[kind], kind)
    assert is_user_error(caught.value)
    assert left_in(tmp_path) == {"encoder"}


def test_another_normalisation_in_the_hub_folder_is_caught(tmp_path: Path, source: Path) -> None:
    export_encoder(source, tmp_path / "hub", "hf")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.4, 0.31]
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    encoder, card = load_encoder(source)
    with pytest.raises(ValueError, match=r"other features than the encoder: they differ by up to .* \(allowed 1e-05\)"):
        check_export(tmp_path / "hub", "hf", encoder, card, None)


def test_a_wrong_onnx_graph_is_caught_and_removed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right for the batch it was made with only, or with another weight."""

    def run_graph(wrong: Callable[[Tensor], Tensor]) -> None:
        monkeypatch.setattr(module, "run_onnx", lambda path, images: {"pooled": wrong(images)})
        monkeypatch.setattr(module, "write_onnx", lambda path, encoder, card: path.write_bytes(b"a graph"))
        export_encoder(source, tmp_path / "out.onnx", "onnx")

    pooled = expected(source, torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))).pooled
    run_graph(lambda images: pooled[: len(images)] + 0.9e-4)  # what the export is compared with, nearly
    (tmp_path / "out.onnx").unlink()
    with pytest.raises(ValueError, match=r"to onnx gives other features .*allowed 0\.0001"):
        run_graph(lambda images: pooled[: len(images)] + 1e-3)
    with pytest.raises(ValueError, match="the export to onnx failed"):
        run_graph(lambda images: pooled)
    with pytest.raises(ValueError, match="of the shape"):
        run_graph(lambda images: pooled[: len(images), :16])
    assert left_in(tmp_path) == {"encoder"}


@pytest.mark.parametrize(("config", "named"), [(CONV, "stem=conv"), (PVT, "pvt with")])
@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_what_timm_has_not_is_refused_with_what_works(
    tmp_path: Path, config: EncoderConfig, named: str, kind: str
) -> None:
    folder = saved(tmp_path / "encoder", config)
    with pytest.raises(ValueError, match=f"timm .* has no model .*{named}.*--to safetensors .*--to onnx"):
        export_encoder(folder, tmp_path / FILES[kind], kind)
    assert left_in(tmp_path) == {"encoder"}


def test_a_swin_that_timm_computes_otherwise_is_refused(tmp_path: Path) -> None:
    """Windows of 7 on maps of 16 and 8: timm attends to the filling tokens, ours does not."""
    config = SwinConfig(dim=16, depths=(2, 1), heads=(1, 2), patch=2, window=7)
    folder = saved(tmp_path / "encoder", config)
    with pytest.raises(ValueError, match="windows do not divide the map"):
        export_encoder(folder, tmp_path / "hub", "hf")
    assert left_in(tmp_path) == {"encoder"}


def test_what_can_not_be_asked_for(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out, kind, message in (
        (tmp_path / "x", "keras", "'keras'; an encoder can be exported to timm, safetensors, hf, onnx, features"),
        (tmp_path / "x.pt", "timm", "call it .*x.safetensors"),
        (tmp_path / "x", "onnx", "call it .*x.onnx"),
        (source / "x.safetensors", "safetensors", "lies in, the encoder"),
        (source, "hf", "lies in, the encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            export_encoder(source, out, kind, overwrite=True)
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"needs onnxscript, .*pip install .*'\.\[onnx\]'"):
        export_encoder(source, tmp_path / "x.onnx", "onnx")
    assert left_in(tmp_path) == {"encoder"}
    assert left_in(source) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_nothing_is_overwritten_unasked(tmp_path: Path, source: Path, kind: str) -> None:
    out = tmp_path / FILES[kind]
    export_encoder(source, out, kind)
    other = saved(tmp_path / "other", VIT, step=80)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_encoder(other, out, kind)
    assert load_encoder(out)[1].step == 40
    export_encoder(other, out, kind, overwrite=True)
    assert load_encoder(out)[1].step == 80
    assert left_in(tmp_path) == {"encoder", "other", out.name}


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_encoder(source, tmp_path / "hub", "hf")
    monkeypatch.setitem(module.TOLERANCES, "hf", -1.0)
    with pytest.raises(ValueError, match="other features"):
        export_encoder(source, tmp_path / "hub", "hf", overwrite=True)
    assert timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert left_in(tmp_path) == {"encoder", "hub"}


def test_overwrite_replaces_earlier_exports_only(tmp_path: Path, source: Path) -> None:
    precious = tmp_path / "precious"
    export_encoder(source, precious, "hf")
    (precious / "notes.txt").write_text("mine")
    for folder in (precious, tmp_path):
        with pytest.raises(FileExistsError, match="no earlier export"):
            export_encoder(source, folder, "hf", overwrite=True)
    other = saved(tmp_path / "other", VIT)
    (other / "README.md").write_text("an encoder folder with a note")
    with pytest.raises(FileExistsError, match="no earlier export"):
        export_encoder(source, other, "hf", overwrite=True)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        export_encoder(source, tmp_path / "folder.onnx", "onnx", overwrite=True)


def row(top1: float) -> dict[str, Any]:
    score = {"top1": top1, "standard_error": 0.007, "interval": [top1 - 0.014, top1 + 0.014]}
    chosen = {"input": "mean", "standardised": True, "learning_rate": 0.05, "held_out": 0.5}
    linear = {**score, "chosen": chosen, "std_over_seeds": None, "top1_of_seed": {"0": top1}, "at_grid_edge": False}
    return {"headline": "mean", "knn": {"mean": {"20": score}}, "linear": linear}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with configuration, a checkpoint's state, and probes of two steps."""
    folder = tmp_path / "runs" / "photos"
    saved(folder / "encoder", VIT)
    config = {
        "name": "photos",
        "description": "DINO/ViT on what we photographed",
        "runs": "/home/somebody/runs",
        "data": {"train": "/home/somebody/hospital/shards/train-{000..009}.tar"},
        "method": {"name": "dino", "prototypes": 1024},
        "init_from": "/home/somebody/runs/before",
        "tracking": {"project": "secret"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checkpoints" / "step-00000040").mkdir(parents=True)
    segments = [{"start_step": 0, "parts": [{"num_samples": 256, "checksum": "c0ffee" * 8}]}]
    state = {"state": {"step": 40, "order": {"seed": 0, "batch_size": 8, "segments": segments}}}
    (folder / "checkpoints" / "step-00000040" / "state.json").write_text(json.dumps(state))
    (folder / "eval").mkdir()
    for step, top1 in ((40, 0.614), (20, 0.222)):
        results = {
            "target": {"name": "photos", "step": step, "image_size": 32},
            "data": {
                "train": {"spec": "/home/somebody/labelled", "checksum": "a" * 64, "num_labelled": 900},
                "val": {"spec": "/home/somebody/labelled", "checksum": "b" * 64, "num_labelled": 100},
                "num_classes": 4,
            },
            "protocol": {"temperature": 0.07, "linear": {"held_out": 0.1, "epochs": 30}, "features": "cached crops"},
            "rows": {
                "chance": {"uniform": 0.25, "most_frequent_class": 0.311},
                "pixels": row(0.333),
                "untrained": [row(0.355)],
                "pretrained": row(top1),
            },
            "columns": [
                {"probe": "knn", "name": "knn_mean", "title": "k-NN mean", "paths": [["mean", "20"]], "headline": True},
                {"probe": "linear", "name": "linear", "title": "linear", "paths": [[]], "headline": True},
            ],
            "notes": ["linear: on mean"],
            "warnings": [],
        }
        (folder / "eval" / f"probe-{step}-0.json").write_text(json.dumps(results))
    return folder


def test_the_model_card_tells_recipe_data_and_probes_and_no_paths(tmp_path: Path, run: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "hub"), "--to", "hf"])
    assert result.exit_code == 0, result.output
    assert "differ by at most 0 (allowed 1e-05)" in result.output
    assert "pretrained=True" in result.output
    text = (tmp_path / "hub" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["library_name"], head["license"]) == ("timm", "unknown")
    assert "dino" in head["tags"]
    for piece in (
        "DINO/ViT on what we photographed",
        "hf-hub:USER/NAME",
        "mean (0.5, 0.4, 0.3)",
        "| method | dino |",
        "40 steps, 1.25 epochs",
        "prototypes: 1024",
        "| name | shards |",
        "| images | 256 |",
        "c0ffee" * 8,
        "init_from: before",
        "| chance | 31.1 | 31.1 |",
        "| raw pixels | 33.3",
        "| untrained | 35.5",
        "| pretrained | 61.4",
        "train `labelled` (aaaaaaaaaaaaaaaa), val `labelled` (bbbbbbbbbbbbbbbb), at 32x32 px",
        "## Licence",
    ):
        assert piece in text, piece
    for absent in ("somebody", "secret", "hospital", "22.2"):  # paths, the project, and another step's probe
        assert absent not in text


def test_a_card_without_probes_or_run_says_so(tmp_path: Path, source: Path) -> None:
    export_encoder(source, tmp_path / "hub", "hf")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "has not been probed, so nothing is known" in text
    assert "Which images the encoder was trained on is not recorded" in text
    assert "without the run that it came from" in text


def test_probes_of_another_layout_are_named(run: Path) -> None:
    (run / "eval" / "probe-40-1.json").write_text('{"target": {"step": 40}}')
    with pytest.raises(ValueError, match=r"probe-40-1.json is not a result"):
        list(probe_tables(run, 40))


def test_the_command_names_what_it_can_not_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import main

    (tmp_path / "foreign.safetensors").write_bytes(b"no such thing")
    for target, message in (
        ("timm:vit_tiny_patch16_224", "timm has already"),
        (str(tmp_path / "nowhere"), "is not a folder"),
        (str(tmp_path / "foreign.safetensors"), "is not a whole safetensors file"),
    ):
        with pytest.raises(SystemExit):
            main(["export", target, str(tmp_path / "out.onnx"), "--to", "onnx"])
        assert message in " ".join(capsys.readouterr().err.split())
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "foreign.safetensors"), str(tmp_path / "out.onnx"), "--to", "onnx"])
    assert "does not say which encoder it is" in capsys.readouterr().err
