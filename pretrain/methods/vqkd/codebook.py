"""A codebook on the unit sphere that follows the tokens it is nearest to (VQ-KD, Peng et al. 2022, appendix)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.rng import Purpose, Stream, permutation
from pretrain.engines.precision import exactly
from pretrain.methods.vqkd.config import VqkdConfig
from pretrain.stream.from_host import from_host
from pretrain.tokenizers.usage import CodeUsage, sum_over_ranks

_SIMILARITIES_AT_ONCE = 2**26


class Codebook(nn.Module):
    """`codes` unit vectors of `code_dim`. All ranks hold the same; nothing depends on how the batch is split.

    vectors: (k, d) fp32, learned by slow averages and not by gradients.
    shares: (k,) slow average of each code's share in a step's tokens; 1 / k is an even one.
    """

    def __init__(self, config: VqkdConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("vectors", F.normalize(torch.randn(config.vocab_size, config.code_dim), dim=-1))
        self.register_buffer("shares", torch.full((config.vocab_size,), 1 / config.vocab_size))
        self.register_buffer("sums", torch.zeros(config.vocab_size, config.code_dim), persistent=False)
        self.usage = CodeUsage(config.vocab_size)
        self._recent: list[Tensor] = []  # tokens since the last step, to put dead codes on
        self._num_candidates = 0

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (n, d) fp32 to the nearest codes (n,) int64 and their vectors (n, d), without gradient.

        In training the tokens are remembered for the `update` that ends the step.
        """
        with torch.no_grad():
            codes = nearest(tokens, self.vectors)
            if self.training:
                self.usage.count(codes)
                self.sums.index_add_(0, codes, tokens)
                self._recent.append(tokens.detach())
            return codes, self.vectors[codes]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """End optimizer step `step`: move used codes, restart dead ones. Collective.

        A used code becomes the normalised slow average of itself and the normalised mean of its tokens. A code whose
        slow share fell below `restart_below` even shares is put on a random token of the global batch.
        """
        momentum, (size, dim) = self.config.momentum, self.vectors.shape
        told = sum_over_ranks(torch.cat([self.sums.flatten(), self._candidates(step).flatten(), self.usage.counts]))
        sums, candidates, counts = told.split([size * dim, size * dim, size])
        sums, candidates = sums.view(size, dim), candidates.view(size, dim)
        self.usage.close_step(counts)
        moved = F.normalize(momentum * self.vectors + (1 - momentum) * F.normalize(sums, dim=-1), dim=-1)
        used = counts > 0
        self.vectors.copy_(torch.where(used[:, None], moved, self.vectors))
        self.shares.mul_(momentum).add_(counts / counts.sum().clamp_min(1), alpha=1 - momentum)
        if self._recent:
            self._restart(candidates)
        self._forget()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """While it lasts, tokens are remembered apart, and dropped at its end."""
        recent, self._recent = self._recent, []
        try:
            yield
        finally:
            self._recent = recent

    def _forget(self) -> None:
        self.sums.zero_()
        self.usage.counts.zero_()
        self._recent = []

    def _candidates(self, step: int) -> Tensor:
        """Tokens (k, d) of the global batch, drawn anew each step, for codes that may be dead; of those on other ranks
        there are zeros. Which codes are dead, nobody needs to know: that would be a wait for the device."""
        chosen = torch.zeros_like(self.vectors)
        if not self._recent:
            return chosen
        own = torch.cat(self._recent).nan_to_num()  # a step that is left out may have brought values not finite
        rank, world_size = _place()
        # every rank has equally many rows, and they follow those of the rank before: the same tokens on any number
        drawn = permutation(Stream(0, Purpose.CODES, step), len(own) * world_size)[: len(chosen)]
        (places,) = np.nonzero(drawn // len(own) == rank)
        for_codes, mine = (from_host(numbers, own.device) for numbers in (places, drawn[places] % len(own)))
        chosen.index_copy_(0, for_codes, own.index_select(0, mine))
        self._num_candidates = len(drawn)
        return chosen

    def _restart(self, candidates: Tensor) -> None:
        """Put the first dead code on the first candidate, the second on the second, as far as there are any."""
        dead = self.shares < self.config.restart_below / len(self.shares)
        number = dead.long().cumsum(0) - 1
        dead &= number < self._num_candidates
        placed = candidates.index_select(0, number.clamp_min(0))
        self.vectors.copy_(torch.where(dead[:, None], placed, self.vectors))
        self.shares.masked_fill_(dead, 1 / len(self.shares))

    @torch.no_grad()
    def start(self) -> None:
        """Begin with the clusters of the tokens that all ranks were shown since the last step. Collective."""
        rank, world_size = _place()
        tokens = torch.cat(self._recent)
        if world_size > 1:
            gathered = tokens.new_empty(world_size * len(tokens), tokens.shape[1])
            dist.all_gather_into_tensor(gathered, tokens.contiguous())
            tokens = gathered
        if rank == 0:
            self.vectors.copy_(spherical_kmeans(tokens, len(self.vectors), self.config.kmeans_iterations, seed=0))
        if world_size > 1:
            dist.broadcast(self.vectors, src=0)  # sums on a GPU may differ in the last bit from rank to rank
        self._forget()

    def values(self) -> dict[str, float]:
        """What to log: of the last step, and the share of codes that are not about to be restarted."""
        alive = (self.shares * len(self.shares) >= max(self.config.restart_below, 0.01)).float().mean()
        return {**self.usage.values(), "codes_alive": float(alive)}


def nearest(tokens: Tensor, vectors: Tensor) -> Tensor:
    """The number (n,) of the unit vector (k, d) nearest to each unit token (n, d), in fp32."""
    rows = max(1, _SIMILARITIES_AT_ONCE // len(vectors))
    with exactly(tokens.device):
        return torch.cat([(part.float() @ vectors.T).argmax(dim=-1) for part in tokens.split(rows)])


def spherical_kmeans(tokens: Tensor, count: int, iterations: int, seed: int) -> Tensor:
    """`count` unit vectors (k, d) around which the unit tokens (n, d) gather, starting from tokens drawn by `seed`.

    A cluster that loses all its tokens keeps its centre. With fewer tokens than clusters the rest are random.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(tokens), generator=generator)[:count].to(tokens.device)
    further = torch.randn(count - len(drawn), tokens.shape[1], generator=generator)
    centres = torch.cat([tokens[drawn].float(), F.normalize(further, dim=-1).to(tokens.device)])
    for _ in range(iterations):
        codes = nearest(tokens, centres)
        sums = torch.zeros_like(centres).index_add_(0, codes, tokens.float())
        filled = torch.bincount(codes, minlength=count) > 0
        centres = torch.where(filled[:, None], F.normalize(sums, dim=-1), centres)
    return centres


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
