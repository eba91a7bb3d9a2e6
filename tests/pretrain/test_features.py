"""Multi-scale backbones: our features at four scales, windows against the slow form, saved and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import selfsight
import torch
from einops import rearrange
from torch import Tensor, nn
from typer.testing import CliRunner

from launch.cli import app, main
from pretrain.encoders import build_encoder
from pretrain.encoders.base import Encoder, Windows
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.pvt_v2.config import PvtV2Config
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.twins.config import TwinsConfig
from pretrain.encoders.um_mae_swin.config import UmMaeSwinConfig
from pretrain.encoders.vit.config import VitConfig
from pretrain.encoders.vit.encoder import VitEncoder
from pretrain.encoders.vit.windowed import WindowedVit
from pretrain.interop.export import export_encoder
from pretrain.interop.features.backbone import Backbone
from pretrain.interop.features.folder import backbone_of, load_backbone, save_backbone
from pretrain.interop.features.settings import FeatureSettings, evenly_spaced
from pretrain.interop.features.torchvision_rcnn import rcnn_settings

SMALL: dict[str, Any] = {"dim": 32, "depth": 4, "heads": 2, "patch": 16}
VIT = VitConfig(**SMALL, registers=1)
PLAIN = {
    "vit": VIT,
    "without a class token": VitConfig(**SMALL, class_token=False, pool="mean", positions="sincos"),
    "patch 4": VitConfig(**SMALL | {"patch": 4}, stem="conv", pool="mean"),
    "patch 32": VitConfig(**SMALL | {"patch": 32}),
    "beit": BeitConfig(**SMALL, relative_positions="per_block", pooled_norm=True),
    "timm": TimmConfig(model="vit_tiny_patch16_224", args={"depth": 1}),
}
STAGES: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "heads": (1, 2, 2, 4)}
SWIN = SwinConfig(dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), patch=4, window=4)
PYRAMIDS = {
    "swin": SWIN,
    "swin v2 of patch 2": SwinConfig(version=2, dim=8, depths=(1, 2, 1), heads=(1, 2, 2), patch=2, window=4),
    "pvt": PvtConfig(**STAGES),
    "pvt pool": PvtConfig(**STAGES, reduction="pool"),
    "pvt_v2": PvtV2Config(size="b0", **STAGES),
    "twins": TwinsConfig(window=4, **STAGES),
    "um_mae_swin": UmMaeSwinConfig(dim=8, depths=(1, 1, 2, 1), heads=(1, 1, 2, 2), window=2),
}


def drawn(module: nn.Module) -> None:
    """Every parameter at random, so that none that is left out goes unseen."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def encoder_of(config: Any, size: tuple[int, int] = (64, 64)) -> tuple[Encoder, EncoderCard]:
    torch.manual_seed(0)
    encoder = build_encoder(config, size).eval()
    drawn(encoder)
    return encoder, EncoderCard(config, size, 3, (0.5,) * 3, (0.2,) * 3, "mae", "mean", 40, 1.25, "photos")


def backbone(config: Any, size: tuple[int, int] = (64, 64), **settings: Any) -> Backbone:
    return backbone_of(*encoder_of(config, size), FeatureSettings(width=16, **settings))


def images(size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_without_windows_the_last_map_is_the_encoders_tokens(name: str) -> None:
    made = backbone(PLAIN[name], window=0)
    features = made.plain(images())
    ((level, found),) = made.maps(images()).items()
    assert torch.equal(found, as_map(features.tokens, features.grid))
    assert level == f"c{PLAIN[name].stride.bit_length() - 1}" if name != "timm" else "c4"
    maps = made(images())
    assert {key: tuple(value.shape) for key, value in maps.items()} == {
        f"p{level}": (2, 16, 64 // 2**level, 96 // 2**level) for level in (2, 3, 4, 5)
    }
    assert made.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_a_pyramids_maps_are_those_of_its_stages(name: str) -> None:
    made = backbone(PYRAMIDS[name])
    ends = made.plain.stage_ends()
    features = made.plain(images(), layers=ends)
    maps = made.maps(images())
    first = 1 if "patch 2" in name else 2
    assert list(maps) == [f"c{level}" for level in range(first, first + len(ends))]
    for (level, found), stage in zip(maps.items(), features.layers, strict=True):
        expected = as_map(stage.tokens, stage.grid)
        assert torch.equal(found, made.norms[level](expected) if level in made.norms else expected)
        assert found.shape[2:] == (64 // made.own_strides[level], 96 // made.own_strides[level])
        assert found.shape[1] == made.own_widths[level]
    torch.testing.assert_close(maps[level], as_map(features.tokens, features.grid))
    shapes = {key: tuple(value.shape[2:]) for key, value in made(images()).items()}
    assert shapes == {key: (64 // stride, 96 // stride) for key, stride in made.strides.items()}
    assert list(shapes) == (["p2", "p3"] if "patch 2" in name else ["p2", "p3", "p4", "p5"])


@pytest.mark.parametrize(
    ("config", "settings", "unread"),
    [
        (VIT, {"window": 3, "global_blocks": 1}, ()),
        (VIT, {"window": 3, "class_token": False, "filler": "seen", "global_blocks": 1}, ()),
        (PLAIN["beit"], {}, ("encoder.beit.fc_norm",)),
        (SWIN, {"levels": (2, 3)}, ("encoder.swin.layers.2", "encoder.swin.layers.3", "encoder.swin.norm", "norms.c4")),
        (PYRAMIDS["pvt"], {"levels": (3, 4, 5, 6)}, ("norms.c2",)),
    ],
)
def test_every_parameter_that_learns_has_a_gradient(config: Any, settings: dict[str, Any], unread: Any) -> None:
    made = backbone(config, **settings).train()
    sum(value.square().mean() for value in made(images()).values()).backward()
    without = {name for name, parameter in made.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in made.named_parameters() if not parameter.requires_grad}
    assert without == {name for name, _ in made.named_parameters() if name.startswith(unread or "nothing")}


def slow_attention(
    vit: WindowedVit, number: int, normed: Tensor, grid: tuple[int, int], window: tuple[int, int]
) -> Tensor:
    """One image, window by window and head by head, with the bias of every pair written out."""
    attention, tables, prefix = vit.encoder.vit.blocks[number].attn, vit.relative[number], vit.num_prefix
    dim = normed.shape[-1] // attention.num_heads
    cells = {}
    for index in range(grid[0] * grid[1]):
        cells[divmod(index, grid[1])] = normed[prefix + index]
    outcome = torch.zeros_like(normed)
    windows = [(i, j) for i in range(0, grid[0], window[0]) for j in range(0, grid[1], window[1])]
    for top, left in windows:
        places = [(top + i, left + j) for i in range(window[0]) for j in range(window[1])]
        if not vit.windows.filler_seen:
            places = [place for place in places if place in cells]
        inside = [cells.get(place, torch.zeros(normed.shape[-1])) for place in places]
        qkv = attention.qkv(torch.stack([*normed[:prefix], *inside]))
        heads = rearrange(qkv, "n (three h d) -> three h n d", three=3, h=attention.num_heads)
        mixed = []
        for query, key, value in zip(*heads, strict=True):
            logits = query @ key.T / dim**0.5
            for i, (row, column) in enumerate(places):
                for j, (other_row, other_column) in enumerate(places):
                    rows = tables.rows[row - other_row + window[0] - 1]
                    columns = tables.columns[column - other_column + window[1] - 1]
                    logits[prefix + i, prefix + j] += query[prefix + i] @ (rows + columns)
            mixed.append(logits.softmax(dim=-1) @ value)
        projected = attention.proj(torch.cat(mixed, dim=-1))
        outcome[:prefix] += projected[:prefix] / len(windows)
        for place, value in zip(places, projected[prefix:], strict=True):
            if place in cells:
                outcome[prefix + place[0] * grid[1] + place[1]] = value
    return outcome


@pytest.mark.parametrize(
    ("side", "filler_seen", "prefix"),
    [(3, False, False), (3, False, True), (3, True, False), (3, True, True), (6, False, True), (6, True, False)],
)
@torch.no_grad()
def test_windows_and_relative_positions_against_the_slow_form(side: int, filler_seen: bool, prefix: bool) -> None:
    encoder, _ = encoder_of(VIT)
    assert isinstance(encoder, VitEncoder)
    made = WindowedVit(encoder, Windows(side, (1,), True, (4, 5), filler_seen, prefix))
    drawn(made)
    given = torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(3))
    states = encoder.embed(given, None)[0][:, 0 if prefix else 2 :]
    for number, block in enumerate(encoder.vit.blocks):
        window = (4, 5) if number == 1 else (side, side)
        attended = torch.stack([slow_attention(made, number, one, (4, 5), window) for one in block.norm1(states)])
        states = states + attended
        states = states + block.mlp(block.norm2(states))
    features = made(given)
    torch.testing.assert_close(features.states, states, atol=2e-5, rtol=1e-4)
    assert (features.prefix_tokens is not None) == prefix
    assert torch.equal(features.tokens, encoder.final_norm(features.states)[:, 2 if prefix else 0 :])


@torch.no_grad()
def test_a_window_that_holds_the_map_changes_nothing() -> None:
    """Relative positions start at zero, and what fills the window is not seen."""
    made = backbone(VIT, window=7, global_blocks=2)
    assert isinstance(made.encoder, WindowedVit)
    expected = made.plain(images())
    found = made.encoder(images())
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    smaller = backbone(VIT, window=2, global_blocks=2).encoder(images())
    assert (smaller.tokens - expected.tokens).abs().max() > 1e-2


@torch.no_grad()
def test_relative_positions_of_another_size_are_interpolated() -> None:
    made = backbone(VIT, window=0, relative_positions=True, image_size=(128, 128))
    assert [table.shape for table in made.encoder.relative.parameters()] == [(15, 16)] * 8
    torch.testing.assert_close(made.encoder(images()).tokens, made.plain(images()).tokens, atol=1e-5, rtol=1e-5)
    tables = made.encoder.relative[0]
    tables.rows += torch.linspace(0, 14, 15)[:, None]
    pairs = tables((4, 6), stretched=True)[0]
    assert pairs.shape == (4, 4, 16)
    torch.testing.assert_close(pairs[2, 2, 0], torch.tensor(7.0))  # no distance stays none
    torch.testing.assert_close(tables((4, 6), stretched=False)[0][3, 0], tables.rows[10])
    assert pairs[3, 0, 0] > pairs[3, 1, 0] > pairs[3, 3, 0] > pairs[0, 3, 0]


def test_blocks_that_attend_everywhere_are_evenly_spaced() -> None:
    assert evenly_spaced(4, 12) == (2, 5, 8, 11)
    assert evenly_spaced(4, 24) == (5, 11, 17, 23)
    assert evenly_spaced(4, 6) == (1, 2, 4, 5)
    assert evenly_spaced(4, 2) == (0, 1)
    assert backbone(VIT, global_blocks=(0, 2)).encoder.windows.everywhere == (0, 2)


def test_a_patch_of_14_px_is_resampled_to_16() -> None:
    config = VitConfig(**SMALL | {"patch": 14})
    with pytest.raises(ValueError, match=r"stride 14.*powers of 2.*patch=16"):
        backbone(config, size=(56, 56))
    made = backbone(config, size=(56, 56), patch=16)
    original, card = encoder_of(config, (56, 56))
    assert (made.card.image_size, made.card.encoder.patch, card.image_size) == ((64, 64), 16, (56, 56))
    for key, value in made.plain.inner().state_dict().items():
        theirs = original.inner().state_dict()[key]
        assert "patch_embed.proj.weight" in key or torch.equal(value, theirs), key
    flat = torch.ones(1, 3, 64, 64)
    same = original(flat[..., :56, :56]).tokens
    torch.testing.assert_close(made.plain(flat).tokens, same, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SWIN, {"window": 7}, r"window=7, relative_positions=true can't be had of SwinEncoder"),
        (PLAIN["beit"], {"class_token": False}, "class_token=false can't be had of BeitEncoder"),
        (SWIN, {"levels": (1, 2)}, r"levels start with 1.*of level 2,3,4,5 \(strides 4, 8, 16, 32\)"),
        (SWIN, {"patch": 8}, "for plain encoders"),
        (VIT, {"levels": (2, 4)}, "neighbours in ascending order"),
        (VIT, {"global_blocks": (1, 4)}, r"\(1, 4\) are to attend everywhere, and the encoder's are 0 .. 3"),
        (VIT, {"image_size": (60, 64)}, "multiples of the patch of 16 px"),
        (TimmConfig(model="convnext_tiny", args={"depths": [1] * 4, "dims": [8] * 4}), {}, "features_only=True"),
    ],
)
def test_what_an_encoder_can_not_give_is_refused(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone(config, **settings)


def test_images_that_do_not_divide_are_refused() -> None:
    made = backbone(VIT)
    with pytest.raises(ValueError, match=r"60x96 px.*multiples of 32 px.*to 64x96.*size_divisible=32"):
        made(images((60, 96)))
    with pytest.raises(ValueError, match="images of 1 channels, and the backbone takes 3"):
        made(images()[:, :1])


@pytest.mark.parametrize("config", [VIT, SWIN])
@torch.no_grad()
def test_an_export_is_loaded_with_one_line(tmp_path: Path, config: Any) -> None:
    encoder, card = encoder_of(config)
    save_encoder(tmp_path / "encoder", encoder.state_dict(), card)
    out = tmp_path / "maps"
    asked = ["width=16", "levels=[2,3,4]", *(["window=3"] if config is VIT else [])]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "encoder"), str(out), *asked, "--to", "features"])
    assert result.exit_code == 0, result.output
    space: dict[str, Any] = {"images": images()}
    exec(result.output.partition("\n\n")[2], space)  # the lines that it prints
    assert {key: tuple(value.shape) for key, value in space["maps"].items()} == {
        "p2": (2, 16, 16, 24),
        "p3": (2, 16, 8, 12),
        "p4": (2, 16, 4, 6),
    }
    loaded = selfsight.backbone(out)
    assert (loaded.mean, loaded.out_channels, loaded.training) == ((0.5, 0.5, 0.5), 16, False)
    assert torch.equal(loaded.plain(images()).tokens, encoder(images()).tokens)
    again = export_encoder(tmp_path / "encoder", out, "features", settings=asked, overwrite=True)
    assert again.difference == 0.0
    drawn(loaded)
    save_backbone(loaded, tmp_path / "trained")
    trained = load_backbone(tmp_path / "trained")(images())
    assert all(torch.equal(value, trained[name]) for name, value in loaded(images()).items())


def test_a_backbone_is_made_of_an_encoder_too(tmp_path: Path) -> None:
    encoder, card = encoder_of(VIT)
    save_encoder(tmp_path / "encoder", encoder.state_dict(), card)
    made = selfsight.backbone(tmp_path / "encoder", window=0, width=8)
    assert torch.equal(made.maps(images())["c4"], as_map(encoder(images()).tokens, (4, 6)))
    save_backbone(made, tmp_path / "maps")
    with pytest.raises(ValueError, match="made already; export it with width="):
        selfsight.backbone(tmp_path / "maps", width=4)
    with pytest.raises(FileExistsError, match="--overwrite"):
        save_backbone(made, tmp_path / "maps")
    with pytest.raises(FileExistsError, match="no earlier backbone"):
        save_backbone(made, tmp_path / "encoder", overwrite=True)


def test_what_is_no_backbone_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, card = encoder_of(VIT)
    save_encoder(tmp_path / "encoder", encoder.state_dict(), card)
    with pytest.raises(FileNotFoundError, match="--to features"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match="holds an encoder, not a backbone"):
        load_backbone(tmp_path / "encoder")
    save_backbone(backbone(VIT), tmp_path / "maps")
    described = json.loads((tmp_path / "maps" / "config.json").read_text())
    described["settings"]["width"] = 8
    (tmp_path / "maps" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="not of the backbone that it describes"):
        load_backbone(tmp_path / "maps")
    for asked, message in (
        (["--to", "onnx", "width=8"], "width=8 is a setting of --to features"),
        (["--to", "features", "widht=8"], "widht"),
        (["--to", "features", "window=-1"], "window"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path / "encoder"), str(tmp_path / "out.onnx"), *asked])
        assert message in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"encoder", "maps"}


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("config", [VIT, SWIN])
def test_torchvisions_detectors_train_on_it(config: Any, masks: bool) -> None:
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    torch.manual_seed(0)
    made = backbone(config, **({"window": 3, "global_blocks": 1} if config is VIT else {}))
    kind = MaskRCNN if masks else FasterRCNN
    extra = {"mask_predictor": nn.Conv2d(256, 4, 1)} if masks else {}
    detector = kind(
        made,
        **rcnn_settings(made, sizes=[(8,), (16,), (32,), (64,)], masks=masks),
        **extra,
        box_head=TwoMLPHead(16 * 49, 32),
        box_predictor=FastRCNNPredictor(32, 4),
        rpn_post_nms_top_n_train=8,
        min_size=60,
        max_size=96,
    ).train()  # fmt: skip
    assert detector.transform.image_mean == [0.5] * 3
    mask = torch.zeros(1, 60, 90, dtype=torch.uint8)
    mask[:, 8:30, 10:34] = 1
    target = {"boxes": torch.tensor([[10.0, 8.0, 34.0, 30.0]]), "labels": torch.tensor([2]), "masks": mask}
    losses = detector([torch.rand(3, 60, 90), torch.rand(3, 60, 90)], [target, target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [name for name, value in detector.named_parameters() if value.requires_grad and value.grad is None] == []
    with pytest.raises(ValueError, match="sizes are of 2 levels, and the backbone has 4: p2, p3, p4, p5"):
        rcnn_settings(made, sizes=[(8,), (16,)])
