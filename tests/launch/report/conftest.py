"""Run folders as training and probing leave them, made by hand in milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MakeRun = Callable[..., Path]
CONFIG = """\
name: {name}
description: a run for the tests
data: {{train: shards/, channels: 3}}
views: {{global_crops: [{{size: [32, 32]}}, {{size: [32, 32]}}], local_crops: {{count: 2, size: [16, 16]}}}}
encoder: {{family: vit, dim: 32, depth: 2, heads: 2, patch: 4}}
method: {{name: dino, prototypes: 64}}
optim: {{lr: {lr}}}
train: {{steps: 200, batch_size: 24, grad_accum_steps: 2}}
engine: {{precision: fp32, zero_stage: 1}}
"""


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 4 * math.exp(-step / 80) + 1,
        "lr": 1e-3 * step / 200,
        "weight_decay": 0.05,
        "grad_norm": 2.0 + (90.0 if step == 120 else 0.0),
        "teacher_entropy": 3.0,
        "feature_std": 0.5 + step / 1000,
        "images_per_second": 100.0 + step % 7,
        "data_wait": 0.01,
        "memory_gb": 1.0,
        "ids_digest": 12345,
        "epoch": step / 50,
    }


def results(step: int, share: float) -> dict[str, Any]:
    """A probe's file, as much of it as its readers ask for."""

    def scores(top1: float, feature: str) -> dict[str, Any]:
        measured = {"top1": top1, "standard_error": 0.01, "interval": [top1 - 0.02, top1 + 0.02]}
        chosen = {"input": feature, "standardised": True, "learning_rate": 0.1, "held_out": 0.5}
        linear = {"chosen": chosen, "std_over_seeds": 0.002, "at_grid_edge": False, "top1_of_seed": {"0": top1}}
        return {"headline": feature, "knn": {feature: {"20": measured}}, "linear": {**measured, **linear}}

    split = {"checksum": "abc", "num_labelled": 1000, "spec": "shards/"}
    return {
        "target": {"name": "photos", "step": step, "image_size": 32},
        "data": {"train": split, "val": split, "num_classes": 10},
        "protocol": {"temperature": 0.07, "linear": {"held_out": 0.1, "epochs": 30}, "features": "cached centre crops"},
        "rows": {
            "chance": {"uniform": 0.1, "most_frequent_class": 0.1},
            "pixels": scores(0.2, "pixels"),
            "untrained": [scores(0.3, "class")],
            "pretrained": scores(share, "class"),
        },
        "columns": [
            {
                "probe": "knn",
                "name": "knn_class",
                "title": "k-NN class",
                "paths": [["class", "20"], ["pixels", "20"]],
                "headline": True,
            },
            {"probe": "linear", "name": "linear", "title": "linear", "paths": [[]], "headline": True},
        ],
        "notes": ["linear: lr 0.1"],
        "warnings": [],
        "versions": {"torch": "2.14.1", "timm": "1.0.31"},
    }


EVENTS = [
    {"time": "2026-11-21T09:10:00+00:00", "event": "submitted", "jobs": ["7"], "command": ["a", "b"], "log": "7.out"},
    {
        "time": "2026-11-21T09:20:00+00:00", "event": "started", "job": "7", "restart": 0, "step": 0, "ranks": 4,
        "nodes": ["node0", "node1"], "zero_stage": 1, "versions": {"torch": "2.14.1"},
    },
    {"time": "2026-11-21T09:30:00+00:00", "event": "alarm", "step": 60, "name": "spike", "text": "a gradient spike"},
    {"time": "2026-11-21T09:40:00+00:00", "event": "ended", "step": 100, "code": 85, "reason": "stopped"},
    {"time": "2026-11-21T09:40:02+00:00", "event": "requeued", "code": 85, "reason": "preempted"},
    {
        "time": "2026-11-21T11:40:00+00:00", "event": "started", "job": "7", "restart": 1, "step": 100, "ranks": 4,
        "nodes": ["node0", "node2"], "zero_stage": 1, "versions": {"torch": "2.14.1"},
    },
    {"time": "2026-11-21T11:50:00+00:00", "event": "ended", "step": 200, "code": 0, "reason": "finished"},
]  # fmt: skip


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(name: str = "photos", *, steps: int = 200, lr: float = 1e-3, whole: bool = True) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG.format(name=name, lr=lr), encoding="utf-8")
        lines = [json.dumps(row(step)) for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        if not whole:
            return folder
        (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
        with (folder / "system.jsonl").open("w") as file:
            for step in range(0, steps, 10):
                values: dict[str, float] = {"step": step}
                for node, more in (("node0", 0), ("node1", 5)):
                    values |= {f"system/{node}/cpu_percent": 50 + step % 9 + more, f"system/{node}/swap_used_gb": 0.0}
                file.write(json.dumps(values) + "\n")
        (folder / "eval").mkdir()
        for step, share in ((100, 0.4), (200, 0.5)):
            (folder / "eval" / f"probe-{step}.json").write_text(json.dumps(results(step, share)))
        (folder / "pictures").mkdir()
        for kind, width in (("crops", 192), ("attention-of-the-teacher's-class-token", 128)):
            for step in (1, 100, 200):
                noise = np.random.default_rng(step).integers(0, 256, (256, width, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / "pictures" / f"{kind}-{step:08d}.png")
        (folder / "encoder").mkdir()
        (folder / "encoder" / "config.json").write_text(json.dumps({"step": 200, "epoch": 4.0}))
        header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": [30, 40], "data_offsets": [0, 4800]}})
        content = len(header).to_bytes(8, "little") + header.encode() + bytes(4800)
        (folder / "encoder" / "model.safetensors").write_bytes(content)
        (folder / "checkpoints" / "step-00000200").mkdir(parents=True)
        return folder

    return make
