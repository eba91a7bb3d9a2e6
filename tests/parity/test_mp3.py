"""MP3 against a recorded reading of it, lucidrains', which attends to embedded patches; see test_parity.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from parity_files import recorded, relative_error
from torch import Tensor, nn

from pretrain.encoders.vit.config import VitConfig
from pretrain.encoders.vit.encoder import VitEncoder
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.mp3.config import Mp3Config, counts
from pretrain.methods.mp3.method import PositionPrediction

#: Of ours, by the name of theirs; `vit.transformer.layers.N.` is `encoder.vit.blocks.N.`.
OUTSIDE = {
    "vit.to_patch_embedding.1": "encoder.vit.patch_embed.norm_pixels",
    "vit.to_patch_embedding.2": "encoder.vit.patch_embed.proj",
    "vit.to_patch_embedding.3": "encoder.vit.patch_embed.norm",
    "mlp_head.0": "encoder.vit.norm",
    "mlp_head.1": "head",
}
INSIDE = {"0.norm": "norm1", "0.to_out.0": "attn.proj", "1.net.0": "norm2", "1.net.1": "mlp.fc1", "1.net.4": "mlp.fc2"}


def renamed(theirs: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Their tensors under our names. Their pixels of a patch lie in the order (row, column, channel)."""
    ours = {}
    for key, value in theirs.items():
        stem, _, kind = key.rpartition(".")
        if stem in OUTSIDE:
            ours[f"{OUTSIDE[stem]}.{kind}"] = value
        elif stem.startswith("vit.transformer.layers."):
            number, _, part = stem.removeprefix("vit.transformer.layers.").partition(".")
            if part in INSIDE:
                ours[f"encoder.vit.blocks.{number}.{INSIDE[part]}.{kind}"] = value
            elif part == "0.to_q":
                both = torch.cat([value, theirs[key.replace("to_q", "to_kv")]])
                ours[f"encoder.vit.blocks.{number}.attn.qkv.weight"] = both
    side = config["patch_size"]
    pixels = "encoder.vit.patch_embed"
    for kind in ("weight", "bias"):
        name = f"{pixels}.norm_pixels.{kind}"
        ours[name] = rearrange(ours[name], "(p q c) -> (c p q)", p=side, q=side)
    name = f"{pixels}.proj.weight"
    ours[name] = rearrange(ours[name], "d (p q c) -> d c p q", p=side, q=side)
    return ours


def test_mp3_of_embedded_keys() -> None:
    record = recorded("mp3_lucidrains.pt")
    config, inputs = record["config"], record["inputs"]
    assert config["dim_head"] * config["heads"] == config["dim"]
    shape = {"dim": config["dim"], "depth": config["depth"], "heads": config["heads"], "patch": config["patch_size"]}
    settings = VitConfig(**shape, positions="none", stem="norm", class_token=False, pool="mean")
    side = config["image_size"]
    section = Mp3Config(unseen_ratio=config["masking_ratio"], keys="embedded")
    plain = Normalisation((0.0,) * 3, (1.0,) * 3)
    method = PositionPrediction(section, VitEncoder(settings, (side, side)), (side, side), plain, Timeline(1, 1.0))
    for block in method.encoder.vit.blocks:
        block.mlp = _mlp(block.mlp, config["mlp_dim"])
    for part in method.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-5  # theirs
    missing, unexpected = method.load_state_dict(renamed(record["state_dict"], config), strict=False)
    assert not unexpected
    assert set(missing) <= {"mean", "std"} | {f"encoder.vit.blocks.{n}.attn.qkv.bias" for n in range(config["depth"])}
    for block in method.encoder.vit.blocks:
        nn.init.zeros_(block.attn.qkv.bias)  # theirs has none

    images, tokens = inputs["x"], inputs["noise"].shape[1]
    grid = side // config["patch_size"]
    assert counts(section, tokens)[0] == inputs["masked_indices"].shape[1]
    unseen = torch.zeros(len(images), tokens, dtype=torch.bool).scatter(1, inputs["masked_indices"], value=True)
    unseen = rearrange(unseen, "b (h w) -> b h w", h=grid)
    logits = method.logits(images, unseen, torch.ones_like(unseen))
    torch.testing.assert_close(logits, record["outputs"]["logits"], atol=1e-4, rtol=0)
    where = torch.arange(tokens).expand(len(images), -1)
    loss = F.cross_entropy(rearrange(logits, "b n k -> (b n) k"), rearrange(where, "b n -> (b n)"))
    torch.testing.assert_close(loss, record["loss"], rtol=1e-5, atol=0)
    loss.backward()
    found = dict(method.named_parameters())
    expected = renamed({**record["state_dict"], **record["grads"]}, config)
    for name, gradient in expected.items():
        assert relative_error(found[name].grad, gradient) < 1e-3, name


def _mlp(mlp: nn.Module, width: int) -> nn.Module:
    """The MLP with so many hidden units."""
    mlp.fc1 = nn.Linear(mlp.fc1.in_features, width)
    mlp.fc2 = nn.Linear(width, mlp.fc2.out_features)
    return mlp
