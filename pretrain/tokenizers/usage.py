"""Which codes of a vocabulary are in use: a tokenizer that uses few of them teaches little."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class CodeUsage(nn.Module):
    """Counts the codes that a step gives, over all its micro-batches and ranks.

    used: () share of the vocabulary that the last step's global batch used.
    perplexity: () exp(entropy) of the codes' shares in it: the vocabulary's size if all are used alike.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        # since the last step, so not part of a checkpoint (which is after a step)
        self.register_buffer("counts", torch.zeros(vocabulary), persistent=False)
        self.register_buffer("used", torch.zeros(()), persistent=False)
        self.register_buffer("perplexity", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def count(self, codes: Tensor) -> None:
        """Add the codes (any shape, int64) of a micro-batch."""
        # not bincount, which waits for the device to learn how long it is to be
        flat = codes.flatten()
        self.counts.index_add_(0, flat, torch.ones_like(flat, dtype=self.counts.dtype))

    @torch.no_grad()
    def close_step(self, counts: Tensor | None = None) -> Tensor:
        """The counts (k,) of the step over all ranks; counting begins anew.

        `counts`: these, where the caller has summed them over the ranks; else this is collective.
        """
        counts = sum_over_ranks(self.counts.clone()) if counts is None else counts
        self.counts.zero_()
        share = counts / counts.sum().clamp_min(1)
        self.used.copy_((counts > 0).float().mean())
        self.perplexity.copy_((-(share * share.clamp_min(1e-12).log()).sum()).exp())
        return counts

    def values(self) -> dict[str, float]:
        """What to log."""
        return {"codes_used": float(self.used), "code_perplexity": float(self.perplexity)}


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """`tensor` summed over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
