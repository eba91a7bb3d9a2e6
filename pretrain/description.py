"""A run in a sentence, made from its settings (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pretrain.config import Config
from pretrain.config.load import as_shown, list_presets
from pretrain.encoders.registry import FAMILIES
from pretrain.methods.registry import METHODS


def describe(config: Config | Mapping[str, Any]) -> str:
    """A run in a sentence: method, encoder, crops, length, start. What the settings leave open is left out, and so is
    what can't be read: of a damaged configuration the sentence is short, or empty.

    `MAE, ViT tiny with depth 6 and 4-px patches, crops of 32 px, 400 steps of 128 images, from random weights`.
    """
    values = as_shown(config) if isinstance(config, Config) else config
    method, encoder, views, train = (_section(values, name) for name in ("method", "encoder", "views", "train"))
    parts = [_method(method), _encoder(encoder), _crops(views), _length(train)]
    if any(parts):
        source = values.get("init_from")
        parts.append(f"from the weights of {_last(str(source))}" if source else "from random weights")
    return ", ".join(filter(None, parts))


def own_words(config: Config | Mapping[str, Any]) -> str:
    """What its user says of a run; nothing where that is a preset's text, which is about the preset."""
    values = as_shown(config) if isinstance(config, Config) else config
    said = " ".join(str(values.get("description") or "").split())
    return "" if said in {" ".join(preset.description.split()) for preset in list_presets()} else said


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _method(method: Mapping[str, Any]) -> str:
    name = str(method.get("name") or "")
    target = method.get("target")
    target = target.get("name") if isinstance(target, Mapping) else target
    title = METHODS[name].title if name in METHODS else name
    return title + (f" of {target}" if name and target else "")


def _encoder(encoder: Mapping[str, Any]) -> str:
    if encoder.get("model"):
        return str(encoder["model"])
    family = str(encoder.get("family") or "")
    title = FAMILIES[family].title if family in FAMILIES else family
    name = f"{title} {encoder.get('size') or ''}".strip()
    shape = [f"{words} {_listed(encoder[key])}" for key, words in _SHAPE if encoder.get(key) is not None]
    patch = encoder.get("patch")
    shape += [f"{patch}-px patches"] if isinstance(patch, int) else []
    return name + (f" with {' and '.join(filter(None, [', '.join(shape[:-1]), shape[-1]]))}" if name and shape else "")


_SHAPE = (("dim", "width"), ("depth", "depth"), ("depths", "depths"))


def _crops(views: Mapping[str, Any]) -> str:
    crops, local = views.get("global_crops"), views.get("local_crops")
    if not isinstance(crops, list) or not crops or not isinstance(crops[0], Mapping):
        return ""
    several = [f"{len(crops)} x " if len(crops) > 1 or local else "", side_of(crops[0])]
    if isinstance(local, Mapping):
        several += [f" and {local.get('count')} x ", side_of(local)]
    return f"crops of {''.join(several)} px"


def _length(train: Mapping[str, Any]) -> str:
    steps, epochs, batch = (train.get(key) for key in ("steps", "epochs", "batch_size"))
    length = f"{steps:,} steps" if isinstance(steps, int) else f"{epochs:g} epochs" if _is_number(epochs) else ""
    return (
        f"{length} of {batch:,} images"
        if isinstance(steps, int) and isinstance(batch, int)
        else (f"{length} in batches of {batch:,}" if length and isinstance(batch, int) else length)
    )


def side_of(crop: Mapping[str, Any]) -> str:
    """A crop's size in px: `32`, or `32x64` (height, width)."""
    size = crop.get("size")
    sides = list(map(str, size)) if isinstance(size, list) else [str(size)]
    return sides[0] if len(set(sides)) == 1 else "x".join(sides)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _listed(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)


def _last(source: str) -> str:
    """A source without the folders of the machine it lies on."""
    return source if source.startswith("timm:") else PurePath(source).name
