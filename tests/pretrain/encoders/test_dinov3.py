"""DINOv3's ViT: a slow form of it, timm's, official layouts, and norms of class tokens alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pretrain.encoders import build_encoder
from pretrain.encoders.base import Mask, several_passes
from pretrain.encoders.dinov3.config import Dinov3Config
from pretrain.encoders.dinov3.encoder import Dinov3Encoder
from pretrain.encoders.layouts import CheckpointState
from pretrain.encoders.read_layout import read_layout
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
from pretrain.interop.export import export_encoder
from pretrain.interop.official import import_checkpoint

SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "patch": 8, "registers": 2, "hidden": 24}
KINDS: dict[str, dict[str, Any]] = {
    "gelu": {"mlp": "gelu"},
    "swiglu": {"mlp": "swiglu", "norm": "rms", "qkv_bias": False, "layer_scale": None},
}


def make(size: tuple[int, int] = (32, 32), **settings: Any) -> Dinov3Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(Dinov3Config(**{**SMALL, **settings}), size, mask_token=True).eval()
    assert isinstance(encoder, Dinov3Encoder)
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder


def images(size: tuple[int, int] = (32, 32), count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def slowly(encoder: Dinov3Encoder, pixels: Tensor, hidden: Tensor) -> Tensor:
    """The states before the final norm, an image, a head, a query and a key at a time."""
    model, config, width = encoder.vit, encoder.config, encoder.width
    rows, columns = pixels.shape[2] // 8, pixels.shape[3] // 8
    prefix = torch.cat([model.cls_token[0], model.reg_token[0]])
    out = []
    for image, unseen in zip(pixels, hidden, strict=True):
        tokens = list(prefix)
        for row in range(rows):
            for column in range(columns):
                patch = image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                token = (model.patch_embed.proj.weight * patch).sum(dim=(1, 2, 3)) + model.patch_embed.proj.bias
                tokens.append(encoder.mask_token[0, 0] if unseen[row, column] else token)
        states = torch.stack(tokens)
        for block in model.blocks:
            normed = block.norm1(states)
            weight, bias = block.attn.qkv.weight, torch.zeros(3 * encoder.dim)
            if config.qkv_bias:
                bias = torch.cat([block.attn.q_bias, torch.zeros(encoder.dim), block.attn.v_bias])
            query, key, value = (normed @ weight.T + bias).split(encoder.dim, dim=1)
            mixed = []
            for head in range(2):
                part = slice(head * width, (head + 1) * width)
                q, k = (turned(x[:, part], (rows, columns), len(prefix)) for x in (query, key))
                mixed.append((q @ k.T / math.sqrt(width)).softmax(dim=-1) @ value[:, part])
            attended = block.attn.proj(torch.cat(mixed, dim=1))
            states = states + (attended if block.gamma_1 is None else attended * block.gamma_1)
            normed = block.norm2(states)
            if config.mlp == "gelu":
                inside = nn.functional.gelu(block.mlp.fc1(normed))
            else:
                inside = nn.functional.silu(block.mlp.fc1_g(normed)) * block.mlp.fc1_x(normed)
            mixed_in = block.mlp.fc2(inside)
            states = states + (mixed_in if block.gamma_2 is None else mixed_in * block.gamma_2)
        out.append(states)
    return torch.stack(out)


def turned(heads: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """(n, e), of which the patches are turned one after the other."""
    out, quarter = list(heads[:num_prefix]), heads.shape[1] // 4
    for number, head in enumerate(heads[num_prefix:]):
        places = (2 * (number // grid[1] + 0.5) / grid[0] - 1, 2 * (number % grid[1] + 0.5) / grid[1] - 1)
        angles = torch.tensor(
            [2 * math.pi * place / 10.0 ** (2 * i / quarter / 2) for place in places for i in range(quarter)]
        )
        swapped = torch.cat([-head[2 * quarter :], head[: 2 * quarter]])
        out.append(head * angles.cos().repeat(2) + swapped * angles.sin().repeat(2))
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_slow_form(kind: str) -> None:
    encoder = make(**KINDS[kind], rope={"base": 10.0})
    hidden = torch.arange(12).view(2, 2, 3) % 5 == 0
    weights = images((16, 24), seed=2).flatten()[: 2 * 9 * 16].view(2, 9, 16)
    outcomes = []
    for states in (encoder(images((16, 24)), Mask(token=hidden)).states, slowly(encoder, images((16, 24)), hidden)):
        encoder.zero_grad()
        (states * weights).sum().backward()
        outcomes.append((states.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}))
    (ours, gradients), (theirs, expected) = outcomes
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max()))


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_timm_computes_the_same_of_the_exported_file(pool: str, tmp_path: Path) -> None:
    encoder = make((32, 48), mlp="swiglu", pool=pool)
    card = EncoderCard(encoder.config, (32, 48), 3, (0.5,) * 3, (0.2,) * 3, "dino", None, 1, 1.0, "photos")
    save_encoder(tmp_path / "encoder", encoder.state_dict(), card)
    export_encoder(tmp_path / "encoder", tmp_path / "out.safetensors", "timm")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["timm"])
    model = timm.create_model(**recipe, checkpoint_path=str(tmp_path / "out.safetensors")).eval()
    for size in ((32, 48), (16, 32)):
        torch.testing.assert_close(model(images(size)), encoder(images(size)).pooled, rtol=0, atol=1e-5)


def official(encoder: Dinov3Encoder) -> dict[str, Tensor]:
    """The weights under the names of the authors' code."""
    state = {"mask_token": encoder.mask_token[0].detach(), "rope_embed.periods": 100.0 ** (torch.arange(2) / 2)}
    ones, zeros = torch.ones(encoder.dim), torch.zeros(encoder.dim)
    for key, value in encoder.inner().state_dict().items():
        key = re.sub(r"gamma_(\d)", r"ls\1.gamma", key).replace("reg_token", "storage_tokens")
        for ours, theirs in (("fc1_g", "w1"), ("fc1_x", "w2")):
            key = key.replace(ours, theirs)
        if encoder.config.mlp == "swiglu":
            key = key.replace("fc2", "w3")
        if key.endswith("q_bias"):
            other = encoder.inner().state_dict()[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([value, 7 * ones, other])
            state[key.replace("q_bias", "qkv.bias_mask")] = torch.cat([ones, zeros, ones])
        elif not key.endswith("v_bias"):
            state[key] = value
    return state


def hub(encoder: Dinov3Encoder) -> dict[str, Tensor]:
    """The weights under the names of transformers."""
    state = {"embeddings.mask_token": encoder.mask_token.detach()}
    for key, value in encoder.inner().state_dict().items():
        key = key.replace("cls_token", "embeddings.cls_token").replace("reg_token", "embeddings.register_tokens")
        key = key.replace("patch_embed.proj", "embeddings.patch_embeddings").replace("blocks.", "model.layer.")
        key = re.sub(r"gamma_(\d)", r"layer_scale\1.lambda1", key).replace("attn.", "attention.")
        key = (
            key.replace("attention.proj", "attention.o_proj").replace("fc1_g", "gate_proj").replace("fc1_x", "up_proj")
        )
        key = key.replace("fc1", "up_proj").replace("fc2", "down_proj")
        if "qkv" in key:
            for which, part in zip("qkv", value.chunk(3), strict=True):
                state[key.replace("qkv", f"{which}_proj")] = part
        else:
            state[re.sub(r"\.([qv])_bias", r".\1_proj.bias", key)] = value
    return state


@pytest.mark.parametrize("names", [official, hub])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_official_layouts_are_read_with_every_key_accounted_for(mlp: str, names: Any, tmp_path: Path) -> None:
    encoder = make(mlp=mlp)
    state = names(encoder)
    torch.save(state, tmp_path / "file.pth")
    found = import_checkpoint(tmp_path / "file.pth", "dinov3", tmp_path / "out", overrides=("heads=2",), image_size=32)
    assert found.encoder.shape == encoder.config.shape
    opened, card = load_encoder(tmp_path / "out")
    assert card.image_size == (32, 32)
    torch.testing.assert_close(opened(images()).tokens, encoder(images()).tokens)
    assert found.mask_token is not None
    assert torch.equal(found.mask_token, encoder.mask_token)
    assert {key.rpartition(".")[2] for key in found.left} == ({"periods", "bias_mask"} if names is official else set())
    assert found.weights.keys() == encoder.inner().state_dict().keys()
    assert all(torch.equal(value, found.weights[key]) for key, value in encoder.inner().state_dict().items())


def test_a_whole_checkpoint_brings_its_heads_along() -> None:
    encoder = make()
    state = {f"teacher.backbone.{key}": value for key, value in official(encoder).items()}
    heads = {"mlp.0.weight": torch.randn(8, 16), "last_layer.weight": torch.randn(5, 8)}  # its last layer is plain
    state |= {f"teacher.{name}_head.{key}": value for name in ("dino", "ibot") for key, value in heads.items()}
    state |= {"student.backbone.cls_token": torch.zeros(1), "dino_loss.center": torch.zeros(1, 5)}
    found = read_layout("dinov3", CheckpointState(state, "teacher", ("heads=2",)))
    wanted = {f"{name}.{key}": value for name in ("head", "patch_head") for key, value in heads.items()}
    assert found.method.keys() == wanted.keys()
    assert all(torch.equal(value, found.method[key]) for key, value in wanted.items())
    assert {"student.backbone.cls_token", "dino_loss.center"} <= found.left.keys()
    assert found.weights.keys() == encoder.inner().state_dict().keys()


def test_a_timm_model_is_read() -> None:
    model = timm.create_model(
        "vit_small_plus_patch16_dinov3", depth=1, embed_dim=16, num_heads=2, img_size=32, num_classes=0
    )
    found = read_layout("timm", CheckpointState(model.state_dict(), "teacher", ("heads=2",), 32))
    encoder = build_encoder(found.encoder, found.image_size).eval()
    encoder.inner().load_state_dict(found.weights)
    expected = model.eval().forward_features(images())
    torch.testing.assert_close(encoder(images()).tokens, expected[:, 5:], rtol=0, atol=1e-5)
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=16, num_heads=2, num_classes=0)
    assert read_layout("timm", CheckpointState(beit.state_dict(), "teacher")).encoder.family == "beit"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.attn.qkv.bias_mask": None}, "bias of the keys that is not zero"),
        ({"blocks.0.attn.qkv.bias_mask": torch.ones(48)}, "zeros for the keys"),
        ({"rope_embed.periods": torch.tensor([1.0, -3.0])}, "no geometric progression"),
    ],
)
def test_what_is_not_dinov3s_is_refused(changes: dict[str, Tensor | None], message: str) -> None:
    state = {key: value for key, value in {**official(make()), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        read_layout("dinov3", CheckpointState(state, "teacher"))


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ((2 * torch.arange(4) / 8).bfloat16(), {"dtype": "bf16"}),
        (2 * torch.arange(4) / 8 * 0.5, {"base": 10.0}),
        (torch.linspace(-0.5, 0.4, 4), {"periods": pytest.approx((0.1, 6.31), rel=1e-3)}),
    ],
)
def test_periods_tell_the_settings_of_rotary_positions(lengths: Tensor, settings: dict[str, Any]) -> None:
    state = official(make(dim=32)) | {"rope_embed.periods": (100.0**lengths)}
    rope = read_layout("dinov3", CheckpointState(state, "teacher")).encoder.rope
    for name, value in settings.items():
        assert getattr(rope, name) == value


def test_local_crops_have_a_norm_of_their_own_in_training_alone() -> None:
    encoder = make(class_norm=True, local_class_norm=True)
    crops = ((images(), None), (images((16, 16), 4), None))
    for training in (False, True):
        whole, local = several_passes(encoder.train(training), crops)
        assert whole.states is not None
        assert local.states is not None
        torch.testing.assert_close(whole.pooled, encoder.vit.cls_norm(whole.states[:, 0]))
        own = encoder.vit.local_cls_norm if training else encoder.vit.cls_norm
        torch.testing.assert_close(local.pooled, own(local.states[:, 0]))
        torch.testing.assert_close(local.tokens, encoder.vit.norm(local.states[:, 3:]))
    encoder(images()).pooled.sum().backward()  # no local crops, as on no rank: a gradient all the same
    assert not encoder.vit.local_cls_norm.weight.grad.any()


def test_further_blocks_go_on_from_the_states() -> None:
    encoder = make((16, 24))
    further = encoder.further_blocks(1, after=1).eval()
    further.blocks.load_state_dict({"0." + k: v for k, v in encoder.vit.blocks[1].state_dict().items()})
    found = encoder(images((16, 24)), layers=(0,))
    torch.testing.assert_close(further(found.layers[0].states, (2, 3)), found.states)
