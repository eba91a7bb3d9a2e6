"""The smallest runs that have every part of a real one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from data_pipelines.loader import Batch
from pretrain.config import Config, VitConfig
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dvae.config import DvaeConfig
from pretrain.methods.dvae.network import DvaeEncoder, DvaeTokenizer
from pretrain.methods.registry import build_method
from pretrain.tokenizers.card import TokenizerCard
from pretrain.tokenizers.saved import save_tokenizer

COLOURS = {"jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8, "grayscale": 0.2}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"family": "vit", "dim": 32, "depth": 2, "heads": 2, "patch": 4},
    "swin": {"family": "swin", "dim": 16, "depths": [2, 2], "heads": [1, 2], "patch": 2, "window": 4},
}
NORMALISATION = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def write_shards(folder: Path, num_images: int = 120, shards: int = 2) -> None:
    """Smooth random 32x32 JPEGs of ten classes, as WebDataset itself writes them."""
    per_shard = num_images // shards
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                writer.write({"__key__": f"{number:06d}", "jpg": file.getvalue(), "cls": str(number % 10)})


def write_sources(folder: Path) -> None:
    """What the methods that learn from other runs need: a `tokenizer` of 16 codes of 4 px, a `teacher`, untrained."""
    dvae = DvaeConfig(vocab_size=16, hidden=8, blocks_per_group=1, groups=3)
    torch.manual_seed(1)
    tokenizer = DvaeTokenizer(DvaeEncoder(dvae, 3))
    card = TokenizerCard("dvae", 16, 4, 3, (32, 32), None, None, dvae, None, step=1, epoch=1.0, run="tokenizer")
    save_tokenizer(folder / "tokenizer", tokenizer.state_dict(), card)
    vit = VitConfig(dim=24, depth=1, heads=2, patch=8, pool="mean")
    about = EncoderCard(vit, (32, 32), 3, (0.4,) * 3, (0.3,) * 3, "dino", "mean", step=1, epoch=1.0, run="teacher")
    save_encoder(folder / "teacher", build_encoder(vit, (32, 32)).state_dict(), about)


def config_data(method: str, family: str, shards: Path, runs: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionary of a run of 8 steps with 8 images; `sections` are merged in.

    `method` may also be a target of masked image modelling: `hog`, `normalised_pixels`, `codes` (BEiT), and `beitv2`
    for codes with aggregation. Those of codes, and `vqkd`, need `write_sources(shards)`.
    """
    pyramid = family == "swin"
    whole = {"size": 32, "scale": [0.5, 1.0]}
    methods: dict[str, dict[str, Any]] = {
        "mae": {
            "mask": {"kind": "one_in_2x2" if pyramid else "random", "unit": 4},
            "decoder_dim": 32,
            "decoder_depth": 1,
            "decoder_heads": 2,
        },
        "mim": {"mask": {"kind": "blockwise", "ratio": 0.5, "unit": 4, "min_block": 4}},
        "dino": {
            "prototypes": 64,
            "head_hidden_dim": 32,
            "head_bottleneck_dim": 16,
            "teacher_momentum": 0.9,
            "freeze_last_layer_epochs": 0.1,
        },
        "dvae": {
            "vocab_size": 32,
            "hidden": 8,
            "blocks_per_group": 1,
            "groups": 3,
            "average_momentum": 0.5,
            "kl_weight": 0.05,
            "start": "spread",
        },
        "vqkd": {
            "teacher": str(shards / "teacher"),
            "vocab_size": 16,
            "code_dim": 8,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "momentum": 0.8,
            "restart_below": 0.2,
        },
    }
    blocks = {"kind": "blockwise", "ratio": 0.5, "min_block": 4}
    mim: dict[str, dict[str, Any]] = {
        "hog": {"target": "hog", "mask": {**blocks, "min_block": 2, "unit": 8}},
        "normalised_pixels": {"target": "normalised_pixels", "mask": {**blocks, "unit": 4}},
        "codes": {"target": "codes", "tokenizer": str(shards / "tokenizer"), "mask": {**blocks, "unit": 4}},
    }
    mim["beitv2"] = {**mim["codes"], "aggregation": {"layer": 1, "depth": 1}}
    name = "mim" if method in mim else method
    methods |= mim
    views: dict[str, Any] = {"global_crops": [whole]}
    if method == "dino":
        views = {
            "global_crops": [{**whole, **COLOURS, "blur": 1.0}, {**whole, **COLOURS, "solarise": 0.2}],
            "local_crops": {"count": 2, "size": 16, "scale": [0.2, 0.5], **COLOURS},
        }
    if "tokenizer" in methods[method]:
        views["target_crop"] = {"size": 32}
    encoder = dict(ENCODERS[family]) | ({"pool": "mean"} if family == "vit" and method != "dino" else {})
    data: dict[str, Any] = {
        "name": f"{method}-{family}",
        "runs": str(runs),
        "data": {"train": str(shards), "threads": 1, "shuffle_window": 16},
        "views": views,
        "encoder": None if method == "dvae" else encoder,
        "method": {"name": name, **methods[method]},
        "optim": {"lr": 1e-3, "lr_reference_batch": 8, "clip_grad": 1.0},
        "train": {"steps": 8, "batch_size": 8},
        "engine": {"device": "cpu", "threads": 1},
        "checkpoint": {"every_steps": 4},
        "tracking": {"log_every_steps": 1, "pictures_every_steps": 0, "wandb": "disabled"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return data


def build(config: Config, seed: int = 0) -> Method:
    """The configuration's method with seeded weights."""
    torch.manual_seed(seed)
    return build_method(config, NORMALISATION, Timeline(100, 10.0))


def random_batch(config: Config, size: int = 4, seed: int = 0) -> Batch:
    """A micro-batch of noise with the masks that the configuration draws."""
    generator = torch.Generator().manual_seed(seed)
    views, channels = config.views, config.data.channels

    def crops(count: int, side: tuple[int, int]) -> torch.Tensor:
        shape = (size, count, channels, *side)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    draw = draw_mask_for(config.method, views.global_size, getattr(config.encoder, "stride", None), size)
    masks = [draw(np.random.default_rng((seed, row)), 0, row) for row in range(size)] if draw else [(None, None)] * size
    dropped, replaced = (
        None if maps[0] is None else torch.from_numpy(np.stack(maps)) for maps in zip(*masks, strict=True)
    )
    local = views.local_crops
    return {
        "global_crops": crops(len(views.global_crops), views.global_size),
        "local_crops": None if local is None else crops(local.count, local.size),
        "target_crops": None if views.target_crop is None else crops(1, views.target_crop.size)[:, 0],
        "drop_mask": dropped,
        "token_mask": replaced,
        "labels": None,
        "ids": torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)], dim=1),
        "rows": torch.arange(size),
    }
