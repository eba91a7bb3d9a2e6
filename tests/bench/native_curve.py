"""What images at their own shape are worth while training: DINO on a small NaViT, native against squashed to squares.

Both see the same images, drawn with `selfsight demo-data --shapes`, for as many steps and with as many patches a crop;
of the squashed ones every image is resized to 64x64 px before anything else. The k-NN is of whole images, at their own
shape or squashed, at each milestone and of the untrained encoder.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from data_pipelines.datasets.dataset import open_dataset
from data_pipelines.packing.write import pack
from data_pipelines.shapes import SHAPES, build_shapes
from eval.features import extract
from eval.probes.knn import knn_accuracy
from eval.target import open_target
from pretrain.config.load import PRESETS, parse_config
from pretrain.run import pretrain

SIDE, PATCH, TOKENS, K = 64, 8, 25, 20
WAYS = ("native", "squashed")


def draw(out: Path, train: int, val: int) -> None:
    """Shards of both kinds below `out`."""
    if all((out / way).is_dir() for way in WAYS):
        return
    native = build_shapes(out / "images", train=train, val=val)
    squashed = out / "squashed-images"
    shutil.rmtree(squashed, ignore_errors=True)
    for path in native.rglob("*.jpg"):
        copy = squashed / path.relative_to(native).with_suffix(".png")
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(copy)
    for way, images in zip(WAYS, (native, squashed), strict=True):
        pack(images, out / way, progress=False)


def settings(way: str, out: Path, steps: int, every: int, seed: int) -> dict[str, Any]:
    """The preset `demo` in all but its encoder and, where images keep their shape, its crops."""
    crop = {"scale": [0.3, 0.6], "flip": 0.0, "jitter": [0.4, 0.4, 0.2, 0.1], "jitter_prob": 0.8, "grayscale": 0.3}
    own = {"shape": "native", "patch": PATCH, "max_tokens": TOKENS, "area": [TOKENS, TOKENS]}
    crop |= own if way == "native" else {"size": 40}
    demo = yaml.safe_load((PRESETS / "demo.yaml").read_text(encoding="utf-8"))
    return {
        **demo,
        "name": way,
        "runs": str(out / "runs"),
        "seed": seed,
        "data": {"train": str(out / way)},
        "optim": {**demo["optim"], "warmup_epochs": 2},
        "views": {"global_crops": [crop, crop]},
        "encoder": {"family": "navit", "dim": 96, "depth": 2, "heads": 3, "patch": PATCH, "positions": "fractional"},
        "train": {"steps": steps, "batch_size": 64},
        "checkpoint": {"every_steps": every, "keep_last": steps // every},
        "engine": {"threads": 1},
        "tracking": {"log_every_steps": 50, "wandb": "disabled"},
    }


def knn(target: str, data: Path, way: str, untrained: bool = False) -> float:
    """The share of val images in % that their 20 nearest of train classify rightly."""
    native = way == "native"
    subject = open_target(target, SIDE, native=native)
    encoder = subject.untrained(0) if untrained else subject.encoder
    features = []
    for split in ("train", "val"):
        with open_dataset(str(data / way), split) as dataset:
            features.append(
                extract(
                    encoder, dataset, size=SIDE, mean=subject.mean, std=subject.std, progress=False,
                    native=native,
                )
            )  # fmt: skip
    train, val = features
    found = knn_accuracy(
        train.inputs["mean"], train.labels, val.inputs["mean"], val.labels, num_classes=10, ks=(K,)
    )  # fmt: skip
    return 100 * found[K]["top1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("native-curve"))
    parser.add_argument("--train", type=int, default=3000, help="images to learn from")
    parser.add_argument("--val", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="steps between milestones")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    draw(asked.out, asked.train, asked.val)
    print(f"{asked.train:,} images of {len(SHAPES)} shapes, batches of 64, seed {asked.seed}", flush=True)
    for way in WAYS:
        began = time.perf_counter()
        run = pretrain(parse_config(settings(way, asked.out, asked.steps, asked.every, asked.seed)))
        print(f"{way}: {time.perf_counter() - began:.0f} s", flush=True)
        print(f"{way}, untrained: k-NN {knn(str(run), asked.out, way, untrained=True):.1f} %", flush=True)
        for step in range(asked.every, asked.steps + 1, asked.every):
            found = knn(str(run / "checkpoints" / f"step-{step:08d}"), asked.out, way)
            print(f"{way}, step {step}: k-NN {found:.1f} %", flush=True)


if __name__ == "__main__":
    main()
