"""One MAE step: our method under DeepSpeed against a plain fp32 loop around a model written like the authors'.

The plain form encodes with explicit gathers, unfused attention and a torch loop; model, batch and data are the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _compare import compare
from einops import rearrange
from timm.layers import set_fused_attn

from pretrain.config.load import parse_config
from pretrain.encoders.patches import patchify
from pretrain.engines.engine import build_engine, initialise_distributed
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.registry import build_method

BATCH = 64
CONFIG = {
    "name": "bench",
    "data": {"train": "unused"},
    "views": {"global_crops": [{"size": 32}]},
    "encoder": {"family": "vit", "dim": 192, "depth": 6, "heads": 3, "patch": 4, "positions": "sincos", "pool": "mean"},
    "method": {"name": "mae", "mask": {"unit": 4}, "decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3},
    "optim": {"lr": 1e-4},
    "train": {"steps": 100, "batch_size": BATCH},
    "engine": {"device": "cpu"},
}


def plain_step(method: torch.nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> None:
    """The authors' step in words of plain torch: noise, argsort, gather, blocks, decode all, loss."""
    vit = method.encoder.vit
    tokens = rearrange(vit.patch_embed(images), "b h w d -> b (h w) d") + vit.pos_embed[:, 1:]
    batch, length, dim = tokens.shape
    keep = int(length * 0.25)
    shuffle = torch.rand(batch, length).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    visible = tokens.gather(1, shuffle[:, :keep, None].expand(-1, -1, dim))
    tokens = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(batch, -1, -1), visible], dim=1)
    for block in vit.blocks:
        tokens = block(tokens)
    decoded = method.decoder_embed(vit.norm(tokens))
    missing = method.mask_token.expand(batch, length - keep, -1)
    full = torch.cat([decoded[:, 1:], missing], dim=1)
    full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[-1])) + method.decoder_positions
    full = torch.cat([decoded[:, :1], full], dim=1)
    for block in method.decoder_blocks:
        full = block(full)
    predicted = method.decoder_pred(method.decoder_norm(full))[:, 1:]
    target = patchify(images, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = torch.ones(batch, length)
    hidden[:, :keep] = 0
    hidden = hidden.gather(1, restore)
    loss = ((predicted - target).square().mean(-1) * hidden).sum() / hidden.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main() -> None:
    config = parse_config({**CONFIG, "runs": str(Path(tempfile.gettempdir()))})
    initialise_distributed(torch.device("cpu"))
    normalisation, timeline = Normalisation((0.5,) * 3, (0.25,) * 3), Timeline(100, 10.0)
    torch.manual_seed(0)
    set_fused_attn(False)
    plain = build_method(config, normalisation, timeline)
    set_fused_attn(True)
    method = build_method(config, normalisation, timeline)
    engine = build_engine(config, method, torch.device("cpu"), 1)
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-4)
    crops = torch.randint(0, 256, (BATCH, 1, 3, 32, 32), dtype=torch.uint8)
    dropped = torch.ones(BATCH, 64, dtype=torch.bool)
    dropped[:, :16] = False
    batch = {"global_crops": crops, "drop_mask": dropped.view(BATCH, 8, 8)}
    images = plain.normalise(crops[:, 0])

    def ours() -> None:
        engine.backward(engine(batch, 0)["loss"])
        engine.step()

    compare("MAE training step", "images", BATCH, ours, lambda: plain_step(plain, optimizer, images), turns=9)


if __name__ == "__main__":
    main()
