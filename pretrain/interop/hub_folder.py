"""A Hugging Face Hub folder in the layout that timm reads as `hf-hub:NAME` or, from the disk, `local-dir:PATH`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm

from data_pipelines.files import parse_json
from pretrain.encoders import Encoder
from pretrain.encoders.saved import EncoderCard, encoder_bytes

HUB_FILES = ("README.md", "config.json", "model.safetensors")
CROP_SHARE = 224 / 256  # the probes' centre crop


def write_hub_folder(folder: Path, encoder: Encoder, card: EncoderCard, recipe: dict[str, Any], readme: str) -> None:
    """Write weights, config.json and README.md into a new `folder`; `recipe` as in `timm_recipe`."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(encoder_bytes(encoder, card))
    (folder / "config.json").write_text(json.dumps(hub_config(card, recipe), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")


def hub_config(card: EncoderCard, recipe: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a Hugging Face Hub folder that `timm.create_model("hf-hub:...")` reads."""
    apart = ("model_name", "num_classes", "in_chans")
    arguments = {key: value for key, value in recipe.items() if key not in apart and value is not None}
    model = timm.create_model(**recipe)
    return {
        "architecture": recipe["model_name"].partition(".")[0],
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": card.method,
            "custom_load": False,
            "num_classes": 0,
            "input_size": [card.channels, *card.image_size],
            "fixed_input_size": "img_size" in arguments,
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(card.mean),
            "std": list(card.std),
            "first_conv": model.pretrained_cfg.get("first_conv"),
            "classifier": model.pretrained_cfg.get("classifier"),
        },
    }


def is_hub_folder(folder: Path) -> bool:
    """Whether `folder` is what `write_hub_folder` writes, and holds no other file."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(HUB_FILES):
        return False
    try:
        return "architecture" in parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
