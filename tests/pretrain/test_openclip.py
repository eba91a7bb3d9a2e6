"""A CLIP run leaves for OpenCLIP: what that makes of it is what ours is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config_data

from pretrain.config.load import parse_config
from pretrain.encoders.saved import load_encoder
from pretrain.interop.openclip import FILES, export_openclip, openclip_config, openclip_weights
from pretrain.run import pretrain
from pretrain.text.saved import load_text
from pretrain.text.vocabulary import clip_vocabulary

TOWER = {"dim": 32, "depth": 1, "heads": 2, "context": 12}


def run_of(shards: Path, runs: Path, encoder: dict[str, Any], **method: Any) -> Path:
    data = config_data("clip", "vit", shards, runs, train={"steps": 1})
    data["encoder"] |= encoder
    data["method"] |= method
    return pretrain(parse_config(data)) / "encoder"


@pytest.mark.parametrize(
    ("encoder", "method"),
    [
        ({"pool": "mean"}, {"loss": "siglip"}),
        ({"pool": "class", "positions": "sincos"}, {}),
        (
            {"pool": "class", "pre_norm": True, "mlp": "quick_gelu", "norm_eps": 1e-5},
            {"tower": TOWER | {"activation": "quick_gelu"}},
        ),
        (
            {"pool": "mean"},
            {"tower": TOWER | {"causal": False, "pool": "first"}},
        ),
    ],
)
def test_openclip_reads_what_is_exported(
    encoder: dict[str, Any], method: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    pytest.importorskip("open_clip")
    source = run_of(shards, tmp_path, encoder, **method)
    made = export_openclip(source, tmp_path / "out")
    assert made.difference < 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES}
    with pytest.raises(FileExistsError, match="choose another place"):
        export_openclip(source, tmp_path / "out")


def test_the_names_are_openclips(shards: Path, tmp_path: Path) -> None:
    """Without its package, too: the recorded names of its ViT and text tower."""
    source = run_of(shards, tmp_path, {"pre_norm": True, "mlp": "quick_gelu", "pool": "class"},
                    tower=TOWER | {"activation": "quick_gelu"})  # fmt: skip
    encoder, card = load_encoder(source)
    side = load_text(source)
    block = [f"{part}.{kind}" for part in ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
             for kind in ("weight", "bias")] + ["attn.in_proj_weight", "attn.in_proj_bias"]  # fmt: skip
    expected = {"visual.class_embedding", "visual.positional_embedding", "visual.proj", "visual.conv1.weight"}
    expected |= {f"visual.{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    expected |= {f"visual.transformer.resblocks.{number}.{name}" for number in range(2) for name in block}
    expected |= {f"transformer.resblocks.0.{name}" for name in block}
    expected |= {"token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias"}
    expected |= {"text_projection", "logit_scale"}
    weights = openclip_weights(encoder.inner().state_dict(), side)
    assert weights.keys() == expected
    assert weights["logit_scale"].shape == torch.Size([])
    assert openclip_config(card, side)["model_cfg"]["text_cfg"]["vocab_size"] == side.vocabulary.size


def test_what_openclip_has_not_is_refused(shards: Path, tmp_path: Path) -> None:
    source = run_of(shards, tmp_path, {"stem": "conv"})
    (_, card), side = load_encoder(source), load_text(source)
    with pytest.raises(ValueError, match="has stem=conv: OpenCLIP has no such image tower"):
        openclip_config(card, side)
    mae = pretrain(parse_config(config_data("mae", "vit", shards, tmp_path, train={"steps": 1}))) / "encoder"
    with pytest.raises(ValueError, match="has no text side"):
        export_openclip(mae, tmp_path / "out")


def test_openais_vocabulary_is_openclips() -> None:
    open_clip = pytest.importorskip("open_clip")
    texts = ["A photo of a cat!", "the  two\n dogs' 3rd bowl, 1999", "Grüße 你好 ½ café", "don't we'll", "", "x" * 300]
    ours = torch.from_numpy(clip_vocabulary().encode(texts, 77))
    assert torch.equal(ours, open_clip.SimpleTokenizer()(texts))
