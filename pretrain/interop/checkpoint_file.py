"""Tensors out of a stranger's checkpoint file, and nothing else."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from data_pipelines.files import read_json
from pretrain.encoders.hub import told_by
from pretrain.encoders.saved import CARD_KEY

#: What the Hub calls a model's weights, and the parts of large ones.
HUB_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD = r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)"


def read_tensors(file: Path) -> Any:
    """A checkpoint's contents, tensors and plain values only: no code of the file is run.

    Beside NAME.master may lie NAME.rank0, NAME.rank1, ..., with the tensors that each rank had for itself (as the
    authors' of Swin-MoE save their experts): those of all ranks are put one behind the other along the first axis.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    if file.name.endswith(".index.json"):
        return _of_parts(file)
    whole = _read(file)
    if file.suffix == ".master":
        inner = whole.get("model", whole)
        inner |= _of_ranks(file)
    return whole


def read_told(file: Path) -> dict[str, Any]:
    """What the config.json and preprocessor_config.json of transformers beside weights tell; see `hub.told_by`."""
    if file.name not in HUB_WEIGHTS and not re.fullmatch(SHARD, file.name):
        return {}
    config, preprocessor = (read_json(file.with_name(name)) for name in ("config.json", "preprocessor_config.json"))
    if not isinstance(config, dict):
        return {}
    if {"encoder", "image_size", "headline"} <= config.keys():
        raise ValueError(
            f"{file.parent} is an encoder folder already: probe it, export it, or set init_from={file.parent}"
        )
    return told_by(config, preprocessor if isinstance(preprocessor, dict) else {})


def is_export(file: Path) -> bool:
    """Whether `file` is one that `selfsight export` wrote, with the card of its encoder in its header."""
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return CARD_KEY in (opened.metadata() or {})
    except SafetensorError:  # `read_tensors` says why
        return False


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder as the Hub has them; of several parts, their index."""
    for name in HUB_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    held = sorted(path.name for path in folder.iterdir())
    raise FileNotFoundError(
        f"{folder} holds {', '.join(held[:8]) or 'nothing'}; name the file of weights, or a folder with one of "
        f"{', '.join(HUB_WEIGHTS)}"
    )


def _of_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, each of which lies beside it."""
    described = read_json(index)
    placed = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index} is no index of weights: it has no weight_map of keys and files")
    whole: dict[str, Tensor] = {}
    for name in dict.fromkeys(placed.values()):
        if not re.fullmatch(SHARD, name):
            raise ValueError(f"{index} names {name!r}, which is no file of weights beside it")
        whole |= _read(index.with_name(name))
    missing = [key for key in placed if key not in whole]
    if missing:
        raise ValueError(f"{index} names {missing[0]}, which is in none of its files")
    return whole


def _of_ranks(master: Path) -> dict[str, Tensor]:
    found = {
        int(number[1]): path
        for path in master.parent.iterdir()
        if path.stem == master.stem and (number := re.fullmatch(r"\.rank(\d+)", path.suffix))
    }
    missing = sorted(set(range(len(found))) - set(found))
    if missing:
        raise ValueError(f"beside {master} there are the pieces of {len(found)} ranks, and none of rank {missing[0]}")
    pieces = []
    for _, path in sorted(found.items()):
        piece = _read(path)
        piece = piece.get("model", piece)
        pieces.append({key: value for key, value in piece.items() if isinstance(value, Tensor)})
        if pieces[-1].keys() != pieces[0].keys():
            raise ValueError(f"{path} holds other tensors than rank 0's piece")
    return {key: torch.cat([piece[key] for piece in pieces]) for key in (pieces[0] if pieces else {})}


def _read(file: Path) -> Any:
    if _is_script(file):
        raise ValueError(
            f"{file} is a TorchScript archive, as OpenAI released CLIP: it holds code, which is not read. Take the "
            "same weights from the Hub (openai/clip-vit-*: model.safetensors); or, where you trust the file, save "
            "torch.jit.load(FILE, map_location='cpu').state_dict() with safetensors"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # what official checkpoints hold beside tensors: the command line, and SimMIM's and Swin's configuration, of
        # yacs' class, a dictionary; torch's unpickler fills no subclass of dict but this one
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zip's and its own errors for files it will not read
        raise ValueError(
            f"{file} can't be read as tensors ({type(error).__name__}: {_reason(error)}). {_hint(error)}Files "
            "that hold objects of other code are refused; where you trust one, save only its state dict with "
            "safetensors"
        ) from error


def _is_script(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _hint(error: Exception) -> str:
    if "lightly_train" in str(error):
        return "Export it with lightly_train.export(..., format='torch_state_dict'), and import what that writes. "
    return "Is the file whole? "


def _reason(error: Exception) -> str:
    """What is wrong, without torch's advice to read the file with code in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("GLOBAL", "Unsupported", "Trying", "Can only"))]
    return (told or lines or ["no message"])[0][:200]
