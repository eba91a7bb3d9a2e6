"""An encoder on disk: `model.safetensors` and `config.json`, which says all that is needed to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data_pipelines.files import parse_json
from pretrain.config import Config, EncoderConfig
from pretrain.encoders.base import Encoder
from pretrain.encoders.registry import build_encoder, family_of
from pretrain.methods.registry import METHODS, spec_of

CARD_KEY = "selfsight"  # of the header of an exported .safetensors file, where the card has no file of its own


@dataclass(frozen=True)
class EncoderCard:
    """What a saved encoder is, how its images are normalised, and how it came about."""

    encoder: EncoderConfig
    image_size: tuple[int, int]  # h, w in px
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str
    headline: Literal["class", "mean"] | None  # which feature the headline probe reads; None: the model's own
    step: int
    epoch: float
    run: str
    frames: Annotated[int, Field(ge=1)] = 1  # of a stack, of `channels` each; see `Frames`
    frame_stride: PositiveInt | None = None
    bits: Literal[8, 16] = 8  # of a channel of the images, whose full range is 0 .. 1 to mean and std

    @property
    def planes(self) -> int:
        """Channels of the images that it is built for: of all frames, where its family is one of stacks."""
        return self.channels * int(getattr(self.encoder, "frames", 1))


def headline_feature(config: Config) -> Literal["class", "mean"] | None:
    """For a method that trains the class token what the encoder's family says: that, the mean of the patch tokens, or
    None, its own pooled feature; None for one that trains whatever is pooled; for other methods the mean."""
    trained = spec_of(config.method).headline
    if trained == "pooled":
        return None
    return family_of(config.encoder).headline(config.encoder) if trained == "class" else "mean"


def timm_recipe(card: EncoderCard) -> dict[str, Any] | None:
    """Arguments of `timm.create_model` whose model takes the saved weights; None where timm has no such model."""
    if getattr(card.encoder, "spatial_transformer", None) is not None:
        return None
    return family_of(card.encoder).timm_recipe(card.encoder, card.image_size, card.channels)


def save_encoder(folder: Path, weights: dict[str, Tensor], card: EncoderCard) -> None:
    """Write an encoder's whole state dict and its card into a new `folder`.

    The keys are timm's where timm has the model: `timm.create_model(**config["timm"])` loads the file as it is.
    The mask token is left out: it plays no part in an encoder that sees whole images.
    """
    folder.mkdir(parents=True)
    inner = {key.partition(".")[2]: value for key, value in weights.items() if key != "mask_token"}
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in inner.items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    described = TypeAdapter(EncoderCard).dump_python(card, mode="json")
    described["timm"] = timm_recipe(card)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def fresh_encoder(card: EncoderCard) -> Encoder:
    """The encoder of `card` as its run started with it, weights from torch's current seed, in evaluation mode."""
    encoder = build_encoder(card.encoder, card.image_size, card.channels, frames=card.frames)
    if card.method in METHODS:
        METHODS[card.method].call("start", encoder)
    return encoder.eval()


def encoder_bytes(encoder: Encoder, card: EncoderCard) -> bytes:
    """A .safetensors file that says all by itself: the weights, and in its header the card and timm's recipe."""
    tensors = {key: value.detach().to("cpu", torch.float32) for key, value in encoder.inner().state_dict().items()}
    header = {"format": "pt", CARD_KEY: TypeAdapter(EncoderCard).dump_json(card).decode()}
    recipe = timm_recipe(card)
    if recipe is not None:
        header["timm"] = json.dumps(recipe)
    return save({key: value.contiguous() for key, value in tensors.items()}, metadata=header)


def read_card(place: Path) -> EncoderCard:
    """The card of an encoder folder, or of an exported file or folder, whose weights carry it in their header.

    Raises FileNotFoundError where there is no encoder, ValueError where the file is damaged or has no card.
    """
    file = place / "model.safetensors" if place.is_dir() else place
    if not file.is_file():
        raise FileNotFoundError(f"{place} holds no {file.name}, so it is not a saved encoder")
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); copy or export it again") from error
    if CARD_KEY in header:
        return parse_card(header[CARD_KEY], file)
    if place == file:
        raise ValueError(
            f"{file} has no entry {CARD_KEY!r} in its header, so it does not say which encoder it is; name a run, an "
            "encoder folder, or a file that `selfsight export` wrote"
        )
    if not (place / "config.json").is_file():
        raise FileNotFoundError(f"{place} holds no config.json, so it is not a saved encoder")
    return parse_card((place / "config.json").read_text(encoding="utf-8", errors="replace"), place / "config.json")


def parse_card(text: str, file: Path) -> EncoderCard:
    try:
        described = parse_json(text)
        if isinstance(described, dict):
            described.pop("timm", None)
        card = TypeAdapter(EncoderCard).validate_python(described)
    except ValueError as error:
        raise ValueError(f"the description of the encoder in {file} can't be read: {error}") from error
    if not len(card.mean) == len(card.std) == card.channels or not all(value > 0 for value in card.std):
        raise ValueError(
            f"{file} describes an encoder of {card.channels} channels with mean {card.mean} and std {card.std}; each "
            "channel needs a mean, and a std above 0"
        )
    if card.channels < 1 or min(card.image_size) < 1:
        raise ValueError(f"{file} describes an encoder of images of {card.channels} x {card.image_size} px")
    return card


def load_encoder(place: Path) -> tuple[Encoder, EncoderCard]:
    """The encoder saved at `place` (see `read_card`), on the CPU in evaluation mode, and its card."""
    card = read_card(place)
    encoder = build_encoder(card.encoder, card.image_size, card.channels, frames=card.frames)
    file = place / "model.safetensors" if place.is_dir() else place
    try:
        encoder.inner().load_state_dict(load_file(file), strict=True)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"the weights in {file} are not of the encoder that it describes: {lines[:400]}") from error
    return encoder.eval(), card
