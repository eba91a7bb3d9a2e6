"""An encoder on disk: `model.safetensors` and `config.json`, which says all that is needed to use it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor

from pretrain.encoders import Encoder, build_encoder, pvt_v2, timm_model, twins
from pretrain.encoders.base import xavier_initialise
from pretrain.schema import (
    BeitConfig,
    Config,
    EncoderConfig,
    PvtConfig,
    PvtV2Config,
    SwinConfig,
    TimmConfig,
    TwinsConfig,
    VitConfig,
)


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


def headline_feature(config: Config) -> Literal["class", "mean"] | None:
    """The class token for DINO on an encoder that has one, the mean of the patch tokens otherwise.

    None for DINO on a timm model or with a distillation token: the pooled feature, which was trained.
    """
    encoder = config.encoder
    own = isinstance(encoder, TimmConfig) or (isinstance(encoder, VitConfig) and encoder.distillation_token)
    if config.method.name == "dino" and own:
        return None
    has_class_token = (
        (isinstance(encoder, VitConfig) and encoder.class_token)
        or isinstance(encoder, BeitConfig)
        or (isinstance(encoder, PvtConfig) and encoder.reduction == "conv")
    )
    return "class" if config.method.name == "dino" and has_class_token else "mean"


def timm_recipe(card: EncoderCard) -> dict[str, Any] | None:
    """Arguments of `timm.create_model` whose model takes the saved weights; None where timm has no such model."""
    config = card.encoder
    shared = {"img_size": list(card.image_size), "in_chans": card.channels, "num_classes": 0}
    if isinstance(config, SwinConfig):
        dim, depths, heads = config.shape
        own = {"embed_dim": dim, "depths": list(depths), "num_heads": list(heads)}
        own |= {"patch_size": config.patch, "window_size": config.window}
        name = "swin_tiny_patch4_window7_224" if config.version == 1 else "swinv2_tiny_window8_256"
        return {"model_name": name, **shared, **own}
    if isinstance(config, PvtV2Config):
        del shared["img_size"]  # it takes any
        return {**pvt_v2.timm_arguments(config), **shared}
    if isinstance(config, TwinsConfig):
        return {**twins.timm_arguments(config), **shared}
    if isinstance(config, TimmConfig):
        return timm_model.timm_arguments(config, card.image_size, card.channels)
    if isinstance(config, BeitConfig):
        dim, depth, heads = config.shape
        own = {"embed_dim": dim, "depth": depth, "num_heads": heads, "patch_size": config.patch}
        own |= {"use_abs_pos_emb": config.absolute_positions, "init_values": config.layer_scale}
        own |= {"use_shared_rel_pos_bias": config.relative_positions == "shared"}
        own |= {"use_rel_pos_bias": config.relative_positions == "per_block", "use_fc_norm": config.pooled_norm}
        own |= {"global_pool": "token" if config.pool == "class" else "avg"}
        return {"model_name": "beit_base_patch16_224", **shared, **own}
    if not isinstance(config, VitConfig) or config.stem == "conv":
        return None
    dim, depth, heads = config.shape
    own = {"embed_dim": dim, "depth": depth, "num_heads": heads, "patch_size": config.patch, "fc_norm": False}
    own |= {"class_token": config.class_token, "reg_tokens": config.registers, "init_values": config.layer_scale}
    own |= {"global_pool": "token" if config.pool == "class" else "avg"}
    if config.distillation_token:
        own["global_pool"] = "token"  # it knows no other, so with pool=mean its pooled feature is not ours
        return {"model_name": "deit_base_distilled_patch16_224", **shared, **own}
    return {"model_name": "vit_base_patch16_224", **shared, **own}


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
    encoder = build_encoder(card.encoder, card.image_size, card.channels)
    if card.method == "mae":
        xavier_initialise(encoder)
    return encoder.eval()


def read_card(folder: Path) -> EncoderCard:
    """The card of the encoder saved in `folder`; FileNotFoundError where a file of it is missing."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, so it is not a saved encoder")
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described.pop("timm", None)
    return TypeAdapter(EncoderCard).validate_python(described)


def load_encoder(folder: Path) -> tuple[Encoder, EncoderCard]:
    """The encoder saved in `folder`, on the CPU in evaluation mode, and its card."""
    card = read_card(folder)
    encoder = build_encoder(card.encoder, card.image_size, card.channels)
    encoder.inner().load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return encoder.eval(), card
