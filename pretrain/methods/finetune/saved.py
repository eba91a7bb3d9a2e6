"""A classifier on disk: an encoder folder, with the head and what its outputs mean beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipelines.files import parse_json, write_json
from pretrain.encoders import Encoder
from pretrain.encoders.saved import EncoderCard, load_encoder, save_encoder
from pretrain.methods.finetune.network import Head, classify

HEAD_FILE, HEAD_CARD = "head.safetensors", "head.json"


@dataclass(frozen=True)
class HeadCard:
    """What a head gives, and what it reads.

    classes: the names of its outputs. pool, fc_norm: see `network.Head`. target_mean, target_std: of numbers, whose
    outputs are standardised. resize: short side in px before the centre crop; None: the crop's * 256 / 224.
    """

    task: str
    classes: tuple[str, ...]
    pool: str | None
    fc_norm: bool
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    resize: int | None = None


def save_classifier(
    folder: Path, encoder: dict[str, Tensor], head: dict[str, Tensor], card: EncoderCard, head_card: HeadCard
) -> None:
    """Write whole state dicts and what they are into a new `folder`, which is an encoder folder as well."""
    save_encoder(folder, encoder, card)
    save_file({key: value.detach().cpu().float().contiguous() for key, value in head.items()}, folder / HEAD_FILE)
    write_json(folder / HEAD_CARD, asdict(head_card))


class Classifier(nn.Module):
    """Normalised images (b, c, h, w) to logits (b, k), of pixels (b, k, h, w), or numbers as they were labelled."""

    def __init__(self, encoder: Encoder, head: Head, card: EncoderCard, head_card: HeadCard) -> None:
        super().__init__()
        self.encoder, self.head, self.card, self.head_card = encoder, head, card, head_card
        self.register_buffer("target_mean", torch.tensor(head_card.target_mean))
        self.register_buffer("target_std", torch.tensor(head_card.target_std))

    def forward(self, images: Tensor) -> Tensor:
        outputs = classify(self.encoder, self.head, images)
        return outputs * self.target_std + self.target_mean if self.head_card.target_std else outputs


def is_classifier(folder: Path) -> bool:
    """Whether an encoder folder has a head beside its encoder."""
    return (folder / HEAD_FILE).is_file() and (folder / HEAD_CARD).is_file()


def load_classifier(folder: Path) -> Classifier:
    """The classifier saved in `folder`, on the CPU in evaluation mode. ValueError where it is damaged."""
    encoder, card = load_encoder(folder)
    try:
        head_card = TypeAdapter(HeadCard).validate_python(parse_json((folder / HEAD_CARD).read_bytes()))
        head = Head(encoder.dim, len(head_card.classes), head_card.pool, head_card.fc_norm)
        head.load_state_dict(load_file(folder / HEAD_FILE))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the head in {folder} can't be read: {' '.join(str(error).split())[:300]}") from error
    return Classifier(encoder, head, card, head_card).eval()
