"""Where the encoder of a run, a checkpoint or an export lies (imports no torch: a wrong name is told at once)."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipelines.files import read_json

ENCODER_FILES = ("config.json", "model.safetensors")
HEADS_FILE = "heads.safetensors"  # what the method around an encoder learned
TIMM_PREFIX = "timm:"


def check_target(target: str) -> None:
    """Refuse a name of no encoder; whether timm knows a model, only timm can say.

    Raises FileNotFoundError where there is none, ValueError for what can't be a timm model's name.
    """
    if not target.startswith(TIMM_PREFIX):
        find_encoder(Path(target).expanduser())
    elif not re.fullmatch(r"[A-Za-z0-9_.:/@-]+", target.removeprefix(TIMM_PREFIX)):
        raise ValueError(f"{target!r} names no model; write timm:NAME, such as timm:vit_small_patch16_224.augreg_in21k")


def find_encoder(folder: Path) -> Path:
    """The encoder folder that `folder` is or holds: a run's final one, or else its latest checkpoint's.

    An exported .safetensors file is an encoder as well, and is returned as it is.
    """
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        hint = f"; {folder.parent} holds {', '.join(near[:10])}" if near else ""
        raise FileNotFoundError(
            f"{folder} is not a folder{hint}. Name a run, a checkpoint, an encoder folder, an exported "
            ".safetensors file, or timm:MODEL"
        )
    candidates = [folder, folder / "encoder"]
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        candidates.append(latest.parent / latest.read_text(encoding="utf-8").strip() / "encoder")
    for candidate in candidates:
        if all((candidate / name).is_file() for name in ENCODER_FILES) and not is_tokenizer(candidate):
            return candidate
    tokenizers = [folder, *(candidate.with_name("tokenizer") for candidate in candidates[1:])]
    if any(is_tokenizer(place) for place in tokenizers):
        raise FileNotFoundError(
            f"{folder} holds a tokenizer, which gives codes to predict and no features: there is "
            "no encoder to load or probe. Pretrain on its codes (method.target=codes) and name that run"
        )
    found = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"no encoder in {folder}: it holds {', '.join(found[:10]) or 'nothing'}, and an encoder is a folder with "
        f"{' and '.join(ENCODER_FILES)}. A run has one from its first checkpoint on (see checkpoint.every_steps)"
    )


def is_tokenizer(folder: Path) -> bool:
    """Whether `folder` is a saved tokenizer itself."""
    described = read_json(folder / "config.json")
    return (
        isinstance(described, dict)
        and {"kind", "vocab_size"} <= described.keys()
        and (folder / "model.safetensors").is_file()
    )
