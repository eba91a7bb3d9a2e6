"""Encoders for images at their own shape, for use elsewhere: ONNX, timm's NaFlexViT, a folder that selfsight opens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from pydantic import TypeAdapter
from torch import Tensor

from data_pipelines.files import staged
from pretrain.encoders import Encoder
from pretrain.encoders.saved import EncoderCard, encoder_bytes, load_encoder
from pretrain.interop.export import TOLERANCES, Exported, check_out, timm_features, told
from pretrain.interop.model_card import model_card
from pretrain.interop.naflex import open_naflex, recipe_of, write_naflex
from pretrain.interop.onnx_graph import WholeImages, run_onnx, write_onnx

FORMATS = ("onnx", "timm", "hf")
#: Rows and columns of the images of the comparison, in parts of those that the encoder was built for.
SHAPES = ((0.5, 1.5), (1.25, 0.75), (1.75, 1.25))

Features = dict[str, Tensor]


def export_native(
    source: Path,
    out: Path,
    to: str,
    *,
    run: Path | None = None,
    probes: Sequence[str] = (),
    overwrite: bool = False,
) -> Exported:
    """Write the encoder at `source` to `out` for images of any sides that are multiples of its patch, and compare what
    is read back on images of three shapes.

    Args:
        out: onnx: a graph of one image (1, c, h, w) in 0 .. 1, any h and w. timm: a state dict of its NaFlexViT, where
            that computes the same. hf: a Hub folder that `load_encoder` opens.

    The others, and the errors, are as of `export_encoder`; ValueError too where the encoder takes no such images, or
    NaFlexViT computes something else, with the reason.
    """
    if to not in FORMATS:
        raise ValueError(f"--to is {to!r}; with --native it is one of {', '.join(FORMATS)}")
    kind = check_out(source, out, to, overwrite)
    encoder, card = load_encoder(source)
    if not encoder.native:
        raise ValueError(f"{card.run} takes no images of their own shape; leave out --native")
    recipe = recipe_of(card) if kind == "timm" else {}
    with staged(out, overwrite) as path:
        if kind == "onnx":
            with told(kind):
                write_onnx(path, encoder, card, native=True)
        elif kind == "timm":
            write_naflex(path, encoder, card, recipe)
        else:
            _write_folder(path, encoder, card, model_card(card, None, run=run, probes=probes, source=source))
        with told(kind):
            difference = compare(encoder, card, _opened(path, kind, card, recipe))
        if not difference <= TOLERANCES[kind]:
            raise ValueError(
                f"the export to {kind} gives other features than the encoder on images of several shapes: they differ "
                f"by up to {difference:.2g} (allowed {TOLERANCES[kind]:g}), so it was removed"
            )
        num_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return Exported(out, num_bytes, difference, TOLERANCES[kind], _usage(out, kind, card, recipe))


@torch.no_grad()
def compare(encoder: Encoder, card: EncoderCard, found: Callable[[Tensor], Features]) -> float:
    """The largest difference of any feature of random images of the `SHAPES`, relative to the largest above 1."""
    generator, ours, difference = torch.Generator().manual_seed(0), WholeImages(encoder, card), 0.0
    for shape in SHAPES:
        sides = (
            max(1, round(part * side / encoder.patch)) * encoder.patch
            for part, side in zip(shape, card.image_size, strict=True)
        )
        image = torch.rand(1, card.channels, *sides, generator=generator)
        expected = dict(zip(ours.names, ours(image), strict=True))
        for name, feature in found(image).items():
            if name not in expected:
                continue  # timm's first prefix token, where that is a register
            if feature.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(feature.shape)} instead of {tuple(expected[name].shape)}")
            scale = max(1.0, float(expected[name].abs().max()))
            difference = max(difference, float((feature - expected[name]).abs().nan_to_num(torch.inf).max()) / scale)
    return difference


def _opened(path: Path, kind: str, card: EncoderCard, recipe: dict[str, Any]) -> Callable[[Tensor], Features]:
    """What the export makes of an image (1, c, h, w) in 0 .. 1."""
    if kind == "onnx":
        return lambda image: run_onnx(path, image)
    if kind == "timm":
        model = open_naflex(path, recipe)
        mean, std = (rearrange(torch.tensor(values), "c -> c 1 1") for values in (card.mean, card.std))
        return lambda image: timm_features(model, mean, std, image)
    whole = WholeImages(*load_encoder(path))
    return lambda image: dict(zip(whole.names, whole(image), strict=True))


def _write_folder(folder: Path, encoder: Encoder, card: EncoderCard, readme: str) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(encoder_bytes(encoder, card))
    described = {"architecture": f"selfsight {card.encoder.family}", "native": True}
    described["selfsight"] = TypeAdapter(EncoderCard).dump_python(card, mode="json")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _usage(out: Path, kind: str, card: EncoderCard, recipe: dict[str, Any]) -> str:
    sides = f"h and w any multiples of {card.encoder.patch}"
    mean, std = (tuple(round(value, 6) for value in values) for values in (card.mean, card.std))
    if kind == "onnx":
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({str(out)!r})\n"
            f'pooled, tokens = session.run(["pooled", "tokens"], {{"images": image}})  '
            f"# float32 (1, {card.channels}, h, w), {sides}: pixels in 0 .. 1, not normalised"
        )
    if kind == "hf":
        return (
            "from pathlib import Path\nfrom pretrain.encoders.saved import load_encoder\n"
            f"encoder, card = load_encoder(Path({str(out)!r}))\n# or: selfsight embed {out} --data D --out F --native\n"
            f"# to share it: hf upload USER/NAME {out}; whoever has the folder loads it in the same way"
        )
    arguments = [f"{key}={value!r}" for key, value in recipe.items() if key != "model_name" and value is not None]
    arguments = [repr(recipe["model_name"]), *arguments, f"checkpoint_path={str(out)!r}"]
    return (
        f"import timm  # {timm.__version__}\nmodel = timm.create_model({', '.join(arguments)}).eval()\n"
        f"features = model(images)  # (b, {card.channels}, h, w), {sides}, or NaFlex batches of patches: of pixels in "
        f"0 .. 1, minus mean {mean}, by std {std}"
    )
