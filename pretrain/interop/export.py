"""Encoders for use elsewhere: each export is opened again, and its features compared, before it takes its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import timm
import torch
from einops import rearrange
from pydantic import TypeAdapter
from torch import Tensor, nn

from data_pipelines.files import staged
from pretrain.config import EncoderConfig
from pretrain.encoders import Encoder
from pretrain.encoders.saved import EncoderCard, encoder_bytes, load_encoder, read_card, timm_recipe
from pretrain.interop.features.folder import (
    BACKBONE_FILES,
    backbone_of,
    check_backbone,
    is_backbone_folder,
    load_backbone,
    parse_settings,
    usage,
    write_backbone,
)
from pretrain.interop.hub_folder import HUB_FILES, is_hub_folder, write_hub_folder
from pretrain.interop.model_card import model_card
from pretrain.interop.onnx_graph import WholeImages, check_packages, run_onnx, write_onnx

Format = Literal["timm", "safetensors", "hf", "onnx", "features"]
SUFFIXES: dict[Format, str] = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx"}  # else a folder
#: The largest difference of any feature, where the largest feature is above 1 relative to that.
TOLERANCES: dict[Format, float] = {"timm": 1e-5, "safetensors": 1e-5, "hf": 1e-5, "onnx": 1e-4, "features": 1e-5}
#: Of exports that are folders: the files of one, and whether a folder is one.
FOLDERS: dict[Format, tuple[tuple[str, ...], Callable[[Path], bool]]] = {
    "hf": (HUB_FILES, is_hub_folder),
    "features": (BACKBONE_FILES, is_backbone_folder),
}
NUM_IMAGES = 3  # of the comparison; not what a graph was traced with


@dataclass(frozen=True)
class Exported:
    """What was written, how far its features are from the encoder's (see `TOLERANCES`), and lines that use it."""

    path: Path
    num_bytes: int
    difference: float
    tolerance: float
    usage: str


def export_encoder(
    source: Path,
    out: Path,
    to: str,
    *,
    run: Path | None = None,
    probes: Sequence[str] = (),
    settings: Sequence[str] = (),
    overwrite: bool = False,
) -> Exported:
    """Write the encoder at `source` to `out` for `to`, and compare what is read back on a seeded random batch.

    Args:
        source: An encoder folder or an exported .safetensors file.
        out: safetensors and timm: one file, the card in its header. onnx: one file, whose graph takes images in 0 .. 1
            (with `out`.data beside it where the weights exceed 2 GB). hf: a folder as timm's `hf-hub:` reads it.
            features: a folder that `features.folder.load_backbone` reads.
        run: The run folder that `source` came from, for the model card.
        probes: Markdown for the model card, one piece a probe.
        settings: `key=value` of `features.settings.FeatureSettings`; of no other format.
        overwrite: Replace an `out` that is an earlier export.

    Raises ValueError, before anything is written, for a format unknown or impossible for this encoder and for packages
    that are missing; FileExistsError for an `out` that is there. ValueError with nothing left behind when the export
    can't be read back, or gives other features than the encoder.
    """
    kind = check_out(source, out, to, overwrite)
    if settings and kind != "features":
        raise ValueError(f"{settings[0]} is a setting of --to features, and --to {kind} has none; leave it out")
    recipe = _recipe(read_card(source), kind)
    encoder, card = load_encoder(source)
    if kind == "features":
        backbone = backbone_of(encoder, card, parse_settings(settings))
        encoder, card = backbone.plain, backbone.card
    with staged(out, overwrite) as path:
        if kind == "onnx":
            with told(kind):
                write_onnx(path, encoder, card)
        elif kind == "hf":
            assert recipe is not None
            write_hub_folder(
                path, encoder, card, recipe, model_card(card, recipe, run=run, probes=probes, source=source)
            )
        elif kind == "features":
            write_backbone(backbone, path)
        else:
            path.write_bytes(encoder_bytes(encoder, card))
        difference = check_export(path, kind, encoder, card, recipe)
        if kind == "features":
            difference = max(difference, check_backbone(path, backbone))
        num_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    lines = usage(out, backbone) if kind == "features" else _usage(out, kind, card, recipe)
    return Exported(out, num_bytes, difference, TOLERANCES[kind], lines)


def check_out(source: Path, out: Path, to: str, overwrite: bool) -> Format:
    """The format `to`, if it is one and `out` may be written; see `export_encoder` for the errors."""
    if to not in get_args(Format):
        raise ValueError(f"--to is {to!r}; an encoder can be exported to {', '.join(get_args(Format))}")
    kind: Format = to  # type: ignore[assignment]
    if kind == "onnx":
        check_packages()
    suffix = SUFFIXES.get(kind)
    if suffix is not None and out.suffix != suffix:
        raise ValueError(f"{out} is to be one file of the kind {suffix}; call it {out.with_suffix(suffix)}")
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is, or lies in, the encoder that is to be exported; write elsewhere")
    if not out.exists():
        return kind
    if not overwrite:
        raise FileExistsError(f"{out} exists; choose another place, or replace it (--overwrite)")
    if suffix is not None and not out.is_file():
        raise FileExistsError(f"{out} is a folder and an export to {kind} is one file; choose another place")
    if suffix is None and not FOLDERS[kind][1](out):
        raise FileExistsError(
            f"{out} is no earlier export to {kind} (a folder of {', '.join(FOLDERS[kind][0])} and no more); "
            "choose another place, or remove it yourself"
        )
    return kind


def check_export(path: Path, kind: Format, encoder: Encoder, card: EncoderCard, recipe: dict[str, Any] | None) -> float:
    """Open the export at `path` as a stranger would, and return its largest difference from `encoder`'s features.

    The difference is over `NUM_IMAGES` random images, as `TOLERANCES` says.

    Raises ValueError where it does not open or is beyond the tolerance of `kind`.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(NUM_IMAGES, card.channels, *card.image_size, generator=generator)
    model = WholeImages(encoder, card)
    with torch.no_grad():
        expected = dict(zip(model.names, model(images), strict=True))
        with told(kind):
            found = _features_of(path, kind, recipe, images)
        if kind in ("timm", "hf") and encoder.norm_in_head:
            found["tokens"] = encoder.final_norm(found["tokens"])
    difference = 0.0
    for name, feature in found.items():
        if feature.shape != expected[name].shape:
            if name != "pooled" and kind in ("timm", "hf"):
                continue  # a map that timm goes on from, and that is not our tokens
            shapes = f"{tuple(feature.shape)} instead of {tuple(expected[name].shape)}"
            raise ValueError(f"the export to {kind} gives {name} of the shape {shapes}, so it was removed")
        scale = max(1.0, float(expected[name].abs().max()))
        difference = max(difference, float((feature - expected[name]).abs().nan_to_num(torch.inf).max()) / scale)
    if not difference <= TOLERANCES[kind]:
        why = ""
        if kind in ("timm", "hf"):
            why = (
                "With these settings timm computes something else, as where windows do not divide the map, where the "
                "norms have another epsilon, or where it pools otherwise. "
            )
        raise ValueError(
            f"the export to {kind} gives other features than the encoder: they differ by up to {difference:.2g} "
            f"(allowed {TOLERANCES[kind]:g}), so it was removed. {why}{_alternatives(kind)}"
        )
    return difference


@contextmanager
def told(kind: Format) -> Iterator[None]:
    """torch's exporter, timm, onnxruntime and safetensors each raise kinds of their own: ValueError for all."""
    try:
        yield
    except Exception as error:
        text = str(error)
        told = " ".join(text[max(text.find("Exception summary"), 0) :].split())  # torch's exporter has it last
        raise ValueError(
            f"the export to {kind} failed, and nothing was kept of it ({type(error).__name__}: "
            f"{told[:300]}{'...' if len(told) > 300 else ''}). {_alternatives(kind)}"
        ) from error


def _features_of(path: Path, kind: Format, recipe: dict[str, Any] | None, images: Tensor) -> dict[str, Tensor]:
    """What the export makes of images (b, c, h, w) in 0 .. 1: pooled (b, d), tokens (b, n, d), class (b, d)."""
    if kind == "onnx":
        whole, alone = run_onnx(path, images), run_onnx(path, images[:1])
        assert all(len(alone[name]) == 1 for name in whole)
        return whole
    if kind in ("safetensors", "features"):
        if kind == "features":  # without windows, what was pretrained
            backbone = load_backbone(path)
            model = WholeImages(backbone.plain, backbone.card)
        else:
            model = WholeImages(*load_encoder(path))
        return dict(zip(model.names, model(images), strict=True))
    if kind == "timm":
        model = timm.create_model(**recipe, checkpoint_path=str(path)).eval()
        card = read_card(path)
        mean, std = card.mean, card.std
    else:
        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
        data = timm.data.resolve_model_data_config(model)
        mean, std = data["mean"], data["std"]
    channels = (rearrange(torch.tensor(values), "c -> c 1 1") for values in (mean, std))
    return timm_features(model, *channels, images)


def timm_features(model: nn.Module, mean: Tensor, std: Tensor, images: Tensor) -> dict[str, Tensor]:
    """What a model of timm makes of images (b, c, h, w) in 0 .. 1: `pooled`, and `tokens` and `class` where it has
    them."""
    images = (images - mean) / std
    found = {"pooled": model(images)}
    tokens = model.forward_features(images)
    if not isinstance(tokens, Tensor):
        return found
    if tokens.ndim == 4:
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        found["tokens"] = rearrange(tokens, "b h w d -> b (h w) d" if last else "b d h w -> b (h w) d")
    elif tokens.ndim == 3:
        num_prefix = getattr(model, "num_prefix_tokens", 0)
        found["tokens"] = tokens[:, num_prefix:]
        if num_prefix:
            found["class"] = tokens[:, 0]
    return found


def _recipe(card: EncoderCard, kind: Format) -> dict[str, Any] | None:
    """timm's recipe, where the format needs one; ValueError where timm has no such model."""
    recipe = timm_recipe(card)
    if recipe is None and kind in ("timm", "hf"):
        schema = TypeAdapter(EncoderConfig)
        values = schema.dump_python(card.encoder, mode="json")
        usual = schema.dump_python(type(card.encoder)(), mode="json")
        special = ", ".join(f"{key}={value}" for key, value in values.items() if value != usual[key])
        raise ValueError(
            f"timm {timm.__version__} has no model that takes these weights ({values['family']} with "
            f"{special or 'the usual settings'}), and --to {kind} is read by timm. {_alternatives(kind)}"
        )
    return recipe


def _alternatives(kind: Format) -> str:
    others = {
        "safetensors": "--to safetensors OUT.safetensors (opened by selfsight)",
        "onnx": "--to onnx OUT.onnx (opened by any ONNX runtime)",
    }
    return "Try instead: " + " or ".join(text for name, text in others.items() if name != kind)


def _usage(out: Path, kind: Format, card: EncoderCard, recipe: dict[str, Any] | None) -> str:
    """A few lines of Python that use the export."""
    shape = f"(b, {card.channels}, {card.image_size[0]}, {card.image_size[1]})"
    mean, std = (tuple(round(value, 6) for value in values) for values in (card.mean, card.std))
    normalised = f"# {shape}: of pixels in 0 .. 1, minus mean {mean}, by std {std}"
    if kind == "onnx":
        return (
            "import onnxruntime\n"
            f"session = onnxruntime.InferenceSession({str(out)!r})\n"
            f'pooled, tokens = session.run(["pooled", "tokens"], {{"images": images}})  '
            f"# float32 {shape}: pixels in 0 .. 1, not normalised"
        )
    if kind == "safetensors":
        return (
            "from pathlib import Path\nfrom pretrain.encoders.saved import load_encoder\n"
            f"encoder, card = load_encoder(Path({str(out)!r}))\nfeatures = encoder(images)  {normalised}"
        )
    assert recipe is not None
    arguments = [f"{key}={value!r}" for key, value in recipe.items() if key != "model_name" and value is not None]
    if kind == "timm":
        arguments = [repr(recipe["model_name"]), *arguments, f"checkpoint_path={str(out)!r}"]
        return (
            f"import timm\nmodel = timm.create_model({', '.join(arguments)}).eval()\n"
            f"features = model(images)  {normalised}"
        )
    return (
        f"import timm\nmodel = timm.create_model({f'local-dir:{out}'!r}, pretrained=True).eval()\n"
        f"features = model(images)  {normalised}\n# to share it: hf upload USER/NAME {out}; then 'hf-hub:USER/NAME'"
    )
