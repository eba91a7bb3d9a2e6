"""Which tokens DeepSpeed's top-1 gate keeps, in one process and on two ranks, against ours: python THIS."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from deepspeed.moe.sharded_moe import top1gating
from torch import Tensor

from pretrain.encoders.swin_moe import routing

TOKENS, EXPERTS, FACTOR = 1152, 8, 1.25  # of a group: 8 images of 12x12 tokens; as many groups as ranks


def of_deepspeed(logits: Tensor, seed: int, selects_at_random: bool) -> Tensor:
    """(tokens,) bool: which find a place. Its selection draws from torch's global generator."""
    torch.manual_seed(seed)
    _, _, dispatched, _ = top1gating(logits, FACTOR, 4, None, None, True, selects_at_random)
    return dispatched.flatten(1).any(dim=1)


def of_ours(logits: Tensor) -> Tensor:
    """Likewise, in groups."""
    choice = routing.choose(logits.view(-1, TOKENS, EXPERTS).softmax(-1), 1)
    capacity = routing.capacity_of(TOKENS, EXPERTS, 1, FACTOR)
    return routing.limited(choice, EXPERTS, capacity, prioritised=True).kept.flatten()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    uneven = torch.tensor([1.0, 0.6, 0.3, 0.0, 0.0, -0.3, -0.6, -1.0])
    logits = 0.5 * torch.randn(2 * TOKENS, EXPERTS, generator=generator) + uneven
    halves = logits.chunk(2)
    for name, kept in (
        ("DeepSpeed, selecting at random", lambda part: of_deepspeed(part, 0, True)),
        ("DeepSpeed, in the order of tokens", lambda part: of_deepspeed(part, 0, False)),
        ("ours, in groups of 8 images", of_ours),
    ):
        whole, apart = kept(logits), torch.cat([kept(half) for half in halves])
        print(f"{name}: {int((~whole).sum())} of {len(whole)} dropped; {int((whole != apart).sum())} tokens meet "
              "another fate on two ranks")  # fmt: skip
    other = of_deepspeed(logits, 0, True) != of_deepspeed(logits, 1, True)
    print(f"DeepSpeed, selecting at random with another seed: {int(other.sum())} tokens meet another fate")


if __name__ == "__main__":
    main()
