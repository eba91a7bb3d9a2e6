"""Image and text side of a CLIP run for OpenCLIP: a folder that `open_clip.create_model("local-dir:...")` reads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from data_pipelines.files import staged, write_json
from pretrain.encoders.saved import EncoderCard, load_encoder
from pretrain.encoders.vit.clip import OPENCLIP_NAMES
from pretrain.text.saved import TextSide, has_text, load_text
from pretrain.text.vocabulary import FILE

FILES = ("open_clip_config.json", "open_clip_model.safetensors", FILE)
TOLERANCE = 1e-5
_IMAGES = 3  # of the comparison
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


@dataclass(frozen=True)
class ExportedPair:
    """What was written, how far embeddings of images and texts are from ours at most, and lines that use it."""

    path: Path
    num_bytes: int
    difference: float
    usage: str


def export_openclip(source: Path, out: Path, overwrite: bool = False) -> ExportedPair:
    """Write the encoder folder `source`, with its text side, as a folder `out`, and compare what OpenCLIP makes of it.

    Raises ValueError, before anything is written, where the folder has no text side, OpenCLIP has no such encoder, or
    its package is missing; FileExistsError for an `out` that is there and no earlier export. ValueError with nothing
    left behind where OpenCLIP's embeddings differ from ours.
    """
    if not has_text(source):
        raise ValueError(f"{source} has no text side: it is of no run of method clip; export it --to timm, for one")
    if find_spec("open_clip") is None:
        raise ValueError("the export is compared with what OpenCLIP reads of it: pip install open_clip_torch")
    if out.exists() and not (overwrite and out.is_dir() and {path.name for path in out.iterdir()} <= {*FILES}):
        raise FileExistsError(f"{out} exists; choose another place, or replace an earlier export (--overwrite)")
    encoder, card = load_encoder(source)
    side = load_text(source)
    described = openclip_config(card, side)
    with staged(out, overwrite) as folder:
        folder.mkdir()
        write_json(folder / FILES[0], described)
        save_file(openclip_weights(encoder.inner().state_dict(), side), folder / FILES[1])
        (folder / FILE).write_text(side.vocabulary.as_json(), encoding="utf-8")
        difference = _difference(folder, encoder, card, side)
        if difference > TOLERANCE:
            raise ValueError(
                f"OpenCLIP's embeddings of the export differ from ours by {difference:.2g}: it is not kept"
            )
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    usage = (
        f'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{out}")\n'
        f'# token ids of texts: tokenizers.Tokenizer.from_file("{out / FILE}"), between {side.vocabulary.start} and '
        f"{side.vocabulary.end}, filled with 0 up to {side.card.tower.context}"
    )
    return ExportedPair(out, num_bytes, difference, usage)


def openclip_config(card: EncoderCard, side: TextSide) -> dict[str, Any]:
    """OpenCLIP's description; ValueError for an encoder that its own ViT is not."""
    encoder: Any = card.encoder
    reason = _why_not(card)
    if reason is None and (encoder.mlp == "quick_gelu") != (side.card.tower.activation == "quick_gelu"):
        reason = "has another activation than the text tower, and OpenCLIP's have the same"
    if reason is not None:
        raise ValueError(f"the encoder {reason}: OpenCLIP has no such image tower")
    dim, depth, heads = encoder.shape
    tower = side.card.tower
    model: dict[str, Any] = {
        "embed_dim": side.card.embed_dim,
        "quick_gelu": encoder.mlp == "quick_gelu",
        "vision_cfg": {
            "image_size": list(card.image_size),
            "layers": depth,
            "width": dim,
            "head_width": dim // heads,
            "patch_size": encoder.patch,
            "mlp_ratio": (encoder.hidden or 4 * dim) / dim,
            "no_ln_pre": not encoder.pre_norm,
            "pool_type": "tok" if encoder.pool == "class" else "avg",
            "norm_kwargs": {"eps": encoder.norm_eps},
        },
        "text_cfg": {
            "context_length": tower.context,
            "vocab_size": side.vocabulary.size,
            "width": tower.dim,
            "heads": tower.heads,
            "layers": tower.depth,
            "no_causal_mask": not tower.causal,
            "pool_type": {"end": "argmax"}.get(tower.pool, tower.pool),
        },
    }
    if side.logit_bias is not None:
        model["init_logit_bias"] = float(side.logit_bias.detach())
    return {"model_cfg": model, "preprocess_cfg": {"mean": list(card.mean), "std": list(card.std)}}


def _why_not(card: EncoderCard) -> str | None:
    encoder: Any = card.encoder
    if encoder.family != "vit":
        return f"is of family {encoder.family}"
    for key, allowed in {
        "stem": ("patch",), "positions": ("learned", "sincos"), "class_token": (True,), "registers": (0,),
        "distillation_token": (False,), "layer_scale": (None,), "inner_norm": (False,), "mlp": ("gelu", "quick_gelu"),
        "spatial_transformer": (None,),
    }.items():  # fmt: skip
        if (value := getattr(encoder, key)) not in allowed:
            return f"has {key}={value}"
    return f"reads {card.channels} channels" if card.channels != 3 else None


def openclip_weights(encoder: dict[str, Tensor], side: TextSide) -> dict[str, Tensor]:
    """OpenCLIP's state dict, of the encoder's inner one (timm's names). The patches' bias goes into their positions."""
    found = {f"visual.{_theirs(name)}": value.detach() for name, value in encoder.items()}
    positions = rearrange(found.pop("visual.pos_embed"), "1 n d -> n d").clone()
    bias = found.pop("visual.patch_embed.proj.bias", None)
    if bias is not None:
        positions[1:] += bias
    found["visual.positional_embedding"] = positions
    found["visual.class_embedding"] = rearrange(found.pop("visual.cls_token"), "1 1 d -> d")
    found["visual.proj"] = rearrange(side.image_projection.weight.detach(), "e d -> d e")
    found |= {name: value for name, value in side.text.state_dict().items() if name.startswith(_TEXT)}
    found["logit_scale"] = side.logit_scale.detach().squeeze(0)
    if side.logit_bias is not None:
        found["logit_bias"] = side.logit_bias.detach().squeeze(0)
    return {name: value.float().contiguous().clone() for name, value in found.items()}


def _theirs(name: str) -> str:
    if name.startswith("norm."):
        return name.replace("norm.", "ln_post.")
    for ours, theirs in OPENCLIP_NAMES:
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
def _difference(folder: Path, encoder: Any, card: EncoderCard, side: TextSide) -> float:
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, 3, *card.image_size, generator=generator)
    tokens = torch.from_numpy(
        side.vocabulary.encode(["a", "some words", "more words than before"], side.card.tower.context)
    )
    ours = side.of_images(encoder(images).pooled), F.normalize(side.text(tokens), dim=1)
    theirs = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
