"""Features of photos in shards: the store's pass against the loop that a user of timm writes.

That loop is WebDataset over the same shards, torchvision's transforms, a DataLoader of two processes, timm's
`forward_features`, the class token and the mean of the patches. Ours gives those, the class tokens of three more blocks
and a digest of each crop. `--arithmetic bf16` compares the same in bf16, for a CPU or GPU that has it.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import webdataset as wds
from _compare import compare
from _photos import write_shards
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from data_pipelines.datasets.dataset import open_dataset
from eval.store.encoding import Crops, FrozenEncoder
from pretrain.encoders.timm.encoder import TimmEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arithmetic", choices=("fp32", "bf16"), default="fp32")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(asked.model, pretrained=False).eval().to(asked.device)
    encoder = TimmEncoder(asked.model, pretrained=False)
    frozen = FrozenEncoder(encoder, Crops(224, 3, 8, MEAN, STD), device=asked.device, arithmetic=asked.arithmetic)
    transform = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ]
    )  # fmt: skip

    def decoded(sample: dict) -> torch.Tensor:
        tensor: torch.Tensor = transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
        return tensor

    with tempfile.TemporaryDirectory() as place:
        write_shards(Path(place), asked.photos)
        dataset = open_dataset(place)
        shards = [str(path) for path in sorted(Path(place).glob("*.tar"))]
        samples = np.arange(dataset.num_samples)

        def ours() -> None:
            for batch in frozen.batches(dataset, samples, asked.batch):
                assert batch.rows.shape[1] == frozen.layout.dim

        @torch.no_grad()
        def theirs() -> None:
            source = wds.WebDataset(shards, shardshuffle=False).map(decoded)
            for images in DataLoader(source, asked.batch, num_workers=WORKERS):
                with torch.autocast(asked.device, torch.bfloat16, enabled=asked.arithmetic == "bf16"):
                    tokens = model.forward_features(images.to(asked.device, non_blocking=True))
                torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).float().cpu()

        compare(
            f"features of {asked.model}, {asked.arithmetic}", "images", asked.photos, ours, theirs, asked.turns, 1.0
        )


if __name__ == "__main__":
    main()
