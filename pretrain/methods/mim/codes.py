"""The codes of a frozen tokenizer as the target (BEiT, Bao et al. 2022; BEiT v2, Peng et al. 2022)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.methods.frozen import Frozen
from pretrain.methods.mim.target import Target, at_hidden
from pretrain.stream.hidden import hidden_index
from pretrain.tokenizers.card import find_tokenizer
from pretrain.tokenizers.saved import load_tokenizer


class Codes(Target):
    """The code that a tokenizer gives, on the target crop, to each hidden mask unit, with a cross-entropy loss."""

    def __init__(self, tokenizer: str, unit: int) -> None:
        super().__init__()
        folder = find_tokenizer(Path(tokenizer).expanduser())
        network, card = load_tokenizer(folder)
        self.tokenizer = Frozen(network)
        self.cell, self.num_outputs = unit, card.vocab_size
        with (folder / "model.safetensors").open("rb") as file:
            self._checksum = hashlib.file_digest(file, "sha256").hexdigest()

    def blocks(self) -> list[nn.Module]:
        return self.tokenizer.blocks()

    def wanted(self, images: Tensor, batch: Batch) -> Tensor:
        """The codes (n,) of the hidden units, those of the first image first."""
        codes, hidden = self.tokenizer(batch["target_crops"]), batch["token_mask"]
        if codes.shape != hidden.shape:
            raise ValueError(
                f"the tokenizer gives {codes.shape[1]}x{codes.shape[2]} codes and the mask has "
                f"{hidden.shape[1]}x{hidden.shape[2]} units; views.target_crop.size decides the former"
            )
        return codes.reshape(-1).index_select(0, hidden_index(batch))

    def loss(
        self, head: nn.Module, cells: Tensor, wanted: Tensor, batch: Batch, mean_hidden: Tensor
    ) -> dict[str, Tensor]:
        logits = head(at_hidden(cells, batch)).float()  # the hidden ones only: their number varies
        return {
            "loss": F.cross_entropy(logits, wanted, reduction="sum") / mean_hidden,
            "accuracy": (logits.argmax(dim=-1) == wanted).sum() / mean_hidden,
        }

    def pinned(self) -> dict[str, str]:
        return {"method.tokenizer": self._checksum}
