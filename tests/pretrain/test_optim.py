from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_supported import SMALL, small
from tiny import NORMALISATION, config_data
from torch import nn

from pretrain.config.load import ConfigError, parse_config
from pretrain.engines.engine import deepspeed_config
from pretrain.engines.optim import build_optimizer, parameter_groups
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method
from pretrain.methods.registry import build_method

BEIT_DECAYS = ("mask_token", "relative_position_bias_table")


def tiny_method(family: str, tmp_path: Path) -> Method:
    config = parse_config(config_data("dino", family, tmp_path, tmp_path))
    torch.manual_seed(0)
    return build_method(config, NORMALISATION, Timeline(8, 4.0))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_rates_by_depth_are_a_slow_loop(family: str, tmp_path: Path) -> None:
    """layer_decay ** (layers above), and for the patch embedding (not positions, nor tokens) its own factor besides."""
    method = tiny_method(family, tmp_path)
    scales = {name: group["lr_scale"] for group in parameter_groups(method, 0.5, 0.2) for name in group["names"]}
    assert scales.keys() == {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    num_scaled = 0
    for name, scale in scales.items():
        top = method.encoder.depth + 1
        expected = 0.5 ** (top - method.encoder.layer_of(name)) if name.startswith("encoder.") else 1.0
        if "patch_embed." in name:
            expected *= 0.2
            num_scaled += 1
        assert scale == pytest.approx(expected), name
    assert num_scaled >= 2
    assert not any("patch_embed" in name for name in scales if "pos_embed" in name or "token" in name)


@pytest.mark.parametrize("row", [row for row in SMALL if not row.startswith("timm:")])
def test_only_matrices_decay(row: str, shards: Path, tmp_path: Path) -> None:
    """Not tokens, positions (those of PVT have a number behind their name), norms, biases or layer scales."""
    data = config_data("dino", "vit", shards, tmp_path)
    data["encoder"] = small(row)
    data["method"]["ibot"] = {}
    for crop in (*data["views"]["global_crops"], data["views"]["local_crops"]):
        crop["size"] = 64
    method = build_method(parse_config(data), NORMALISATION, Timeline(8, 4.0))
    decayed = {name for group in parameter_groups(method, 1.0) if group["decay"] for name in group["names"]}
    assert decayed
    odd = [
        name
        for name in decayed
        if any(
            part in name.replace("tokens_to_token", "") for part in ("token", "pos_e", "norm", "bias", "gamma", "scale")
        )
        and not (data["encoder"]["family"] == "beit" and name.endswith(BEIT_DECAYS))
    ]
    assert odd == []


@pytest.mark.parametrize("relative_positions", ["shared", "per_block"])
def test_decay_reaches_beits_mask_token_and_tables(relative_positions: str, tmp_path: Path) -> None:
    """unilm and SimMIM's ViT spare class token, absolute positions, biases and what has one dimension, no more."""
    data = config_data("mim", "vit", tmp_path, tmp_path)
    shape = {"dim": 32, "depth": 2, "heads": 2, "patch": 4}
    data["encoder"] = {"family": "beit", "absolute_positions": True, "relative_positions": relative_positions, **shape}
    method = build_method(parse_config(data), NORMALISATION, Timeline(8, 4.0))
    groups = parameter_groups(method, 1.0)
    decayed = {name.split("encoder.")[-1] for group in groups if group["decay"] for name in group["names"]}
    spared = {name.split("encoder.")[-1] for group in groups if not group["decay"] for name in group["names"]}
    tables = {name for name in decayed | spared if name.endswith("table")}
    assert len(tables) == (1 if relative_positions == "shared" else 2)
    assert tables | {"mask_token"} <= decayed
    assert {"beit.cls_token", "beit.pos_embed", "beit.blocks.0.gamma_1", "beit.blocks.0.attn.q_bias"} <= spared


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_decay_spares_the_mask_token_and_tables_of_others(family: str, tmp_path: Path) -> None:
    """SimMIM's Swin names both among what it spares."""
    method = build_method(parse_config(config_data("mim", family, tmp_path, tmp_path)), NORMALISATION, Timeline(8, 4.0))
    decayed = {name for group in parameter_groups(method, 1.0) if group["decay"] for name in group["names"]}
    assert not [name for name in decayed if name.endswith(BEIT_DECAYS)]


def test_only_the_first_patch_embedding_of_a_pyramid_counts(tmp_path: Path) -> None:
    """PVT and Twins name those between stages alike; they make tokens of tokens."""
    method = tiny_method("swin", tmp_path)
    method.encoder.patch_embed1 = nn.Linear(2, 2)
    method.encoder.patch_embeds = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    depths = {"patch_embed1": 0, "patch_embeds.0": 0, "patch_embeds.1": 2}
    layer_of = method.encoder.layer_of
    method.encoder.layer_of = lambda name: next((depth for key, depth in depths.items() if key in name), layer_of(name))
    scales = {name: group["lr_scale"] for group in parameter_groups(method, 1.0, 0.2) for name in group["names"]}
    assert scales["encoder.patch_embed1.weight"] == scales["encoder.patch_embeds.0.bias"] == 0.2
    assert scales["encoder.patch_embeds.1.weight"] == 1.0


def test_an_encoder_without_patch_embedding_is_refused(tmp_path: Path) -> None:
    method = tiny_method("vit", tmp_path)
    method.encoder.layer_of = lambda name: 1
    assert parameter_groups(method, 1.0)
    with pytest.raises(ValueError, match=r"patch_embed_lr_scale is 0.2, but VitEncoder has no patch_embed"):
        parameter_groups(method, 1.0, 0.2)


def test_the_optimizer_takes_the_factor_from_the_configuration(tmp_path: Path) -> None:
    config = parse_config(config_data("mae", "vit", tmp_path, tmp_path, optim={"patch_embed_lr_scale": 0.2}))
    method = build_method(config, NORMALISATION, Timeline(8, 4.0))
    groups = build_optimizer(method, config.optim).param_groups
    assert {group["lr_scale"] for group in groups} == {0.2, 1.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_bucket_is_larger_than_the_model(stage: int, tmp_path: Path) -> None:
    """DeepSpeed's own take 2 GB each, and are filled where algorithms are to be deterministic."""
    config = parse_config(config_data("mae", "vit", tmp_path, tmp_path, engine={"zero_stage": stage}))
    zero = deepspeed_config(config, 1, 1000)["zero_optimization"]
    buckets = {name: size for name, size in zero.items() if name.endswith("bucket_size")}
    assert set(buckets.values()) == ({1000} if stage else set())
    assert ("reduce_bucket_size" in buckets) == (stage > 0)
    asked = {"zero_optimization": {"reduce_bucket_size": 7}}
    config = parse_config(
        config_data("mae", "vit", tmp_path, tmp_path, engine={"zero_stage": stage, "deepspeed": asked})
    )
    assert deepspeed_config(config, 1, 1000)["zero_optimization"]["reduce_bucket_size"] == 7


@pytest.mark.parametrize(("stage", "key"), [(1, "overlap_comm"), (3, "sub_group_size")])
def test_what_we_decide_of_zero_is_refused_by_name(stage: int, key: str, tmp_path: Path) -> None:
    engine = {"zero_stage": stage, "deepspeed": {"zero_optimization": {key: 1}}}
    with pytest.raises(ConfigError, match=rf"zero_optimization\.{key} is decided under ZeRO {stage}"):
        parse_config(config_data("mae", "vit", tmp_path, tmp_path, engine=engine))
