"""The methods and their variants that name blocks of their own, as tiny configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import config_data

from pretrain.config import Config
from pretrain.config.load import parse_config

#: Every method and its variants that have blocks of their own.
CASES = {
    "mae": {},
    "mim": {},
    "codes": {},
    "beitv2": {},
    "dino": {},
    "dinov2": {"ibot": {"min_block": 1, "separate_head": True}, "koleo_weight": 0.1},
    "gram": {"gram": {}, "koleo_weight": 0.1, "koleo_over": "batch"},
    "distill": {},
    "vqkd": {},
    "dvae": {},
    "clip": {},
    "finetune": {"rand_augment": {"prob": 1.0}, "mix_mode": "row"},
}


def config_of(
    case: str,
    shards: Path,
    tmp_path: Path,
    drop_path: float = 0.3,
    method: dict[str, Any] | None = None,
    **engine: Any,
) -> Config:
    data = config_data("dino" if case in ("dinov2", "gram") else case, "vit", shards, tmp_path, engine=engine)
    data["method"] |= CASES[case] | (method or {})
    if data["encoder"] is not None:
        data["encoder"]["drop_path"] = drop_path
    if case in ("codes", "beitv2"):
        data["encoder"] = {"family": "beit", "dim": 32, "depth": 2, "heads": 2, "patch": 4, "drop_path": drop_path}
    return parse_config(data)
