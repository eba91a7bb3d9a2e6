"""Sequences of different length one behind the other: what is tokenwise runs once on all, attention on groups of equal
length.

The seam on which images of several sizes go through an encoder in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from pretrain.encoders.drop_path import Branch, Paths

#: Sequences that follow each other and are of one length: their number and their length.
Groups = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """tokens: (t, d). lengths: how many tokens each sequence has, in order; their sum is t."""

    tokens: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(batches: Sequence[Tensor]) -> Packed:
        """Batches of sequences (b, n, d), of any b and n."""
        lengths = tuple(batch.shape[1] for batch in batches for _ in range(len(batch)))
        return Packed(torch.cat([rearrange(batch, "b n d -> (b n) d") for batch in batches]), lengths)

    @property
    def groups(self) -> Groups:
        """Neighbours of one length together."""
        found: list[tuple[int, int]] = []
        for length in self.lengths:
            count = found.pop()[0] if found and found[-1][1] == length else 0
            found.append((count + 1, length))
        return tuple(found)

    def unpacked(self) -> list[Tensor]:
        """A batch (count, length, d) for each group."""
        return in_groups(self.tokens, self.groups)


def in_groups(tokens: Tensor, groups: Groups) -> list[Tensor]:
    """Tokens (t, d) as a batch (count, length, d) for each group."""
    parts = tokens.split([count * length for count, length in groups])
    return [rearrange(part, "(b n) d -> b n d", n=length) for part, (_, length) in zip(parts, groups, strict=True)]


def within_groups(tokens: Tensor, groups: Groups, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """`attend` from (count, length, e) to (count, length, d) of each group of tokens (t, e): (t, d)."""
    return torch.cat([rearrange(attend(part), "b n d -> (b n) d") for part in in_groups(tokens, groups)])


def packed_branch(parts: Sequence[Branch | None], groups: Groups) -> tuple[Branch | None, Groups]:
    """What goes through a branch of packed sequences: from what each group drops to tokens, and the groups left."""
    if all(part is None for part in parts):
        return None, groups
    rows, weights, left, start = [], [], [], 0
    for part, (count, length) in zip(parts, groups, strict=True):
        assert part is not None, "drop path is of all groups or of none"
        device = part.weights.device
        chosen = torch.arange(count, device=device) if part.rows is None else part.rows
        within = torch.arange(length, device=device)
        rows.append(rearrange(start + rearrange(chosen * length, "k -> k 1") + within, "k n -> (k n)"))
        weights.append(repeat(part.weights, "k -> (k n)", n=length))
        left.append((len(chosen), length))
        start += count * length
    every = all(part is not None and part.rows is None for part in parts)
    return Branch(None if every else torch.cat(rows), torch.cat(weights)), tuple(left)


def packed_paths(parts: Sequence[Paths | None], groups: Groups) -> tuple[tuple[Branch | None, Groups], ...]:
    """`packed_branch` for attention and for MLP."""
    return tuple(packed_branch([None if part is None else part[side] for part in parts], groups) for side in (0, 1))
