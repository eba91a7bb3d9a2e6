"""Faster R-CNN of torchvision on the built-in numerals: average precision from a pretrained encoder against the same
detector from scratch, at equal steps, data, order and seeds of all that is not the encoder.

`--encoder RUN` names a run or an encoder; default: that of `make demo`, DINO on other sheets of the same train digits
and photographs, which shares nothing with the images that AP is measured on. `--lr` takes several, each of which is run
for both sides. Needs the extra `detection`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from data_pipelines.scenes import build_scenes
from pretrain.encoder_folder import find_encoder
from pretrain.encoders.saved import fresh_encoder, load_encoder
from pretrain.interop.features.folder import backbone_of
from pretrain.interop.features.settings import FeatureSettings
from pretrain.interop.features.torchvision_rcnn import rcnn_settings

SIDE, NUM_CLASSES = 96, 11  # px; ten numerals and the background
#: Digits are 16 to 38 px high, at strides of 4, 8 and 16 px.
SETTINGS = FeatureSettings(levels=(2, 3, 4), width=32, window=0)
ANCHORS = ((14,), (22,), (34,))
DEMO = Path("demo/runs/demo")  # where `make demo` leaves its encoder


def read(folder: Path) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images (3, h, w) in 0 .. 1 of a split, and their boxes (n, 4) and labels (n,)."""
    rows = []
    for path in sorted(folder.glob("*/*.jpg")):
        pixels = rearrange(torch.from_numpy(np.asarray(Image.open(path)).copy()), "h w c -> c h w").float() / 255
        boxes = torch.tensor(json.loads(path.with_suffix(".json").read_text())["boxes"], dtype=torch.float32)
        rows.append((pixels, {"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}))
    return rows


def detector_of(target: Path, from_scratch: bool, seed: int) -> FasterRCNN:
    """The detector, whose encoder alone differs."""
    encoder, card = load_encoder(target)
    torch.manual_seed(seed)
    if from_scratch:
        encoder = fresh_encoder(card)
    torch.manual_seed(seed)
    backbone = backbone_of(encoder, card, SETTINGS)
    return FasterRCNN(
        backbone,
        **rcnn_settings(backbone, sizes=ANCHORS, aspect_ratios=(1.0, 1.5)),
        box_head=TwoMLPHead(SETTINGS.width * 49, 128),
        box_predictor=FastRCNNPredictor(128, NUM_CLASSES),
        rpn_pre_nms_top_n_train=300,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=64,
        box_detections_per_img=20,
        min_size=SIDE,
        max_size=SIDE,
    )


def train(detector: nn.Module, rows: list[Any], steps: int, batch: int, lr: float, seed: int) -> float:
    """The mean loss of the last tenth of the steps: AdamW, a warm-up over a tenth, then a cosine to zero."""
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    order = np.random.default_rng(seed).integers(len(rows), size=(steps, batch))
    torch.manual_seed(seed)  # of the proposals that are drawn
    losses = []
    for step, chosen in enumerate(order.tolist()):
        warm = min(1.0, (step + 1) / max(steps // 10, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1 + np.cos(np.pi * step / steps)) / 2
        images, targets = zip(*(rows[row] for row in chosen), strict=True)
        loss = sum(detector.train()(list(images), list(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return statistics.fmean(losses[-max(steps // 10, 1) :])


@torch.no_grad()
def average_precision(detector: nn.Module, rows: list[Any]) -> tuple[float, float]:
    """AP over IoU .5 to .95, and at .5, by pycocotools, in per cent."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for number, (image, target) in enumerate(rows):
        (found,) = detector.eval()([image])
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": label, "iscrowd": 0}
            annotations.append(annotation | {"bbox": sides, "area": sides[2] * sides[3]})
        for box, label, score in zip(*(found[key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": number, "category_id": label, "bbox": sides, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": number} for number in range(len(rows))],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(1, NUM_CLASSES)],
        }
        truth.createIndex()
        if not results:
            return 0.0, 0.0
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0]), 100 * float(evaluation.stats[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=DEMO, help="a run or an encoder")
    parser.add_argument("--images", type=Path, help="a folder for the built-in images; default: a temporary one")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--val", type=int, default=200)
    asked = parser.parse_args()
    if not asked.encoder.exists():
        print(f"no encoder at {asked.encoder}: make demo makes one, or name another (--encoder); nothing is measured")
        return
    with tempfile.TemporaryDirectory() as temporary:
        images = build_scenes(asked.images or Path(temporary) / "images", 0, asked.train, asked.val, SIDE)
        rows, held_back = read(images / "train"), read(images / "val")
        for lr in asked.lr:
            reached: dict[str, list[tuple[float, float]]] = {"pretrained": [], "from scratch": []}
            for seed in range(asked.seeds):
                for name, values in reached.items():
                    began = time.perf_counter()
                    detector = detector_of(find_encoder(asked.encoder), name == "from scratch", seed)
                    loss = train(detector, rows, asked.steps, asked.batch, lr, seed)
                    values.append(average_precision(detector, held_back))
                    told = f"loss {loss:.3f}  AP {values[-1][0]:.1f}  AP50 {values[-1][1]:.1f}"
                    seconds = time.perf_counter() - began
                    print(f"lr {lr:g}  seed {seed}  {name}: {told}  ({seconds:.0f} s)", flush=True)
            means = {name: np.mean(values, axis=0) for name, values in reached.items()}
            ours, theirs = means["pretrained"], means["from scratch"]
            print(
                f"lr {lr:g}, {asked.steps} steps of {asked.batch}: AP {ours[0]:.1f} against {theirs[0]:.1f} from "
                f"scratch, AP50 {ours[1]:.1f} against {theirs[1]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
