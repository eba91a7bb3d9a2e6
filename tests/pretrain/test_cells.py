"""Every method on every encoder, as a user has it: trained, saved, continued after a kill, exported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_supported import SMALL, small
from tiny import config_data

from pretrain.config.load import parse_config
from pretrain.encoders.registry import FAMILIES
from pretrain.encoders.saved import read_card, timm_recipe
from pretrain.encoders.supported import COLUMNS, EXAMPLES, cell
from pretrain.interop.export import export_encoder
from pretrain.run import pretrain
from pretrain.tokenizers.saved import load_tokenizer

ENCODERS = [row for row in SMALL if not row.startswith("timm:")] + ["timm:convnext_tiny", "timm:hiera_tiny_224"]
#: Every pair, and what else a method can be told to do on a few encoders.
FEWER = ("probe", "lejepa", "ijepa", "distill", "clip")
CELLS = [(method, row) for row in ENCODERS for method in COLUMNS if method not in FEWER]
CELLS += [("lejepa", row) for row in ("vit", "swin")]  # which asks of an encoder what DINO does
CELLS += [("ijepa", row) for row in ("vit", "beit", "deepvit", "dinov3", "t2t", "swin")]  # where MAE drops at random
CELLS += [("distill", row) for row in ("vit", "swin", "pvt_v2", "convnext", "timm:convnext_tiny")]  # whose maps differ
CELLS += [("clip", row) for row in ("vit", "swin", "timm:convnext_tiny")]  # which asks nothing of an encoder
CELLS += [("mae", "timm:cait_xxs24_224"), ("mae", "timm:eva02_tiny_patch14_224")]
CELLS += [("dinov2", "vit"), ("dinov2", "swin"), ("dinov2", "pvt"), ("hog", "swin"), ("normalised_pixels", "pvt_v2")]


def cell_data(method: str, row: str, shards: Path, runs: Path) -> dict[str, Any]:
    """Two steps of four images of 64 px, with a checkpoint after each."""
    kind = {"dinov2": "dino", "hog": "mim", "normalised_pixels": "mim", "codes": "mim"}.get(method, method)
    data = config_data(kind, "vit", shards, runs)
    data["name"] = "cell"
    data["encoder"] = small(row)
    data["train"] = {"steps": 2, "batch_size": 4}
    data["checkpoint"] = {"every_steps": 1}
    for crop in data["views"]["global_crops"]:
        crop["size"] = 64
    pyramid = FAMILIES[data["encoder"]["family"]].drop_layout == "one_in_2x2"
    if kind == "dino":
        one_size = row == "timm:hiera_tiny_224"
        data["views"]["local_crops"] = None if one_size else {**data["views"]["local_crops"], "size": 32}
    elif kind == "mae":
        data["method"]["mask"] = {"kind": "one_in_2x2" if pyramid else "random", "unit": 16}
        data["method"]["mask"] |= {"secondary": 0.25} if pyramid else {}
    elif kind == "mim":
        data["method"]["mask"] = {"kind": "blockwise", "ratio": 0.5, "unit": 32 if pyramid else 16, "min_block": 1}
        if row.startswith("timm:"):
            data["method"]["mask"]["unit"] = 32
    if method == "dinov2":
        data["method"] |= {"ibot": {}, "centering": "sinkhorn", "koleo_weight": 0.1}
        data["optim"] |= {"layer_decay": 0.9, "patch_embed_lr_scale": 0.2, "lr_scaling": "sqrt"}
    elif method in ("hog", "normalised_pixels"):
        data["method"]["target"] = method
    return data


def finish(data: dict[str, Any], tmp_path: Path, folder: str) -> Path:
    """Train; then once more from a copy that was killed after its first step; both must end alike."""
    run = pretrain(parse_config(data))
    other = {**data, "runs": str(tmp_path / "other")}
    copy = tmp_path / "other" / data["name"]
    shutil.copytree(run, copy)
    shutil.rmtree(copy / folder)
    shutil.rmtree(copy / "checkpoints" / "step-00000002")
    stored = (copy / "config.yaml").read_text(encoding="utf-8")
    (copy / "config.yaml").write_text(stored.replace(str(data["runs"]), other["runs"]), encoding="utf-8")
    assert pretrain(parse_config(other)) == copy
    rows = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for place in (run, copy)
    ]
    assert [row["step"] for row in rows[1]] == [1, 2]
    assert [[row["loss"], row["grad_norm"], row["ids_digest"]] for row in rows[0]] == [
        [row["loss"], row["grad_norm"], row["ids_digest"]] for row in rows[1]
    ]
    weights = [(place / folder / "model.safetensors").read_bytes() for place in (run, copy)]
    assert weights[0] == weights[1]
    return run


@pytest.mark.parametrize(("method", "row"), CELLS)
def test_a_cell_trains_continues_and_exports(method: str, row: str, shards: Path, tmp_path: Path) -> None:
    data = cell_data(method, row, shards, tmp_path / "runs")
    says = cell(EXAMPLES[row], method) if method in COLUMNS else "yes"
    if not says.startswith("yes"):
        with pytest.raises(ValueError, match=re.escape(says)):
            pretrain(parse_config(data))
        assert not (tmp_path / "runs").exists()
        return
    encoder = finish(data, tmp_path, "encoder") / "encoder"
    to = "safetensors" if timm_recipe(read_card(encoder)) is None else "timm"
    exported = export_encoder(encoder, tmp_path / "exported.safetensors", to)
    assert exported.difference <= exported.tolerance


@pytest.mark.parametrize(("method", "family"), [("codes", "beit"), ("codes", "pvt"), ("beitv2", "beit")])
def test_codes_of_a_tokenizer(method: str, family: str, shards: Path, tmp_path: Path) -> None:
    data = config_data(method, "vit", shards, tmp_path / "runs", train={"batch_size": 4, "steps": 2})
    if family == "beit":
        data["encoder"] = {"family": "beit", "dim": 32, "depth": 2, "heads": 2, "patch": 4}
    else:
        data["encoder"] = {**small("pvt"), "patch": 4}
    data |= {"name": "cell", "checkpoint": {"every_steps": 1}}
    finish(data, tmp_path, "encoder")


@pytest.mark.parametrize("method", ["dvae", "vqkd"])
def test_a_tokenizer_trains_and_continues(method: str, shards: Path, tmp_path: Path) -> None:
    data = config_data(method, "vit", shards, tmp_path / "runs", train={"batch_size": 4, "steps": 2})
    data |= {"name": "cell", "checkpoint": {"every_steps": 1}}
    run = finish(data, tmp_path, "tokenizer")
    tokenizer, card = load_tokenizer(run / "tokenizer")
    codes = tokenizer(torch.zeros(1, 3, *card.image_size, dtype=torch.uint8))
    assert codes.shape == (1, card.image_size[0] // card.stride, card.image_size[1] // card.stride)
