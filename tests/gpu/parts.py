"""The parts of the kit: what each runs, for how long at most, and what it finds."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _photos import write_shards as write_photos
from block_cases import CASES, config_of
from tiny import write_shards, write_sources
from training import column, train

from pretrain.config import Config
from pretrain.config.load import load_config
from pretrain.encoders.vit.encoder import VitEncoder

#: name: (preset, images a step, preset of the rehearsal)
MODELS = {
    "MAE ViT-B/16": ("mae_vitb16_in1k_800", 256, "mae_vit_cifar_cpu"),
    "DINO ViT-S/16": ("dino_vits16_in1k_100", 128, "dino_vit_cifar_cpu"),
    "DINOv2 ViT-L/16": ("dinov2_vitl16_in1k", 64, "dino_vit_cifar_cpu"),
}
QUIET = (
    "train.epochs=null", "optim.warmup_epochs=0", "tracking.pictures_every_steps=0", "tracking.wandb=disabled",
    "tracking.system_every_seconds=0", "diagnostics.knn_every_epochs=null", "diagnostics.inspect_every_steps=0",
)  # fmt: skip


@dataclass(frozen=True)
class Kit:
    """Where the results go, and whether this is a rehearsal on the CPU."""

    out: Path
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def shards(self, photos: bool) -> Path:
        """Images, written once: photos of 500 x 375 px, or tiny ones with a tokenizer and a teacher."""
        folder = self.out / ("photos" if photos else "tiny")
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            if photos:
                write_photos(folder, 256)
            else:
                write_shards(folder)
                write_sources(folder)
            (folder / "done").touch()
        return folder

    def config(self, model: str, name: str, steps: int, *changes: str) -> Config:
        """A run of one of `MODELS` on one device, with nothing beside training."""
        preset, batch, small = MODELS[model]
        changes = (
            *QUIET,
            f"train.steps={steps}",
            f"train.batch_size={batch}",
            f"engine.device={self.device}",
            *changes,
        )
        if self.rehearse:
            preset, changes = small, (*changes, "train.batch_size=8", "encoder.depth=2", "engine.threads=1")
        data = self.shards(photos=not self.rehearse)
        return load_config(preset, [f"data.train={data}", f"runs={self.out / 'runs'}", f"name={name}", *changes])


@dataclass(frozen=True)
class Part:
    """One thing that is measured: its name, the most seconds it may take, and how."""

    name: str
    seconds: float
    run: Callable[[Kit], dict[str, Any]]


def gpu_tests(kit: Kit) -> dict[str, Any]:
    """The suite's tests for GPUs; in the rehearsal, on the CPU."""
    here = Path(__file__).parent
    environ = {**os.environ, **({"SELFSIGHT_REHEARSE": "1"} if kit.rehearse else {})}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "test_on_gpu.py")]
    command += ["-k", "mae or work or clock"] if kit.rehearse else []
    done = subprocess.run(command, cwd=here.parents[1], env=environ, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    told = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        raise SystemExit(told[-1] if told else f"pytest ended with code {done.returncode}")
    return {"told": told[-1]}


def sync(kit: Kit) -> dict[str, Any]:
    """Steps 4 to 6 of each method, in which whatever waits for the device is an error."""
    found: dict[str, str] = {}
    for case in CASES:

        def look(step: int) -> None:
            if not kit.rehearse:
                torch.cuda.set_sync_debug_mode("error" if 4 <= step <= 6 else "default")

        config = config_of(case, kit.shards(photos=False), kit.out / "runs", drop_path=0.1, device=kit.device)
        quiet = dataclasses.replace(config.tracking, log_every_steps=100)
        config = dataclasses.replace(config, name=f"sync-{case}", tracking=quiet)
        try:
            train(config, look=look)
            found[case] = "nothing waits"
        except RuntimeError as error:
            found[case] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            if not kit.rehearse:
                torch.cuda.set_sync_debug_mode("default")
    return found


def speed(kit: Kit, model: str, *changes: str, packs: bool = True) -> dict[str, Any]:
    """Images a second, MFU, memory and parts of a step, of a step that is fed at once; the median of the last rows.

    packs: whether crops of several sizes go through an encoder in one pass, where it can.
    """
    steps, every = (4, 1) if kit.rehearse else (40, 10)
    label = "-".join([model.replace(" ", "-").replace("/", "-"), *(change.partition("=")[0] for change in changes)])
    label += "" if packs else "-two-passes"
    config = kit.config(model, f"speed-{label}", steps, f"tracking.log_every_steps={every}", *changes)
    with ExitStack() as held:
        held.enter_context(patch.object(VitEncoder, "packs", packs))
        if kit.rehearse:  # traced and run as it is: compiling for this processor takes minutes
            compile_ = torch.nn.Module.compile
            traced = lambda module, **options: compile_(module, backend="eager", **options)  # noqa: E731
            held.enter_context(patch.object(torch.nn.Module, "compile", traced))
        rows = train(config, repeat=1)
    names = ["images_per_second", "tokens_per_second", "teraflops", "mfu", "memory_gb"]
    names += [name for name in rows[-1] if name.endswith("_share")]
    found = {name: statistics.median(values) for name in names if (values := column(rows[-2:], name))}
    return {**found, "batch": 8 if kit.rehearse else MODELS[model][1], "loss": rows[-1]["loss"]}


def curves(kit: Kit, model: str) -> dict[str, Any]:
    """How far losses in bf16, eager and compiled, are from those in fp32, on the same eight batches."""
    steps = 6 if kit.rehearse else 80
    sides = {"fp32": ["engine.precision=fp32"], "bf16": ["engine.precision=bf16"]}
    if not kit.rehearse:
        sides["bf16 compiled"] = ["engine.precision=bf16", "engine.compile=true"]
    found: dict[str, Any] = {"steps": steps}
    losses: dict[str, list[float]] = {}
    for side, changes in sides.items():
        name = f"curve-{model.split(' ')[0]}-{side.replace(' ', '-')}"
        options = (*changes, "tracking.log_every_steps=1", "train.batch_size=64", "encoder.drop_path=0")
        losses[side] = column(train(kit.config(model, name, steps, *options), repeat=8), "loss")
        found[f"{side}: last loss"] = losses[side][-1]
    for side in losses:
        if side != "fp32":
            gaps = [abs(a - b) / abs(a) for a, b in zip(losses["fp32"], losses[side], strict=True)]
            found[f"{side}: largest gap"], found[f"{side}: last gap"] = max(gaps), gaps[-1]
    return found


def loader(kit: Kit, model: str) -> dict[str, Any]:
    """A run with its real loader on all cores, and the trace of some of its steps."""
    steps, every = (6, 2) if kit.rehearse else (40, 10)
    name = f"loader-{model.split(' ')[0]}"
    options = [f"tracking.log_every_steps={every}", f"tracking.profile_steps=[{every},{every + 1}]"]
    config = kit.config(model, name, steps, *options)
    rows = train(config)
    names = ("images_per_second", "data_wait", "mfu", "data_share")
    found = {name: statistics.median(values) for name in names if (values := column(rows[-2:], name))}
    found["cores"] = len(os.sched_getaffinity(0))
    found["traces"] = sorted(path.name for path in (Path(config.runs) / name / "profile").glob("*"))
    return found


def export(kit: Kit) -> dict[str, Any]:
    """Every export of an encoder, compared as always; then the encoder's features on the GPU against the CPU's."""
    from pretrain.encoders import build_encoder
    from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
    from pretrain.encoders.vit.config import VitConfig
    from pretrain.interop.export import SUFFIXES, export_encoder

    side = 32 if kit.rehearse else 224
    vit = VitConfig(dim=24, depth=2, heads=2, patch=8) if kit.rehearse else VitConfig(size="base", patch=16)
    card = EncoderCard(vit, (side, side), 3, (0.5,) * 3, (0.25,) * 3, "dino", "mean", step=1, epoch=1.0, run="kit")
    source = kit.out / "encoder"
    if not source.exists():
        torch.manual_seed(0)
        save_encoder(source, build_encoder(vit, (side, side)).state_dict(), card)
    found: dict[str, Any] = {}
    for kind in ("safetensors", "timm", "hf", "onnx"):
        try:
            done = export_encoder(source, kit.out / f"exported-{kind}{SUFFIXES.get(kind, '')}", kind, overwrite=True)
            found[kind] = f"differs by {done.difference:.1e} of {done.tolerance:g} allowed"
        except (ValueError, OSError, ImportError) as error:
            found[kind] = f"failed: {str(error).splitlines()[0]}"
    encoder, _ = load_encoder(source)
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    device = torch.device(kit.device)
    with torch.no_grad():
        exact = encoder(images).tokens
        on_device = encoder.to(device)(images.to(device)).tokens.cpu()
        with torch.autocast(device.type, torch.bfloat16):
            rounded = encoder(images.to(device)).tokens.float().cpu()
    largest = float(exact.abs().max())
    found[f"{kit.device} fp32"] = f"differs by {float((on_device - exact).abs().max()) / largest:.1e} of the largest"
    found[f"{kit.device} bf16"] = f"differs by {float((rounded - exact).abs().max()) / largest:.1e} of the largest"
    return found


def tokenizer(kit: Kit) -> dict[str, Any]:
    """A BEiT v2 step with its tokenizer in bf16 against one in fp32; see tests/bench/beit_tokenizer.py."""
    from beit_tokenizer import measure

    return measure(kit.device, 4 if kit.rehearse else 128, 2 if kit.rehearse else 9, small=kit.rehearse)


def speeds(*changes: str, seconds: float, suffix: str) -> Sequence[Part]:
    """A part for each model, with these changes."""
    return [
        Part(f"speed {model}, {suffix}", seconds, partial(_speed, model=model, changes=changes)) for model in MODELS
    ]


def _speed(kit: Kit, model: str, changes: Sequence[str]) -> dict[str, Any]:
    return speed(kit, model, *changes)


#: In the order of what is wanted most, should time run out.
PARTS: tuple[Part, ...] = (
    Part("images", 60, lambda kit: {"written to": [str(kit.shards(photos)) for photos in (False, not kit.rehearse)]}),
    Part("sync", 60, sync),
    *speeds(seconds=45, suffix="eager"),
    Part("speed DINO ViT-S/16, two passes", 45, lambda kit: speed(kit, "DINO ViT-S/16", packs=False)),
    Part("loader DINO ViT-S/16", 60, lambda kit: loader(kit, "DINO ViT-S/16")),
    Part("tests", 60, gpu_tests),
    *speeds("engine.compile=true", seconds=80, suffix="compiled"),
    Part("speed DINOv2 ViT-L/16, two passes", 45, lambda kit: speed(kit, "DINOv2 ViT-L/16", packs=False)),
    Part("curves MAE ViT-B/16", 60, lambda kit: curves(kit, "MAE ViT-B/16")),
    Part("curves DINO ViT-S/16", 60, lambda kit: curves(kit, "DINO ViT-S/16")),
    Part("loader MAE ViT-B/16", 45, lambda kit: loader(kit, "MAE ViT-B/16")),
    Part("tokenizer", 40, tokenizer),
    Part("export", 60, export),
)
