"""Sequences of different length one behind the other: what is tokenwise runs once on all, attention on groups of equal
length.

The seam on which images of several sizes go through an encoder in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.drop_path import Branch
from pretrain.stream.from_host import from_host

#: Calls of attention for groups of equal length; more go in one (the GPU kit compares the two).
MOST_CALLS = 4
_WIDEST_HEAD = 256
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
        return merged(self.lengths)

    def unpacked(self) -> list[Tensor]:
        """A batch (count, length, d) for each group."""
        return in_groups(self.tokens, self.groups)


def merged(lengths: Iterable[int]) -> Groups:
    """Neighbours of one length together."""
    found: list[tuple[int, int]] = []
    for length in lengths:
        count = found.pop()[0] if found and found[-1][1] == length else 0
        found.append((count + 1, length))
    return tuple(found)


def in_groups(tokens: Tensor, groups: Groups) -> list[Tensor]:
    """Tokens (t, d) as a batch (count, length, d) for each group."""
    parts = tokens.split([count * length for count, length in groups])
    return [rearrange(part, "(b n) d -> b n d", n=length) for part, (_, length) in zip(parts, groups, strict=True)]


def within_groups(tokens: Tensor, groups: Groups, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """`attend` from (count, length, e) to (count, length, d) of each group of tokens (t, e): (t, d)."""
    return torch.cat([rearrange(attend(part), "b n d -> (b n) d") for part in in_groups(tokens, groups)])


#: Of the two branches of a block: what of the tokens goes through it, all where None, and their groups.
PackedPaths = tuple[tuple[Branch | None, Groups], tuple[Branch | None, Groups]]


def packed_paths(blocks: Sequence[nn.Module], groups: Groups, device: torch.device) -> list[PackedPaths]:
    """What each of the blocks drops of packed sequences, whose groups are drawn one after the other."""
    drawn = [chosen for count, _ in groups if (chosen := drop_path.choose_paths(blocks, count)) is not None]
    if not drawn:
        return [((None, groups), (None, groups))] * len(blocks)
    joined = [_join(parts, groups) for parts in zip(*drawn, strict=True)]
    branches = drop_path.to_device([chosen for chosen, _ in joined], device)
    left = [(branch, kept) for branch, (_, kept) in zip(branches, joined, strict=True)]
    return list(zip(left[::2], left[1::2], strict=True))


def _join(parts: Sequence[drop_path.Chosen], groups: Groups) -> tuple[drop_path.Chosen, Groups]:
    """What each group keeps as numbers of tokens, and the groups that are left."""
    rows, weights, left, start = [], [], [], 0
    for part, (count, length) in zip(parts, groups, strict=True):
        kept = np.arange(count) if part.rows is None else part.rows
        rows.append((start + kept[:, None] * length + np.arange(length)).flatten())
        weights.append(np.repeat(part.weights, length))
        left.append((len(kept), length))
        start += count * length
    every = all(part.rows is None for part in parts)
    return drop_path.Chosen(None if every else np.concatenate(rows), np.concatenate(weights)), tuple(left)


def sequence_paths(blocks: Sequence[nn.Module], lengths: Sequence[int], device: torch.device) -> list[PackedPaths]:
    """What each of the blocks drops of sequences of any lengths, which are all rows of a crop, then of the next."""
    groups, chosen = merged(lengths), drop_path.choose_paths(blocks, len(lengths))
    if chosen is None:
        return [((None, groups), (None, groups))] * len(blocks)
    counts = np.asarray(lengths)
    tokens, left = [], []
    for part in chosen:
        rows = np.arange(len(counts)) if part.rows is None else part.rows
        stays = np.zeros(len(counts), bool)
        stays[rows] = True
        kept = None if part.rows is None else np.flatnonzero(np.repeat(stays, counts))
        tokens.append(drop_path.Chosen(kept, np.repeat(part.weights, counts[rows])))
        left.append(merged(counts[rows].tolist()))
    pairs = list(zip(drop_path.to_device(tokens, device), left, strict=True))
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def attend_packed(qkv: Tensor, heads: int, groups: Groups) -> Tensor:
    """Attention within each sequence, from queries, keys and values (t, 3 d) side by side to (t, d).

    A call for each group; for many of them, on a GPU at half precision, one call of torch's kernel for sequences of
    any length.
    """
    if len(groups) > MOST_CALLS and _fits_at_once(qkv, qkv.shape[-1] // (3 * heads)):
        return attend_at_once(qkv, heads, groups)

    def attend(part: Tensor) -> Tensor:
        query, key, value = rearrange(part, "b n (three h d) -> three b h n d", three=3, h=heads)
        return rearrange(F.scaled_dot_product_attention(query, key, value), "b h n d -> b n (h d)")

    return within_groups(qkv, groups, attend)


def _fits_at_once(qkv: Tensor, width: int) -> bool:
    """Whether torch's kernel takes these, with heads of this width; what it doesn't, it refuses."""
    return qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= _WIDEST_HEAD


def attend_at_once(qkv: Tensor, heads: int, groups: Groups) -> Tensor:
    """`attend_packed` in one call, on a GPU at half precision."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = np.repeat([length for _, length in groups], [count for count, _ in groups])
    starts = from_host(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), qkv.device)
    query, key, value = rearrange(qkv, "t (three h d) -> three t h d", three=3, h=heads)
    longest = int(lengths.max())
    return rearrange(varlen_attn(query, key, value, starts, starts, longest, longest), "t h d -> t (h d)")
