"""A tokenizer on disk: `model.safetensors` and `config.json`, which says all that is needed to use it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pretrain.methods.registry import METHODS
from pretrain.tokenizers.card import TokenizerCard, read_card


def save_tokenizer(folder: Path, weights: dict[str, Tensor], card: TokenizerCard) -> None:
    """Write a tokenizer's whole state dict and its card into a new `folder`."""
    folder.mkdir(parents=True)
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in weights.items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    described = TypeAdapter(TokenizerCard).dump_python(card, mode="json")
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> tuple[nn.Module, TokenizerCard]:
    """The tokenizer saved in `folder`, on the CPU in evaluation mode, and its card.

    Called with crops (b, c, h, w) uint8 or uint16, it gives codes (b, h / stride, w / stride) int64 below `vocab_size`.
    """
    card = read_card(folder)
    tokenizer = METHODS[card.kind].call("tokenizer", card)
    tokenizer.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return tokenizer.eval(), card
