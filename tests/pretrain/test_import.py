"""selfsight import: layouts of official checkpoints, every key accounted for, and runs that start from them."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from tiny import build, config_data
from torch import Tensor

from pretrain.config.load import ConfigError, parse_config
from pretrain.encoders import build_encoder
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.read_layout import layouts
from pretrain.encoders.saved import load_encoder
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig
from pretrain.encoders.vit.config import VitConfig
from pretrain.interop.initialise import check_init_from, start_from
from pretrain.interop.official import describe, import_checkpoint
from pretrain.stream.normalisation import resolve_normalisation
from pretrain.survival.run_folder import check_run_folder, write_config

State = dict[str, Tensor]


def vit(size: int = 32, **settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": size, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    return VisionTransformer(**{**shape, **settings}).eval()  # type: ignore[arg-type]


def mae_state() -> State:
    state = dict(vit().state_dict())
    decoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=0)
    named = {f"decoder_{key}": value for key, value in decoder.state_dict().items() if "blocks" in key or "norm" in key}
    extra = {
        "mask_token": torch.randn(1, 1, 16),
        "decoder_pos_embed": torch.randn(1, 17, 16),
        "decoder_embed.weight": torch.randn(16, 64),
        "decoder_embed.bias": torch.randn(16),
        "decoder_pred.weight": torch.randn(192, 16),
        "decoder_pred.bias": torch.randn(192),
    }
    return state | named | extra


def old_swin(state: State) -> State:
    """timm's names as the official code had them: a stage ends with its downsampling; buffers are saved."""
    renamed = {}
    for key, value in state.items():
        if ".downsample." in key:
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        renamed[key] = value
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return renamed


def swin() -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0
    ).eval()


def imported(state: Any, layout: str, folder: Path, *overrides: str, **settings: Any) -> Any:
    torch.save(state, folder / "file.pth")
    return import_checkpoint(folder / "file.pth", layout, folder / "out", overrides=overrides, **settings)


def same_features(folder: Path, model: torch.nn.Module, size: int = 32, pool: bool = True) -> None:
    encoder, _ = load_encoder(folder / "out")
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = model.forward_features(images)
        features = encoder(images)
    ours = (
        features.tokens
        if features.prefix_tokens is None
        else torch.cat([features.prefix_tokens, features.tokens], dim=1)
    )
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=0, atol=1e-5)


def test_mae(tmp_path: Path) -> None:
    found = imported({"model": mae_state(), "args": argparse.Namespace(lr=1), "epoch": 799}, "mae", tmp_path)
    assert isinstance(found.encoder, VitConfig)
    assert (found.encoder.shape, found.encoder.patch, found.encoder.positions) == ((64, 2, 1), 8, "learned")
    assert set(found.left) == {"decoder_pos_embed", "[args]", "[epoch]"}
    assert "decoder_blocks.0.attn.qkv.weight" in found.method
    same_features(tmp_path, vit())
    described = json.loads((tmp_path / "out" / "import.json").read_text(encoding="utf-8"))
    assert described["encoder_keys"] + len(described["method_keys"]) + 1 == len(mae_state())


def test_dino_takes_the_teacher_or_the_student(tmp_path: Path) -> None:
    sides = {}
    for side, seed in (("teacher", 1), ("student", 2)):
        model = vit()
        with torch.no_grad():
            model.cls_token.fill_(float(seed))
        head = {"head.mlp.0.weight": torch.randn(8, 64)}
        backbone = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
        sides[side] = backbone | {f"module.{key}": value for key, value in head.items()}
    for side, value in (("teacher", 1.0), ("student", 2.0)):
        (tmp_path / side).mkdir()
        found = imported({**sides, "epoch": 3}, "dino", tmp_path / side, which=side)
        assert found.weights["cls_token"].unique().tolist() == [value]
        assert set(found.method) == {"head.mlp.0.weight"}


def test_dinov2_with_registers_and_chunks(tmp_path: Path) -> None:
    model = vit(reg_tokens=4, init_values=1e-5)
    with torch.no_grad():
        model.pos_embed[:, 1:5] = 0  # theirs have none
        model.cls_token.normal_()
        model.reg_token.normal_()
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 5:]], dim=1)
    state = {
        key.replace("blocks.", "blocks.0.", 1) if key.startswith("blocks.") else key: v for key, v in state.items()
    }
    state["mask_token"] = torch.randn(1, 64)
    named = {f"teacher.backbone.{key}": value for key, value in state.items()}
    named["teacher.dino_head.mlp.0.weight"] = torch.randn(4, 64)
    named["student.backbone.cls_token"] = torch.zeros(1, 1, 64)
    found = imported({"model": named}, "dinov2", tmp_path)
    assert found.encoder.registers == 4
    assert set(found.method) == {"head.mlp.0.weight", "encoder.mask_token"}
    assert "student.backbone.cls_token" in found.left
    same_features(tmp_path, model)


def test_simmim_on_swin_moves_the_downsampling(tmp_path: Path) -> None:
    state = {f"encoder.{key}": value for key, value in old_swin(dict(swin().state_dict())).items()}
    state["encoder.mask_token"] = torch.randn(1, 1, 16)
    state |= {"decoder.0.weight": torch.randn(48, 32, 1, 1), "decoder.0.bias": torch.randn(48)}
    found = imported({"model": state}, "simmim", tmp_path, image_size=32)
    assert isinstance(found.encoder, SwinConfig)
    assert (found.encoder.shape, found.encoder.window) == ((16, (2, 2), (1, 2)), 4)
    assert found.method["head.weight"].shape == (48, 32)
    same_features(tmp_path, swin())


def test_beit_tells_heads_and_window_from_its_table(tmp_path: Path) -> None:
    model = timm.create_model(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=0,
        use_fc_norm=True,
    )  # fmt: skip
    state = dict(model.state_dict()) | {"head.weight": torch.randn(10, 64), "head.bias": torch.randn(10)}
    found = imported(state, "beit", tmp_path)  # fine-tuned: a table a block, the norm after pooling
    assert isinstance(found.encoder, BeitConfig)
    assert (found.encoder.heads, found.encoder.relative_positions, found.encoder.pooled_norm) == (4, "per_block", True)
    assert set(found.left) >= {"head.weight", "head.bias"}
    encoder, card = load_encoder(tmp_path / "out")
    assert card.mean == (0.5, 0.5, 0.5)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images).pooled, model.eval()(images), rtol=0, atol=1e-5)


def test_a_larger_image_interpolates_positions(tmp_path: Path) -> None:
    found = imported({"model": dict(vit().state_dict())}, "timm", tmp_path, image_size=48)
    assert found.image_size == (32, 32)
    encoder, card = load_encoder(tmp_path / "out")
    assert card.image_size == (48, 48)
    assert encoder.vit.pos_embed.shape == (1, 37, 64)
    described = json.loads((tmp_path / "out" / "import.json").read_text(encoding="utf-8"))
    assert list(described["resized"]) == ["pos_embed"]


def test_the_heads_of_vit_h_are_not_64_wide(tmp_path: Path) -> None:
    model = vit(embed_dim=1280, depth=1, num_heads=16)
    assert imported({"model": dict(model.state_dict())}, "mae", tmp_path).encoder.heads == 16
    same_features(tmp_path, model)


def test_simmim_and_swin_files_hold_their_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CfgNode(dict):  # as yacs has it
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__ |= {"__immutable__": False, "__deprecated_keys__": set(), "__renamed_keys__": {}}

    module = types.ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = "yacs.config", "CfgNode", CfgNode  # type: ignore
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        config = CfgNode({"MODEL": CfgNode({"TYPE": "swin", "DEPTHS": [2, 2]}), "BASE": [""]})
        torch.save({"model": old_swin(dict(swin().state_dict())), "config": config}, tmp_path / "file.pth")
    found = import_checkpoint(tmp_path / "file.pth", "timm", tmp_path / "out", image_size=32)
    assert found.left["[config]"] == "beside the weights"
    same_features(tmp_path, swin())


@pytest.mark.parametrize(("size", "window"), [(32, 8), (32, 16), (48, 12)])
def test_swin_v2_tells_its_size_by_its_last_window(size: int, window: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 0}
    model = SwinTransformerV2(img_size=size, window_size=window, **shape).eval()  # type: ignore[arg-type]
    tables = {key: value for key, value in model.named_buffers() if key.endswith("relative_coords_table")}
    found = imported({"model": old_swin(dict(model.state_dict()) | tables)}, "timm", tmp_path)
    assert (found.encoder.window, found.image_size) == (window, (size, size))
    same_features(tmp_path, model, size)
    (tmp_path / "alone").mkdir()
    with pytest.raises(ValueError, match="tell neither its window nor its image size"):
        imported(dict(model.state_dict()), "timm", tmp_path / "alone")
    imported(dict(model.state_dict()), "timm", tmp_path / "alone", f"window={window}", image_size=size)
    same_features(tmp_path / "alone", model, size)
    pretrained = SwinTransformerV2(  # type: ignore[arg-type]
        img_size=size, window_size=window, pretrained_window_sizes=(4, 4), **shape
    )
    tables = {key: value for key, value in pretrained.named_buffers() if key.endswith("relative_coords_table")}
    (tmp_path / "from").mkdir()
    with pytest.raises(ValueError, match="scaled to the window of an earlier pretraining"):
        imported(dict(model.state_dict()) | tables, "timm", tmp_path / "from")


@pytest.mark.parametrize("settings", [{"init_values": 1e-5}, {"reg_tokens": 4}])
def test_positions_of_patches_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    model = vit(no_embed_class=True, **settings)
    with torch.no_grad():
        model.cls_token.normal_()
    assert model.pos_embed.shape == (1, 16, 64)
    imported(dict(model.state_dict()), "timm", tmp_path)  # DeiT III, timm's DINOv2 with registers
    same_features(tmp_path, model)


def test_beit_v2_brings_its_aggregation_along(tmp_path: Path, shards: Path) -> None:
    model = timm.create_model(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=0,
        use_rel_pos_bias=False, use_shared_rel_pos_bias=True, global_pool="token",
    )  # fmt: skip
    state = dict(model.state_dict())
    further = {f"cls_pt_layers.0.{key}": value + 1 for key, value in model.blocks[0].state_dict().items()}
    head = {"lm_head.weight": torch.randn(50, 64), "lm_head.bias": torch.randn(50), "mask_token": torch.randn(1, 1, 64)}
    found = imported({"model": state | further | head}, "beit", tmp_path)
    assert found.normalisation[0] == (0.485, 0.456, 0.406)  # version 1 has .5
    config = BeitConfig(dim=64, depth=3, heads=4, patch=8)
    further_blocks = build_encoder(config, (32, 32)).further_blocks(1, after=2)
    wanted = {f"aggregation.{key}": value.shape for key, value in further_blocks.state_dict().items()}
    assert {key: v.shape for key, v in found.method.items() if key.startswith("aggregation.")} == wanted
    assert set(found.method) - set(wanted) == {"head.weight", "head.bias", "encoder.mask_token"}
    text = describe(found, tmp_path / "out")
    assert "minus mean (0.485, 0.456, 0.406)" in text


def test_pvt_and_um_mae(tmp_path: Path) -> None:
    configs = {
        "pvt": PvtConfig(dims=(64, 128), depths=(1, 1), heads=(1, 2), mlp_ratios=(2, 2), sr=(2, 1), patch=8),
        "um_mae": UmMaeSwinConfig(dim=8, depths=(1, 2), heads=(1, 2), patch=4, window=4),
    }
    for layout, config in configs.items():
        torch.manual_seed(0)
        encoder = build_encoder(config, (64, 64)).eval()
        state = dict(encoder.inner().state_dict())
        (tmp_path / layout).mkdir()
        overrides = ["window=4"] if layout == "um_mae" else []
        found = imported({"state_dict": state}, layout, tmp_path / layout, *overrides)
        assert found.encoder == config or layout == "pvt"
        back, _ = load_encoder(tmp_path / layout / "out")
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(back(images).pooled, encoder(images).pooled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.qkv.lora": torch.zeros(1)}, "unknown blocks.0.attn.qkv.lora"),
        ({"norm.weight": None}, "lacks norm.weight"),
        ({"pos_embed": torch.zeros(1, 12, 64)}, "no square"),
        ({"blocks.99999999.norm1.weight": torch.zeros(64)}, "numbered with gaps"),
        ({"norm.weight": torch.zeros(64, dtype=torch.int8)}, "no floating-point number"),
        ({"pos_embed": torch.zeros(1).expand(1, 10**10 + 1, 64)}, "not a dense tensor"),
        ({"cls_token": torch.zeros(1, 1, 64, device="meta")}, "not a dense tensor"),
    ],
)
def test_a_key_too_many_or_too_few_is_an_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = {key: value for key, value in (mae_state() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        imported({"model": state}, "mae", tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_is_unpickled_or_overwritten(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(ValueError, match="can't be read as tensors"):
            import_checkpoint(tmp_path / name, "mae", tmp_path / "out")
    assert not (tmp_path / "touched").exists()
    save_file({key: value.contiguous() for key, value in vit().state_dict().items()}, tmp_path / "ok.safetensors")
    import_checkpoint(tmp_path / "ok.safetensors", "timm", tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists"):
        import_checkpoint(tmp_path / "ok.safetensors", "timm", tmp_path / "out")
    with pytest.raises(ValueError, match=f"takes one of {', '.join(layouts())}"):
        import_checkpoint(tmp_path / "ok.safetensors", "moco", tmp_path / "elsewhere")


def test_damaged_files_and_other_layouts_are_told(tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in vit().state_dict().items()}, tmp_path / "ok.safetensors")
    torch.save(dict(vit().state_dict()), tmp_path / "ok.pth")
    for name in ("ok.safetensors", "ok.pth"):
        whole = (tmp_path / name).read_bytes()
        for size in (0, 100, len(whole) // 2):
            (tmp_path / f"cut-{name}").write_bytes(whole[:size])
            with pytest.raises(ValueError, match="can't be read as tensors"):
                import_checkpoint(tmp_path / f"cut-{name}", "timm", tmp_path / "out")
    for layout in ("beit", "simmim", "um_mae", "pvt"):
        with pytest.raises(ValueError, match=r"--as|no keys like") as raised:
            import_checkpoint(tmp_path / "ok.pth", layout, tmp_path / "out")
        assert raised.traceback[-1].frame.f_globals["__name__"].startswith("pretrain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 50}, "must be a multiple of that, such as 48 or 56"),
        ({"mean": (0.5,), "std": (0.5,)}, "--mean has 1 values and the checkpoint takes 3 channels"),
        ({"mean": (0.5, 0.5, 0.5)}, "go together"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, "0 .. 255 by 255"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.0, 0.5)}, "0 .. 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        imported({"model": dict(vit().state_dict())}, "timm", tmp_path, **settings)
    assert not (tmp_path / "out").exists()


def test_an_import_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", "import.json")

    monkeypatch.setattr("pretrain.interop.official.write_json", full)
    with pytest.raises(OSError, match="No space"):
        imported({"model": mae_state()}, "mae", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"file.pth"}


@pytest.fixture
def source(tmp_path: Path) -> str:
    imported({"model": mae_state()}, "mae", tmp_path)
    return str(tmp_path / "out")


def run_data(method: str, shards: Path, tmp_path: Path, **encoder: Any) -> dict[str, Any]:
    data = config_data(method, "vit", shards, tmp_path / "runs")
    data["encoder"] = {"family": "vit", "dim": 64, "depth": 2, "heads": 1, "patch": 8, **encoder}
    if method != "dino":
        data["method"]["mask"]["unit"] = max(8, data["encoder"]["patch"])
    return data


@pytest.mark.parametrize("method", ["mae", "mim", "dino"])
def test_any_method_starts_from_an_import(method: str, source: str, shards: Path, tmp_path: Path) -> None:
    data = {**run_data(method, shards, tmp_path), "init_from": source}
    config = parse_config(data)
    check_init_from(config)
    started = build(config)
    lines = start_from(started, source, method)
    theirs = load_encoder(Path(source))[0].inner().state_dict()
    for key, value in started.encoder.inner().state_dict().items():
        assert torch.equal(value, theirs[key]), key
    assert "fresh" not in " ".join(lines)
    if method == "dino":
        for key, value in started.teacher["encoder"].inner().state_dict().items():
            assert torch.equal(value, theirs[key]), key
    resolved, said = resolve_normalisation(config)
    assert resolved.data.mean == (0.485, 0.456, 0.406)
    assert source in said[0]


def test_other_sizes_of_image_and_patch_and_registers(source: str, shards: Path, tmp_path: Path) -> None:
    data = run_data("dino", shards, tmp_path, patch=4, registers=2)
    started = build(parse_config(data))
    lines = "\n".join(start_from(started, source, "dino"))
    assert "resized: patch_embed.proj.weight ((64, 3, 8, 8) to (64, 3, 4, 4))" in lines
    assert "resized: pos_embed ((1, 17, 64) to (1, 67, 64))" in lines
    assert "fresh: reg_token (not in the source)" in lines
    positions = started.encoder.inner().pos_embed.detach()
    theirs = load_encoder(Path(source))[0].inner().pos_embed.detach()
    assert torch.equal(positions[:, :1], theirs[:, :1])
    assert positions[:, 1:3].abs().sum() == 0  # registers have no place
    assert float(positions[:, 3:].mean()) == pytest.approx(float(theirs[:, 1:].mean()), abs=1e-3)


def test_a_decoder_comes_along_where_it_fits(source: str, shards: Path, tmp_path: Path) -> None:
    data = run_data("mae", shards, tmp_path)
    data["method"] |= {"decoder_dim": 16, "decoder_heads": 1}
    started = build(parse_config(data))
    before = started.decoder_pred.weight.clone()
    lines = "\n".join(start_from(started, source, "mae"))
    saved = load_file(Path(source) / "heads.safetensors")
    for key in ("decoder_pred.weight", "decoder_blocks.0.attn.qkv.weight", "mask_token"):
        assert torch.equal(started.state_dict()[key], saved[key])
    assert not torch.equal(before, started.decoder_pred.weight)
    assert f"{len(saved)} tensors of the method around it" in lines


@pytest.mark.parametrize(
    ("encoder", "source_name", "message"),
    [
        (
            {"family": "swin", "dim": 16, "depths": [2, 2], "heads": [1, 2], "patch": 2, "window": 4},
            None,
            "same family",
        ),
        (None, "nowhere", "init_from: nowhere is not a folder"),
    ],
)
def test_what_cannot_start_a_run_is_refused_before_it(
    encoder: Any, source_name: str | None, message: str, source: str, shards: Path, tmp_path: Path
) -> None:
    data = run_data("dino", shards, tmp_path)
    data["encoder"] = encoder or data["encoder"]
    data["init_from"] = source_name or source
    with pytest.raises(ConfigError, match=message):
        check_init_from(parse_config(data))


def test_a_run_that_has_begun_keeps_its_normalisation(source: str, shards: Path, tmp_path: Path) -> None:
    config = parse_config({**run_data("mae", shards, tmp_path), "init_from": source})
    begun, said = resolve_normalisation(config)
    assert said
    write_config(check_run_folder(begun), begun)
    Path(source).rename(tmp_path / "gone")
    again, _ = resolve_normalisation(config)
    assert again == begun
    check_run_folder(again)
    other = parse_config({**run_data("mae", shards, tmp_path), "init_from": "elsewhere"})
    assert resolve_normalisation(other)[0].data.mean is None


@pytest.mark.parametrize(
    ("settings", "source_name", "message"),
    [
        ({"dim": 32}, None, r"dim 64 \(here 32\).* set encoder.dim=64 encoder.depth=2"),
        ({"heads": 2}, None, r"heads 1 \(here 2\)"),  # no shape shows it
        ({"depth": 1}, None, r"depth 2 \(here 1\)"),
        ({"stem": "conv"}, None, r"stem patch \(here conv\)"),
        ({"positions": "sincos"}, None, r"positions learned \(here sincos\)"),
        ({}, "timm:vit_tiny_patch16_24", "init_from: timm .* has no model 'vit_tiny_patch16_24'; the nearest names"),
    ],
)
def test_other_widths_and_unknown_names_are_refused_before_a_run(
    settings: dict[str, Any], source_name: str | None, message: str, source: str, shards: Path, tmp_path: Path
) -> None:
    data = {**run_data("dino", shards, tmp_path, **settings), "init_from": source_name or source}
    with pytest.raises(ConfigError, match=message):
        check_init_from(parse_config(data))


def test_heads_of_a_timm_model_must_be_the_runs(monkeypatch: pytest.MonkeyPatch, shards: Path, tmp_path: Path) -> None:
    from pretrain.encoders.load import LoadedEncoder
    from pretrain.encoders.timm.encoder import TimmEncoder

    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}
    model = TimmEncoder(TimmConfig(model="vit_tiny_patch16_224", args=args), (32, 32))
    loaded = LoadedEncoder(model, model.mean, model.std, (32, 32), 3)
    monkeypatch.setattr("pretrain.interop.initialise.load_any", lambda *_: loaded)
    with pytest.raises(ValueError, match=r"heads 2, 2, and the run's encoder 1, 1"):
        start_from(build(parse_config(run_data("dino", shards, tmp_path))), "timm:vit_tiny_patch16_224", "dino")


def test_blocks_of_another_width_are_refused(source: str, shards: Path, tmp_path: Path) -> None:
    data = run_data("dino", shards, tmp_path)
    data["encoder"]["dim"] = 32
    with pytest.raises(ValueError, match="none of its blocks fits"):
        start_from(build(parse_config(data)), source, "dino")
