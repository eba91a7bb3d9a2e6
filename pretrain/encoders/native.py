"""Images at their own shape: the patches of many in one sequence, and what an encoder makes of them.

The seam beside batches (b, c, h, w): an encoder that is `native` takes `PackedImages`, with a `PackedMask`, and gives
`PackedFeatures`. How many tokens each image has is known on the host, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.packed import in_groups, merged
from pretrain.stream.from_host import from_host

Grids = tuple[tuple[int, int], ...]


class PackedImages(NamedTuple):
    """The patches of images one behind the other.

    patches: (t, p * p * c) normalised; rows of the image first, within a patch row, column, channel.
    grids: rows and columns of patches of each image, in order; there are t patches in all.
    """

    patches: Tensor
    grids: Grids

    @property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each image."""
        return lengths_of(self.grids)


class PackedMask(NamedTuple):
    """What an encoder must not see of `PackedImages`.

    kept: (k,) int64 numbers of the patches that are not left out, counted over all images, ascending; None: all.
    lengths: how many each image keeps, with `kept`.
    token: (t,) bool, patches substituted by the learned mask token, of all t.
    """

    kept: Tensor | None = None
    lengths: tuple[int, ...] = ()
    token: Tensor | None = None


class PackedFeatures(NamedTuple):
    """What an encoder makes of n `PackedImages`.

    tokens: (t, d) patch tokens after the final norm; of those kept, where some were left out.
    lengths: tokens of each image. grids: rows and columns of each whole image.
    kept: (t,) which patch of all images each token is, where some were left out.
    pooled: (n, d). prefix_tokens: (n, p, d), where there are any. layers: those of the blocks asked for.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    grids: Grids
    kept: Tensor | None
    pooled: Tensor
    prefix_tokens: Tensor | None = None
    layers: tuple = ()  # of PackedFeatures

    def of_images(self) -> list[Tensor]:
        """The tokens (n_i, d) of each image."""
        return list(self.tokens.split(list(self.lengths)))


def lengths_of(grids: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(rows * columns for rows, columns in grids)


def joined(parts: Sequence[PackedImages]) -> PackedImages:
    """Several sequences as one, in order."""
    return PackedImages(
        torch.cat([part.patches for part in parts]), tuple(grid for part in parts for grid in part.grids)
    )


def projected(projection: nn.Conv2d, patches: Tensor) -> Tensor:
    """Patches (t, p * p * c) as tokens (t, d): what a convolution over whole patches makes of them."""
    weight = rearrange(projection.weight, "d c p q -> d (p q c)")
    return F.linear(patches, weight, projection.bias)


def with_mask_token(tokens: Tensor, mask_token: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Tokens (t, d) with the mask token where `hidden` (t,)."""
    if hidden is None:
        return tokens
    assert mask_token is not None, "built without mask_token, so no unit can be replaced"
    return torch.where(rearrange(hidden, "t -> t 1"), mask_token.to(tokens.dtype).view(-1), tokens)


def mean_of_each(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean (n, d) of the tokens (t, d) of each of n images."""
    return torch.cat([part.mean(dim=1) for part in in_groups(tokens, merged(lengths))])


def sequences(lengths: Sequence[int], most: int) -> list[range]:
    """Images in order, as many together as fit into a sequence of `most` tokens, and each at least by itself.

    The grouping of NaViT's code: a new sequence begins with the image that would exceed it.
    """
    found: list[range] = []
    total = 0
    for number, length in enumerate(lengths):
        if found and total + length <= most:
            found[-1] = range(found[-1].start, number + 1)
            total += length
        else:
            found.append(range(number, number + 1))
            total = length
    return found


class Interleaved:
    """Sequences in which each image's prefix tokens stand before its patch tokens.

    lengths: of the sequences, of images with so many patch tokens. num_prefix: prefix tokens of all of them together.
    """

    def __init__(self, patches: Sequence[int], prefix: int, device: torch.device) -> None:
        counts = np.asarray(patches, dtype=np.int64)
        self.lengths = tuple((counts + prefix).tolist())
        begins = (counts + prefix).cumsum() - (counts + prefix)
        first = (begins[:, None] + np.arange(prefix)).reshape(-1)
        own = np.arange(counts.sum()) + np.repeat(prefix * np.arange(1, len(counts) + 1), counts)
        places = np.concatenate([first, own])
        self.num_prefix = len(first)
        self._order, self._places = from_host(places.argsort(kind="stable"), device), from_host(places, device)

    def joined(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Prefix tokens (n p, ...), image by image, and patch tokens (t, ...) as sequences (n p + t, ...)."""
        return torch.cat([prefix.to(tokens.dtype), tokens]).index_select(0, self._order)

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `joined`."""
        back = states.index_select(0, self._places)
        return back[: self.num_prefix], back[self.num_prefix :]
