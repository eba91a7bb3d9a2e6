"""The table of methods and encoders: it is that of pretrain's README, and every yes of it runs forward and backward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_data, random_batch

import pretrain.encoders
from pretrain.config import Config
from pretrain.config.load import ConfigError, parse_config
from pretrain.encoders.registry import FAMILIES
from pretrain.encoders.supported import COLUMNS, EXAMPLES, cell, check_encoder, needs_of, table, why_not
from pretrain.encoders.timm.config import TimmConfig

README = Path(pretrain.encoders.__file__).with_name("README.md")
#: Every row of the table in small, and the side of its images in px.
SMALL = {
    row: ({"family": spec.name, **example.settings, **example.small}, example.side)
    for row, (spec, example) in zip(
        EXAMPLES, [(spec, example) for spec in FAMILIES.values() for example in spec.examples], strict=True
    )
}
#: Px of mask units on images of other sides than 64 px: CrossViT's patches are of 12, LeViT's of 16.
UNITS = {120: 24, 112: 16}


def config_of(
    method: str, encoder: dict[str, Any] | str, local: int | None = 32, unit: int = 32, size: int = 64, **sections: Any
) -> Config:
    data = config_data(method, "vit", Path("nowhere"), Path("nowhere"), **sections)
    data["encoder"] = encoder
    for crop in data["views"]["global_crops"]:
        crop["size"] = size
    if method == "dino":
        data["views"]["local_crops"] = None if local is None else {**data["views"]["local_crops"], "size": local}
    elif method == "mim":
        data["method"]["mask"] = {"kind": "random", "ratio": 0.5, "unit": unit if size == 64 else UNITS[size]}
    elif method == "ijepa":
        timm = isinstance(encoder, str) or encoder["family"] == "timm"
        data["method"] |= {"unit": UNITS.get(size, 16) if timm else None, "targets": 1}
    elif method == "mae":
        pyramid = isinstance(encoder, dict) and FAMILIES[encoder["family"]].drop_layout == "one_in_2x2"
        data["method"]["mask"] = {
            "kind": "one_in_2x2" if pyramid else "random",
            "unit": 16 if size == 64 else UNITS[size],
        }
    return parse_config(data)


def small(row: str) -> dict[str, Any]:
    return SMALL[row][0]


def test_readme_shows_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.split("<!-- selfsight encoders -->")[1].split("<!-- end of the table -->")[0]
    assert shown.strip() == table(), f"`selfsight encoders` prints the table that belongs into {README}"


@pytest.mark.parametrize("row", SMALL)
def test_every_yes_runs_forward_and_backward(row: str) -> None:
    size = SMALL[row][1]
    assert COLUMNS == ("mae", "ijepa", "mim", "dino", "lejepa", "distill", "mp3", "clip", "finetune", "probe")
    for name in COLUMNS[:4]:  # LeJEPA asks what DINO does
        says = cell(EXAMPLES[row], name)
        local = size if says == "yes, crops of one size" else 32
        if not says.startswith("yes"):
            with pytest.raises(ConfigError, match=re.escape(f"does not go with method {name}: {says}")):
                check_encoder(config_of(name, small(row), local, size=size))
            continue
        config = config_of(name, small(row), local, size=size)
        check_encoder(config)
        trained = build(config).train()
        loss = trained(random_batch(config), 0)["loss"]
        loss.backward()
        assert loss.isfinite(), name
        reached = [p for p in trained.encoder.parameters() if p.grad is not None]
        assert sum(p.numel() for p in reached) > 0.5 * sum(p.numel() for p in trained.encoder.parameters()), name
    assert cell(EXAMPLES[row], "probe") == "yes"
    encoder = trained.encoder.eval()  # DINO's, which goes with all
    with torch.no_grad():
        features = encoder(torch.randn(2, 3, size, size))
    assert features.pooled.shape == (2, encoder.dim)
    assert features.pooled.isfinite().all()


def test_crops_of_two_sizes_are_refused_where_a_model_takes_one() -> None:
    config = config_of("dino", small("timm:convit_tiny"), local=32)
    with pytest.raises(ConfigError, match=r"32x32 px is another than 64x64 .*views\.local_crops\.size=\[64, 64\]"):
        check_encoder(config)
    check_encoder(config_of("dino", small("timm:convit_tiny"), local=64))
    check_encoder(config_of("dino", small("timm:convit_tiny"), local=None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: config_of("mae", "timm:resnet18"), "takes whole images only .its convolutions.*selfsight encoders"),
        (lambda: config_of("mim", "timm:resnet18"), "no single patch embedding.*selfsight encoders"),
        (lambda: config_of("mim", "timm:levit_128s"), "its features form no map"),
        (lambda: config_of("mim", "timm:levit_128s", size=112), "are multiples of 64 px"),
        (lambda: config_of("mim", "timm:vit_tiny_patch16_224", unit=8), r"a multiple of the encoder's patch \(16 px\)"),
        (lambda: config_of("dino", "timm:resnet1"), "has no model 'resnet1'; the nearest names: .*resnet18"),
        (lambda: config_of("dino", "timm:vit_small_patch14_dinov2"), "does not run on images of 64x64"),
        (
            lambda: config_of("dino", "timm:resnet18", engine={"activation_checkpointing": True}),
            "engine.activation_checkpointing works on an encoder's equal blocks",
        ),
        (
            lambda: config_of("dino", {"family": "timm", "model": "vit_tiny_patch16_224", "args": {"detph": 3}}),
            "takes no argument 'detph'",
        ),
        (
            lambda: config_of("dino", {"family": "timm", "model": "mixer_s32_224", "args": {"num_blocks": 2}}, 64),
            "sets 'num_blocks' itself",
        ),
        (
            lambda: config_of("dino", {"family": "timm", "model": "vgg11", "drop_path": 0.1}),
            r"takes no drop path; set encoder.drop_path=0",
        ),
        (
            lambda: config_of("dino", {"family": "timm", "model": "mixer_s32_224", "args": {"global_pool": ""}}, 64),
            "its pooled feature is not one vector",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_encoder(config())


def test_arguments_that_others_own_are_refused() -> None:
    for name in ("pretrained", "checkpoint_path", "img_size", "num_classes", "pretrained_cfg"):
        with pytest.raises(ValueError, match=f"args has '{name}'"):
            TimmConfig(model="resnet18", args={name: 1})


def test_a_tokenizer_needs_a_map() -> None:
    needs = needs_of("vqkd")
    assert why_not(TimmConfig(model="mobilenetv3_small_100"), needs)[0] == "its features form no map"
    assert why_not(TimmConfig(model="resnet18"), needs) is None
