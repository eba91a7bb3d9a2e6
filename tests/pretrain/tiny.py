"""The smallest runs that have every part of a real one."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.vit.config import VitConfig
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.dvae.config import DvaeConfig
from pretrain.methods.dvae.network import DvaeEncoder, DvaeTokenizer
from pretrain.methods.registry import METHODS, build_method, spec_of
from pretrain.tokenizers.card import TokenizerCard
from pretrain.tokenizers.saved import save_tokenizer

COLOURS = {"jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8, "grayscale": 0.2}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"family": "vit", "dim": 32, "depth": 2, "heads": 2, "patch": 4},
    "swin": {"family": "swin", "dim": 16, "depths": [2, 2], "heads": [1, 2], "patch": 2, "window": 4},
}
NORMALISATION = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def write_shards(folder: Path, num_images: int = 120, shards: int = 2) -> None:
    """Smooth random 32x32 JPEGs of ten classes with two captions each, as WebDataset itself writes them."""
    per_shard = num_images // shards
    for shard in range(shards):
        with wds.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                kind = number % 10
                captions = f"picture {number} of class {kind}\nof {kind}: the picture {number}\n"
                sample = {"__key__": f"{number:06d}", "jpg": file.getvalue(), "cls": str(kind), "txt": captions}
                writer.write(sample)


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
    for codes with aggregation. Those of codes, `vqkd` and `distill` need `write_sources(shards)`.
    """
    whole = {"size": 32, "scale": [0.5, 1.0]}
    methods: dict[str, dict[str, Any]] = {name: copy.deepcopy(dict(spec.example)) for name, spec in METHODS.items()}
    for name in ("vqkd", "distill"):
        methods[name]["teacher"] = str(shards / "teacher")
    if family == "swin":
        methods["mae"]["mask"] = {"kind": "one_in_2x2", "unit": 4}
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
    several = method in ("dino", "lejepa")  # views of an image
    if several:
        views = {
            "global_crops": [{**whole, **COLOURS, "blur": 1.0}, {**whole, **COLOURS, "solarise": 0.2}],
            "local_crops": {"count": 2, "size": 16, "scale": [0.2, 0.5], **COLOURS},
        }
    if "tokenizer" in methods[method]:
        views["target_crop"] = {"size": 32}
    encoder = dict(ENCODERS[family]) | ({"pool": "mean"} if family == "vit" and not several else {})
    data: dict[str, Any] = {
        "name": f"{method}-{family}",
        "runs": str(runs),
        "data": {"train": str(shards), "workers": 0, "threads": 1, "shuffle_window": 16},
        "views": views,
        "encoder": encoder if METHODS[name].stride is None else None,
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
    views, channels = config.views, config.data.planes

    def crops(count: int, side: tuple[int, int]) -> torch.Tensor:
        shape = (size, count, channels, *side)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    fields: list[Any] = [{}] * size
    spec, stride = spec_of(config.method), getattr(config.encoder, "stride", None)
    if draw := spec.draw(config.method, views.global_size, stride, size):
        fields = [draw(seed, 0, row) for row in range(size)]
    batch = {
        "global_crops": crops(len(views.global_crops), views.global_size),
        "ids": torch.stack([torch.zeros(size, dtype=torch.int64), torch.arange(size)], dim=1),
        "rows": torch.arange(size),
        **{name: torch.from_numpy(np.stack([row[name] for row in fields])) for name in fields[0]},
    }
    if views.local_crops is not None:
        batch["local_crops"] = crops(views.local_crops.count, views.local_crops.size)
    if views.target_crop is not None:
        batch["target_crops"] = crops(1, views.target_crop.size)[:, 0]
    if views.teacher_crops is not None:
        batch["teacher_crops"] = crops(len(views.global_crops), views.teacher_crops.size)
    return batch
