"""One DINO step, ViT-S/16 on 2 x 224 + 8 x 96 px: our method under DeepSpeed against the authors' step, both in fp32.

The authors' form: a pass of the student for each size, unfused attention, the loss in a loop over pairs of views, the
teacher's average one parameter after the other. Model, data and optimizer are the same.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from _compare import compare
from einops import rearrange
from timm.layers import set_fused_attn
from torch import Tensor, nn

from pretrain.config.load import parse_config
from pretrain.engines.engine import build_engine, initialise_distributed
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Normalisation
from pretrain.methods.registry import build_method

GLOBAL = {"size": 224}


def config_of(batch: int, prototypes: int, depth: int) -> dict:
    return {
        "name": "bench",
        "runs": tempfile.gettempdir(),
        "data": {"train": "unused"},
        "views": {"global_crops": [GLOBAL, GLOBAL], "local_crops": {"count": 8, "size": 96}},
        "encoder": {"family": "vit", "size": "small", "patch": 16, "depth": depth},
        "method": {"name": "dino", "prototypes": prototypes, "teacher_momentum": 0.996},
        "optim": {"lr": 1e-4},
        "train": {"steps": 100, "batch_size": batch},
        "engine": {"device": "cpu"},
    }


def plain_step(method: nn.Module, optimizer: torch.optim.Optimizer, sizes: list[Tensor], count: int) -> None:
    """The authors' step in words of plain torch; `sizes` are crops of one size each, view by view."""
    with torch.no_grad():
        teacher = method.teacher["head"](method.teacher["encoder"](sizes[0]).pooled)
        targets = ((teacher - method.center) / 0.04).softmax(dim=-1).chunk(2)
    pooled = torch.cat([method.encoder(images).pooled for images in sizes])
    student = (method.head(pooled) / 0.1).chunk(len(pooled) // count)
    loss, terms = 0.0, 0
    for which, target in enumerate(targets):
        for view, guess in enumerate(student):
            if view != which:
                loss = loss + (-target * guess.log_softmax(dim=-1)).sum(dim=-1).mean()
                terms += 1
    optimizer.zero_grad()
    (loss / terms).backward()
    optimizer.step()
    with torch.no_grad():
        method.center.mul_(0.9).add_(teacher.mean(dim=0, keepdim=True) * 0.1)
        for name, slow in method.teacher.items():
            for own, other in zip(slow.parameters(), getattr(method, name).parameters(), strict=False):
                own.mul_(0.996).add_(other.detach() * (1 - 0.996))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prototypes", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    config = parse_config(config_of(args.batch, args.prototypes, args.depth))
    initialise_distributed(torch.device("cpu"))
    normalisation, timeline = Normalisation((0.5,) * 3, (0.25,) * 3), Timeline(100, 10.0)
    torch.manual_seed(0)
    set_fused_attn(False)
    plain = build_method(config, normalisation, timeline).train()
    plain.encoder.packs = False
    for block in plain.encoder.blocks():
        block.attn.fused_attn = False
    set_fused_attn(True)
    method = build_method(config, normalisation, timeline)
    engine = build_engine(config, method, torch.device("cpu"), 1)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], 1e-4)
    batch = {
        "global_crops": torch.randint(0, 256, (args.batch, 2, 3, 224, 224), dtype=torch.uint8),
        "local_crops": torch.randint(0, 256, (args.batch, 8, 3, 96, 96), dtype=torch.uint8),
    }
    sizes = [rearrange(plain.normalise(crops), "b v c h w -> (v b) c h w") for crops in batch.values()]

    def ours() -> None:
        engine.backward(engine(batch, 0)["loss"])
        engine.step()
        method.after_step(0)

    what = f"DINO step, ViT-S/16 of {args.depth} blocks, 2 x 224 + 8 x 96"
    theirs = lambda: plain_step(plain, optimizer, sizes, args.batch)  # noqa: E731
    compare(what, "crops", 10 * args.batch, ours, theirs, turns=args.turns, target=1.25)


if __name__ == "__main__":
    main()
