"""Tensors out of a stranger's checkpoint file, and nothing else."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def read_tensors(file: Path) -> Any:
    """A checkpoint's contents, tensors and plain values only: no code of the file is run."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # what official checkpoints hold beside tensors: the command line, and SimMIM's and Swin's configuration, of
        # yacs' class, a dictionary; torch's unpickler fills no subclass of dict but this one
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle's, zip's and its own errors for files it will not read
        raise ValueError(
            f"{file} can't be read as tensors ({type(error).__name__}: {_reason(error)}). Is the file whole? Files "
            "that hold objects of other code are refused; where you trust one, save only its state dict with "
            "safetensors"
        ) from error


def _reason(error: Exception) -> str:
    """What is wrong, without torch's advice to read the file with code in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("GLOBAL", "Unsupported", "Trying", "Can only"))]
    return (told or lines or ["no message"])[0][:200]
