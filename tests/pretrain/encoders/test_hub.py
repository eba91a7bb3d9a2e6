"""Models of the Hub (transformers), tiny and with random weights: imported, and compared with transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import SHAPE, SIZES, everything, images, random_model
from safetensors.torch import load_file, save_file
from tiny import build, config_data
from torch import nn

from pretrain.config.load import parse_config
from pretrain.encoders.base import Mask
from pretrain.encoders.layouts import CheckpointState
from pretrain.encoders.patches import sincos_positions
from pretrain.encoders.read_layout import read_layout
from pretrain.encoders.saved import load_encoder
from pretrain.interop.export import export_encoder
from pretrain.interop.initialise import start_from
from pretrain.interop.official import describe, import_checkpoint

transformers = pytest.importorskip("transformers")


def dinov2(**settings: Any) -> Any:
    return transformers.Dinov2Model, transformers.Dinov2Config(**SIZES, **settings)


def with_registers(**settings: Any) -> Any:
    return transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig(**SIZES, **settings)


def dinov3(**settings: Any) -> Any:
    own = {"num_register_tokens": 2, "rope_theta": 50.0, **settings}
    return transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig(**SHAPE, **own)


def convnext(name: str) -> Any:
    shape = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "image_size": 32}
    return getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")(**shape)


CASES = {
    "dinov3": ("dinov3", dinov3),
    "dinov3_gated": ("dinov3", lambda: dinov3(use_gated_mlp=True, hidden_act="silu", layer_norm_eps=1e-4)),
    "dinov3_no_bias": ("dinov3", lambda: dinov3(query_bias=False, value_bias=False)),
    "dinov2": ("dinov2", lambda: dinov2(layerscale_value=0.5)),
    "dinov2_swiglu": ("dinov2", lambda: dinov2(use_swiglu_ffn=True, layer_norm_eps=1e-4)),
    "dinov2_registers": ("dinov2", lambda: with_registers(num_register_tokens=2)),
    "dinov2_registers_swiglu": ("dinov2", lambda: with_registers(use_swiglu_ffn=True)),
    "vit": ("transformers", lambda: (transformers.ViTModel, transformers.ViTConfig(**SHAPE))),
    "dino": ("dino", lambda: (transformers.ViTModel, transformers.ViTConfig(**SHAPE, layer_norm_eps=1e-4))),
    "ijepa": ("ijepa", lambda: (transformers.IJepaModel, transformers.IJepaConfig(**SHAPE))),
}


@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_model_of_the_hub_gives_what_transformers_gives(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    layout, make = CASES[name]
    model = random_model(*make())
    model.save_pretrained(tmp_path / "hub")
    if name == "dino":  # its configuration says `vit`, as that of a classifier does
        (tmp_path / "hub/config.json").write_text(json.dumps({"layer_norm_eps": 1e-4, "num_attention_heads": 4}))
        import_checkpoint(tmp_path / "hub", layout, tmp_path / "out", overrides=("heads=4", "norm_eps=1e-4"))
    else:
        import_checkpoint(tmp_path / "hub", layout, tmp_path / "out")
    pixels = images(*size)
    arguments = {} if name.startswith("dinov") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        theirs = model(pixels, **arguments).last_hidden_state
    torch.testing.assert_close(everything(tmp_path / "out", pixels), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2_swiglu", "dinov2_registers", "dinov3_gated", "vit", "ijepa"])
def test_names_of_modules_are_read_as_those_of_files(name: str, tmp_path: Path) -> None:
    layout, make = CASES[name]
    model = random_model(*make())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) != set(model.state_dict())
    first, second = (
        read_layout(layout, CheckpointState(state, "teacher", ("heads=4",))) for state in (saved, model.state_dict())
    )
    assert first.encoder == second.encoder
    assert set(first.weights) == set(second.weights)
    for key, value in first.weights.items():
        assert torch.equal(value, second.weights[key]), key


@pytest.mark.parametrize("size", [(64, 64), (32, 96)], ids=str)
@pytest.mark.parametrize(("name", "layout"), [("DINOv3ConvNext", "dinov3"), ("ConvNext", "convnext")])
def test_convnext(name: str, layout: str, size: tuple[int, int], tmp_path: Path) -> None:
    model = random_model(*convnext(name))
    model.save_pretrained(tmp_path / "hub")
    import_checkpoint(tmp_path / "hub", layout, tmp_path / "out")
    pixels = images(*size)
    with torch.no_grad():
        theirs = model(pixels)
        ours = load_encoder(tmp_path / "out")[0](pixels)
    torch.testing.assert_close(ours.pooled, theirs.pooler_output, rtol=0, atol=1e-5)
    if name == "DINOv3ConvNext":
        torch.testing.assert_close(ours.tokens, theirs.last_hidden_state[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"key_bias": True}, "a bias of the keys that is not zero"), ({"use_gated_mlp": True}, "hidden_act 'gelu'")],
)
def test_what_dinov3s_released_models_have_not_is_refused(settings: Any, message: str, tmp_path: Path) -> None:
    random_model(*dinov3(**settings)).save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "hub", "dinov3", tmp_path / "out")


def mae(**settings: Any) -> nn.Module:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**SHAPE, **decoder, decoder_intermediate_size=64, **settings)
    return random_model(transformers.ViTMAEForPreTraining, config)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=str)
def test_mae(size: tuple[int, int], tmp_path: Path) -> None:
    model = mae(mask_ratio=0.0)
    model.save_pretrained(tmp_path / "hub")
    found = import_checkpoint(tmp_path / "hub", "mae", tmp_path / "out")
    pixels = images(*size)
    noise = torch.arange(size[0] * size[1] // 64).expand(2, -1) / 100  # keeps the order of the patches
    with torch.no_grad():
        theirs = model.vit(pixels, noise=noise, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(everything(tmp_path / "out", pixels), theirs, rtol=0, atol=1e-5)
    wanted = {"mask_token", *(f"decoder_{part}.{kind}" for part in ("embed", "norm", "pred") for kind in KINDS)}
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    wanted |= {f"decoder_blocks.{at}.{part}.{kind}" for at in range(2) for part in block for kind in KINDS}
    assert set(found.method) == wanted
    assert set(found.left) == {"decoder_pos_embed"}


KINDS = ("weight", "bias")


def test_its_decoder_goes_on_predicting_what_it_did(shards: Path, tmp_path: Path) -> None:
    model = mae(mask_ratio=0.5)
    with torch.no_grad():
        model.decoder.decoder_pos_embed[0, 1:] = sincos_positions(16, (4, 4))
        model.decoder.decoder_pos_embed[0, 0] = 0
    model.save_pretrained(tmp_path / "hub")
    import_checkpoint(tmp_path / "hub", "mae", tmp_path / "out")
    data = config_data("mae", "vit", shards, tmp_path / "runs")
    shape = {"dim": 32, "depth": 2, "heads": 4, "patch": 8, "hidden": 64, "norm_eps": 1e-12, "pool": "mean"}
    data["encoder"] = {"family": "vit", **shape}
    data["method"] |= {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    data["method"]["mask"]["unit"] = 8
    method = build(parse_config(data)).eval()
    assert "31 tensors of the method around it" in "\n".join(start_from(method, str(tmp_path / "out"), "mae"))
    pixels = images(32, 32)
    order = torch.randn(2, 16, generator=torch.Generator().manual_seed(4)).argsort(dim=1)
    drop = (order >= 8).view(2, 4, 4)  # half of the patches, of which the noise is the largest
    with torch.no_grad():
        theirs = model(pixels, noise=order / 16).logits  # (b, n, (h w c))
        ours = method.decode(method.encoder(pixels, Mask(drop=drop)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_weights_that_are_not_finite_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    model = random_model(*CASES["vit"][1]())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    key = "encoder.layer.1.attention.attention.key.weight"
    saved[key][0, :3] = float("nan")
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"too large for float32: {key} \(3 of 1024\)\."):
        import_checkpoint(tmp_path, "transformers", tmp_path / "out")


def numbers(state: dict[str, Any]) -> int:
    return sum(value.numel() for value in state.values())


@pytest.mark.parametrize("name", ["dinov2_swiglu", "dinov3_gated", "vit", "ijepa", "mae", "beit"])
def test_no_number_of_a_file_is_lost(name: str, tmp_path: Path) -> None:
    if name == "mae":
        layout, model = "mae", mae()
    elif name == "beit":
        config = transformers.BeitConfig(**SHAPE, use_relative_position_bias=True)
        layout, model = "beit", random_model(transformers.BeitModel, config)
    else:
        layout, make = CASES[name]
        model = random_model(*make())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = read_layout(layout, CheckpointState(saved, "teacher", ("heads=4",)))
    taken = numbers(found.weights) + numbers(found.method)
    taken += 0 if found.mask_token is None else found.mask_token.numel()
    left = {"decoder_pos_embed": "decoder.decoder_pos_embed"}
    assert taken + sum(saved[left.get(key, key)].numel() for key in found.left) == numbers(saved)


def test_fixed_positions_of_the_hub_are_known(tmp_path: Path) -> None:
    model = mae()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = sincos_positions(32, (4, 4))
    model.save_pretrained(tmp_path / "hub")
    assert import_checkpoint(tmp_path / "hub", "mae", tmp_path / "out").encoder.positions == "sincos"


BEITS = {
    "per_block": {"use_relative_position_bias": True},
    "shared": {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.2},
    "final_norm": {"use_relative_position_bias": True, "use_mean_pooling": False},
    "absolute": {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
}


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in BEITS for size in ((32, 32), (24, 48)) if name != "absolute" or size == (32, 32)],
)
def test_beit(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    config = transformers.BeitConfig(**{**SHAPE, "intermediate_size": 128, **BEITS[name]})
    model = random_model(transformers.BeitModel, config)
    if size != (32, 32):  # transformers brings tables to other sizes linearly, BEiT's code and ours bicubically
        for key, table in model.state_dict().items():
            if key.endswith("relative_position_bias_table"):
                table[:-3] = table[:1]
    model.save_pretrained(tmp_path / "hub")
    found = import_checkpoint(tmp_path / "hub", "beit", tmp_path / "out")
    assert found.encoder.relative_positions == ("shared" if name == "shared" else "per_block")
    pixels = images(*size)
    with torch.no_grad():
        theirs = model(pixels)
        ours = load_encoder(tmp_path / "out")[0](pixels)
    if name == "final_norm":
        torch.testing.assert_close(everything(tmp_path / "out", pixels), theirs.last_hidden_state, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(ours.pooled, theirs.pooler_output, rtol=0, atol=1e-5)


def test_a_map_that_is_no_square_is_told_by_the_configuration(tmp_path: Path) -> None:
    config = transformers.BeitConfig(
        **{**SHAPE, "image_size": [24, 48], "intermediate_size": 128}, use_relative_position_bias=True
    )
    model = random_model(transformers.BeitModel, config)  # whose own reading of such a table swaps rows and columns
    model.save_pretrained(tmp_path / "hub")
    assert import_checkpoint(tmp_path / "hub", "beit", tmp_path / "out").image_size == (24, 48)
    saved, _ = load_encoder(tmp_path / "out")
    assert saved.grid == (3, 6)
    table = model.state_dict()["layers.0.relative_position_bias.relative_position_bias_table"]
    assert torch.equal(saved.state_dict()["beit.blocks.0.attn.relative_position_bias_table"], table)


def test_beit_that_predicts_codes_brings_its_head_and_mask_token(tmp_path: Path) -> None:
    config = transformers.BeitConfig(
        **{**SHAPE, "intermediate_size": 128},
        vocab_size=10,
        use_shared_relative_position_bias=True,
        use_mask_token=True,
    )
    model = random_model(transformers.BeitForMaskedImageModeling, config)
    model.save_pretrained(tmp_path / "hub")
    found = import_checkpoint(tmp_path / "hub", "beit", tmp_path / "out")
    assert set(found.method) == {"head.weight", "head.bias", "encoder.mask_token"}
    pixels = images(32, 32)
    with torch.no_grad():
        theirs = model(pixels).logits
    ours = nn.functional.linear(
        everything(tmp_path / "out", pixels)[:, 1:], found.method["head.weight"], found.method["head.bias"]
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_the_configuration_beside_it_tells_is_taken_and_said(tmp_path: Path) -> None:
    model = random_model(*dinov2(layer_norm_eps=1e-4))
    model.save_pretrained(tmp_path / "hub")
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    (tmp_path / "hub/preprocessor_config.json").write_text(json.dumps(processor))
    found = import_checkpoint(tmp_path / "hub", None, tmp_path / "out")
    assert (found.encoder.heads, found.encoder.norm_eps) == (4, 1e-4)
    assert found.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    text = describe(found, tmp_path)
    assert "read as dinov2, whose names its keys have" in text
    assert "heads=4, as the config.json beside it tells" in text
    assert "guessed" not in text
    other = import_checkpoint(tmp_path / "hub", None, tmp_path / "other", overrides=("heads=2",))
    assert other.encoder.heads == 2
    save_file(load_file(tmp_path / "hub/model.safetensors"), tmp_path / "hub/renamed.safetensors")
    alone = import_checkpoint(tmp_path / "hub/renamed.safetensors", None, tmp_path / "alone")
    assert "heads=1 is guessed" in describe(alone, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": "four"}, "tells num_attention_heads 'four', which can't be"),
        ({"layer_norm_eps": -1.0}, "tells layer_norm_eps -1.0, which can't be"),
        ({"hidden_act": ["gelu"]}, r"tells hidden_act \['gelu'\], which can't be"),
        ({"num_attention_heads": 5}, "dim 32 does not divide into 5 heads"),
    ],
)
def test_a_configuration_that_can_not_be_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_model(*dinov2()).save_pretrained(tmp_path / "hub")
    config = tmp_path / "hub/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "hub", "dinov2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_in_several_files_is_read_whole(tmp_path: Path) -> None:
    model = random_model(*dinov2())
    model.save_pretrained(tmp_path / "hub", max_shard_size="20KB")
    assert (tmp_path / "hub/model.safetensors.index.json").is_file()
    import_checkpoint(tmp_path / "hub", "dinov2", tmp_path / "out")
    pixels = images(32, 32)
    with torch.no_grad():
        theirs = model(pixels).last_hidden_state
    torch.testing.assert_close(everything(tmp_path / "out", pixels), theirs, rtol=0, atol=1e-5)
    index = tmp_path / "hub/model.safetensors.index.json"
    described = json.loads(index.read_text())
    described["weight_map"]["layernorm.bias"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="no file of weights beside it"):
        import_checkpoint(tmp_path / "hub", "dinov2", tmp_path / "again")
    with pytest.raises(ValueError, match="is an encoder folder already"):
        import_checkpoint(tmp_path / "out", "dinov2", tmp_path / "again")
    with pytest.raises(FileNotFoundError, match=r"or a folder with one of model\.safetensors"):
        import_checkpoint(tmp_path, "dinov2", tmp_path / "again")


def test_an_activation_that_ours_has_not_is_refused(tmp_path: Path) -> None:
    random_model(*dinov2(hidden_act="relu")).save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match="hidden_act 'relu'; our ViT's MLPs have gelu or quick_gelu"):
        import_checkpoint(tmp_path / "hub", "dinov2", tmp_path / "out")


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_an_imported_giant_goes_to_timm(to: str, tmp_path: Path) -> None:
    random_model(*with_registers(use_swiglu_ffn=True)).save_pretrained(tmp_path / "hub")
    import_checkpoint(tmp_path / "hub", "dinov2", tmp_path / "out")
    out = tmp_path / ("there" if to == "hf" else "there.safetensors")
    assert export_encoder(tmp_path / "out", out, to).difference <= 1e-5
