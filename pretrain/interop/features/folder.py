"""A multi-scale backbone on disk: `model.safetensors`, `config.json` and `README.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save

from data_pipelines.files import parse_json, staged
from pretrain.config.load import override_section
from pretrain.encoders.base import Encoder
from pretrain.encoders.registry import build_encoder
from pretrain.encoders.saved import EncoderCard, parse_card
from pretrain.interop.features.backbone import Backbone, prepared
from pretrain.interop.features.settings import FeatureSettings

BACKBONE_FILES = ("README.md", "config.json", "model.safetensors")
EXACT = 1e-5  # largest difference that the same weights may show, where a map is above 1 relative to that
_MARK = "selfsight backbone"  # of config.json, which is no encoder's


def backbone_of(encoder: Encoder, card: EncoderCard, settings: FeatureSettings | None = None) -> Backbone:
    """A backbone around a pretrained encoder, in evaluation mode; it takes the encoder in, unless its drop path or
    patch are to change.

    Raises ValueError for what this encoder can't be made to give.
    """
    settings = settings or FeatureSettings()
    return Backbone(*prepared(encoder, card, settings), settings).eval()


def parse_settings(overrides: Sequence[str]) -> FeatureSettings:
    """Settings of `key=value`; ValueError for unknown or wrong ones, with what is allowed."""
    try:
        return override_section(FeatureSettings(), overrides)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc'][:1]))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{' '.join(overrides)} can't be: {told}") from None


def save_backbone(backbone: Backbone, folder: Path, overwrite: bool = False) -> None:
    """Write a backbone, trained further perhaps, to a new `folder`, or in the place of an earlier one."""
    check_replaceable(folder, overwrite)
    with staged(folder, overwrite) as path:
        write_backbone(backbone, path)


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise FileExistsError for a `folder` that is there, and is no backbone or not to be replaced."""
    if folder.exists() and not (overwrite and is_backbone_folder(folder)):
        raise FileExistsError(
            f"{folder} exists; choose another place"
            + (", or remove it yourself: it is no earlier backbone" if overwrite else ", or replace it (--overwrite)")
        )


def write_backbone(backbone: Backbone, folder: Path) -> None:
    """Write the three files into a new `folder`."""
    folder.mkdir()
    tensors = {key: value.detach().to("cpu").contiguous() for key, value in backbone.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    described = {
        "format": _MARK,
        "encoder": TypeAdapter(EncoderCard).dump_python(backbone.card, mode="json"),
        "settings": TypeAdapter(FeatureSettings).dump_python(backbone.settings, mode="json"),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(backbone), encoding="utf-8")


def is_backbone_folder(folder: Path) -> bool:
    """Whether `folder` is what `write_backbone` writes, and holds no other file."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(BACKBONE_FILES):
        return False
    try:
        return _described(folder)["format"] == _MARK
    except (ValueError, KeyError, TypeError):
        return False


def load_backbone(folder: str | Path) -> Backbone:
    """The backbone that `selfsight export --to features` or `save_backbone` wrote, on the CPU in evaluation mode.

    Raises FileNotFoundError where there is none, ValueError where its files are damaged.
    """
    folder = Path(folder).expanduser()
    file = folder / "config.json"
    if not file.is_file() or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no backbone ({', '.join(BACKBONE_FILES[1:])}); "
            "make one: selfsight export TARGET OUT --to features"
        )
    described = _described(folder)
    if not isinstance(described, dict) or described.get("format") != _MARK:
        raise ValueError(
            f"{folder} holds an encoder, not a backbone; make one of it: selfsight export {folder} OUT --to features"
        )
    card = parse_card(json.dumps(described.get("encoder")), file)
    settings = TypeAdapter(FeatureSettings).validate_python(described.get("settings"))
    backbone = Backbone(build_encoder(card.encoder, card.image_size, card.channels), card, settings)
    try:
        backbone.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"the weights in {folder} are not of the backbone that it describes: {lines[:400]}") from error
    return backbone.eval()


def check_backbone(folder: Path, backbone: Backbone) -> float:
    """The largest difference of any map of the backbone read back from `folder`, relative where a map is above 1.

    Raises ValueError where it is more than `EXACT`, or a map is of another shape.
    """
    again = load_backbone(folder)
    side = max(backbone.size_divisible, *backbone.strides.values())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, backbone.card.channels, side, 2 * side, generator=generator)
    difference = 0.0
    with torch.no_grad():
        for (name, ours), found in zip(backbone(images).items(), again(images).values(), strict=True):
            if ours.shape != found.shape:
                raise ValueError(f"the export gives {name} of another shape: {tuple(found.shape)}, so it was removed")
            scale = max(1.0, float(ours.abs().max()))
            difference = max(difference, float((found - ours).abs().nan_to_num(torch.inf).max()) / scale)
    if not difference <= EXACT:
        raise ValueError(
            f"the maps of the export differ by up to {difference:.2g} from those of before: it was removed"
        )
    return difference


def _described(folder: Path) -> Any:
    return parse_json((folder / "config.json").read_text(encoding="utf-8", errors="replace"))


def usage(folder: Path, backbone: Backbone) -> str:
    """A few lines of Python that use the backbone."""
    strides = ", ".join(f"{name} of stride {stride}" for name, stride in backbone.strides.items())
    mean, std = (tuple(round(value, 6) for value in values) for values in (backbone.mean, backbone.std))
    return (
        "import selfsight\n"
        f"backbone = selfsight.backbone({str(folder)!r})  # a torch module; {backbone.out_channels} channels\n"
        f"maps = backbone(images)  # {strides}\n"
        f"# images (b, {backbone.card.channels}, h, w) of multiples of {backbone.size_divisible} px: pixels in 0 .. 1, "
        f"minus mean {mean}, by std {std}"
    )


def _readme(backbone: Backbone) -> str:
    learns = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    return (
        f"# A multi-scale backbone\n\n{backbone.card.encoder.family}, pretrained by {backbone.card.method} "
        f"({backbone.card.step} steps); {learns:,} parameters learn. What follows the encoder starts at random.\n\n"
        f"```python\n{usage(Path('THIS_FOLDER'), backbone)}\n```\n"
    )
