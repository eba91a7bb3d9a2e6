"""The text side of an encoder folder: what learned beside the encoder to compare its images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipelines.files import parse_json, write_json
from pretrain.encoder_folder import HEADS_FILE
from pretrain.text.settings import TextConfig
from pretrain.text.tower import TextTower
from pretrain.text.vocabulary import FILE, Vocabulary

CARD = "text.json"
_AT_ONCE = 256


@dataclass(frozen=True)
class TextCard:
    """What a text side is: the tower's settings, the width of what images and texts are compared in, the width of the
    image features that are projected there, the loss that it learned by, and where captions were (`Captions`)."""

    tower: TextConfig
    embed_dim: int
    image_dim: int
    loss: str
    captions: str = "txt"


class TextSide(nn.Module):
    """Images' pooled features and texts, brought into one space."""

    def __init__(self, card: TextCard, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.card, self.vocabulary = card, vocabulary
        self.text = TextTower(card.tower, vocabulary.size, card.embed_dim, vocabulary.end)
        self.image_projection = nn.Linear(card.image_dim, card.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.logit_bias = nn.Parameter(torch.zeros(1)) if card.loss == "siglip" else None

    @torch.no_grad()
    def of_images(self, pooled: Tensor) -> Tensor:
        """(n, embed_dim) of length 1, of pooled features (n, image_dim)."""
        return F.normalize(self.image_projection(pooled.to(self.logit_scale.device).float()), dim=1)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """(n, embed_dim) of length 1."""
        tokens = torch.from_numpy(self.vocabulary.encode(texts, self.card.tower.context))
        device = self.logit_scale.device
        parts = [F.normalize(self.text(part.to(device)), dim=1) for part in tokens.split(_AT_ONCE)]
        return torch.cat(parts)


def save_text(folder: Path, weights: dict[str, Tensor], card: TextCard, vocabulary: Vocabulary) -> None:
    """Put a text side beside the encoder that `folder` has; `weights` by the names of `TextSide`."""
    save_file({key: value.detach().cpu().float().contiguous() for key, value in weights.items()}, folder / HEADS_FILE)
    write_json(folder / CARD, asdict(card))
    (folder / FILE).write_text(vocabulary.as_json(), encoding="utf-8")


def has_text(folder: Path) -> bool:
    """Whether an encoder folder has a text side."""
    return all((folder / name).is_file() for name in (CARD, FILE, HEADS_FILE))


def read_vocabulary(folder: Path) -> Vocabulary:
    """Of a folder that has one. ValueError where it is damaged."""
    try:
        return Vocabulary((folder / FILE).read_text(encoding="utf-8"))
    except Exception as error:  # of `tokenizers`, which raises plain ones
        raise ValueError(f"the vocabulary in {folder / FILE} can't be read: {error}") from error


def load_text(folder: Path) -> TextSide:
    """The text side of an encoder folder, on the CPU in evaluation mode.

    Raises ValueError where it is damaged.
    """
    vocabulary = read_vocabulary(folder)
    try:
        card = TypeAdapter(TextCard).validate_python(parse_json((folder / CARD).read_bytes()))
        made = TextSide(card, vocabulary)
        made.load_state_dict(load_file(folder / HEADS_FILE))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the text side in {folder} can't be read: {' '.join(str(error).split())[:300]}") from error
    return made.eval()
