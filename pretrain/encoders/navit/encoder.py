"""NaViT (Dehghani et al. 2023): tokens of images of any shape, one behind the other, attended image by image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from data_pipelines.packed_batch import rows_and_columns
from pretrain.encoders import drop_path
from pretrain.encoders.base import Encoder, Features, Mask, drop_path_rates, on_token_grid
from pretrain.encoders.native import (
    Grids,
    PackedFeatures,
    PackedImages,
    PackedMask,
    lengths_of,
    mean_of_each,
)
from pretrain.encoders.navit.blocks import AttentionPool, NavitBlock, norm
from pretrain.encoders.navit.config import NavitConfig
from pretrain.encoders.packed import merged, sequence_paths
from pretrain.encoders.patches import patchify
from pretrain.encoders.positions import is_symbolic
from pretrain.encoders.tables import built_once
from pretrain.stream.from_host import from_host


class NavitEncoder(Encoder):
    """NaViT behind the Encoder seam: batches of images, several batches in one pass, or `PackedImages`.

    All of them are sequences of tokens, and go the same way.
    """

    has_class_token = False
    packs = True
    native = True

    def __init__(
        self, config: NavitConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth, _ = config.shape
        self.stride = self.patch = config.patch
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.navit = Navit(config, self.grid, channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if mask_token else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Any, mask: Any = None, layers: tuple[int, ...] = ()) -> Any:
        if isinstance(images, PackedImages):
            return self._native(images, mask or PackedMask(), layers)
        if isinstance(images, Tensor):
            return self._batches([(images, mask)], layers)[0]
        return tuple(self._batches(list(zip(images, mask or [None] * len(images), strict=True)), layers))

    def _native(self, images: PackedImages, mask: PackedMask, layers: tuple[int, ...]) -> PackedFeatures:
        places = from_host(coordinates(images.grids, self.grid, self.config.positions), images.patches.device)
        tokens = self._embed(images.patches, places, mask.token)
        kept, lengths = mask.kept, mask.lengths
        if mask.kept is None:
            kept, lengths = self._drop_tokens(images.lengths, tokens.device, masked=mask.token is not None)
        if kept is not None:
            tokens = tokens.index_select(0, kept)
        made = self._run(tokens, lengths, layers)
        found = [PackedFeatures(each, lengths, images.grids, kept, pooled) for each, pooled in made]
        return found[0]._replace(layers=tuple(found[1:]))

    def _batches(self, passes: Sequence[tuple[Tensor, Mask | None]], layers: tuple[int, ...]) -> list[Features]:
        """The Features of each of the batches (b, c, h, w), which go through the blocks together."""
        embedded = [self._embed_batch(*given) for given in passes]
        lengths = tuple(tokens.shape[1] for tokens, _, _ in embedded for _ in range(len(tokens)))
        joined = torch.cat([rearrange(tokens, "b n d -> (b n) d") for tokens, _, _ in embedded])
        made = self._run(joined, lengths, layers)
        found, image, token = [], 0, 0
        for tokens, grid, units in embedded:
            count, length = tokens.shape[:2]
            several = []
            for each, pooled in made:
                own = rearrange(each[token : token + count * length], "(b n) d -> b n d", b=count)
                several.append(Features(own, None, grid, units, pooled[image : image + count]))
            found.append(several[0]._replace(layers=tuple(several[1:])))
            image, token = image + count, token + count * length
        return found

    def _embed_batch(self, images: Tensor, mask: Mask | None) -> tuple[Tensor, tuple[int, int] | None, Tensor | None]:
        """The tokens (b, n, d) that the first block sees; the grid, where they are all; else which they are."""
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        dropped, replaced = on_token_grid(mask, grid)
        hidden = None if replaced is None else rearrange(replaced, "b h w -> b (h w)")
        places = (places_in_graph if is_symbolic(grid) else places_of)(
            grid, self.grid, self.config.positions, images.device
        )
        tokens = self._embed(patchify(images, self.patch), places, hidden)
        units = None if dropped is None else dropped.visible_ids()
        if units is None:
            lengths = (grid[0] * grid[1],) * len(images)
            kept, left = self._drop_tokens(lengths, images.device, masked=hidden is not None)
            if kept is not None:
                units = rearrange(kept, "(b n) -> b n", n=left[0]) % lengths[0]
        if units is None:
            return tokens, grid, None
        return tokens.gather(1, repeat(units, "b n -> b n d", d=self.dim)), None, rearrange(units, "b n -> b n 1")

    def _embed(self, patches: Tensor, places: Tensor, hidden: Tensor | None) -> Tensor:
        """Patches (..., p * p * c), normalised, at these places of the tables (..., 2) as tokens (..., d); the mask
        token where `hidden` (...)."""
        tokens = self.navit.patch_embed(patches)
        if hidden is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            token = self.mask_token.to(tokens.dtype).view(-1)
            tokens = torch.where(rearrange(hidden, "... -> ... 1"), token, tokens)
        return tokens + self.navit.positions_at(places).to(tokens.dtype)

    def _drop_tokens(
        self, lengths: tuple[int, ...], device: torch.device, masked: bool
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """Of all tokens the numbers of those that stay, ascending, and how many stay of each image.

        In training, and only where no mask says what is hidden. An image keeps at least one.
        """
        config = self.config
        if not self.training or masked or not (config.token_drop or config.token_drop_sizes):
            return None, lengths
        counts = np.asarray(lengths)
        left = np.array([max(1, int(length * (1 - config.drop_rate(length)))) for length in lengths])
        noise = drop_path.noise_of(len(counts), int(counts.max()))
        noise[np.arange(noise.shape[1]) >= counts[:, None]] = 2.0  # beyond the image
        ranks = noise.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        rows, columns = np.nonzero(ranks < left[:, None])
        kept = (counts.cumsum() - counts)[rows] + columns
        return from_host(kept, device), tuple(left.tolist())

    def _run(self, tokens: Tensor, lengths: tuple[int, ...], layers: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Tokens (t, d) through the blocks: those after the final norm and what stands for each image (n, d), of the
        last block, then of those asked for."""
        wanted = [index % self.depth for index in layers]
        kept = {}
        paths = sequence_paths(self.navit.blocks, lengths, tokens.device)
        for index, (block, path) in enumerate(zip(self.navit.blocks, paths, strict=True)):
            tokens = block(tokens, path)
            if index in wanted:
                kept[index] = tokens
        states = [tokens, *(kept[index] for index in wanted)]
        return [(normed := self.navit.norm(state), self._pooled(normed, lengths)) for state in states]

    def _pooled(self, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        if self.navit.pool is None:
            return mean_of_each(tokens, lengths)
        return self.navit.pool(tokens, merged(lengths))

    def inner(self) -> nn.Module:
        return self.navit

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.grid

    def resized(self, key: str, value: Tensor, wanted: Tensor) -> Tensor | None:
        """A table of rows or columns of positions brought to another number of them."""
        if not key.startswith("pos_embed_") or value.shape[1] != wanted.shape[1]:
            return None
        table = rearrange(value.float(), "n d -> 1 d n")
        return rearrange(F.interpolate(table, size=len(wanted), mode="linear"), "1 d n -> n d")

    def final_norm(self, states: Tensor) -> Tensor:
        return self.navit.norm(states)

    def blocks(self) -> list[nn.Module]:
        return list(self.navit.blocks)

    def no_decay(self, parameter_name: str) -> bool:
        return parameter_name.endswith((".gain", "pos_embed_rows", "pos_embed_columns"))

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if {"pool", "norm"} & set(parts) and "patch_embed" not in parts else 0


class Navit(nn.Module):
    """What is learned of a NaViT, apart from the mask token."""

    def __init__(self, config: NavitConfig, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        dim, depth, heads = config.shape
        self.patch_embed = PatchEmbed(dim, config.patch, channels)
        self.pos_embed_rows = nn.Parameter(torch.zeros(grid[0], dim))
        self.pos_embed_columns = nn.Parameter(torch.zeros(grid[1], dim))
        rates = drop_path_rates(config.drop_path, depth, 0, depth)
        hidden = int(dim * config.mlp_ratio)
        self.blocks = nn.ModuleList(NavitBlock(dim, heads, hidden, rate) for rate in rates)
        self.norm = norm(dim)
        self.pool = AttentionPool(dim, heads) if config.pool == "attention" else None
        self._initialise(dim)

    def _initialise(self, dim: int) -> None:
        """As ViTs start: weights of deviation .02, zero biases; positions of deviation 1 / sqrt(dim) (big_vision)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.pos_embed_rows, self.pos_embed_columns):
            nn.init.normal_(table, std=dim**-0.5)
        if self.pool is not None:
            nn.init.normal_(self.pool.query, std=0.02)

    def positions_at(self, places: Tensor) -> Tensor:
        """Rows and columns (..., 2) of the tables, which may lie between two, as positions (..., d)."""
        return _between(self.pos_embed_rows, places[..., 0]) + _between(self.pos_embed_columns, places[..., 1])


class PatchEmbed(nn.Module):
    """Norm, linear projection, norm. The projection's weight is that of the equal convolution (d, c, p, p)."""

    def __init__(self, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm1 = norm(patch * patch * channels)
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm2 = norm(dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(..., p * p * c), of rows, columns, channels, to (..., d)."""
        weight = rearrange(self.proj.weight, "d c p q -> d (p q c)")
        return self.norm2(F.linear(self.norm1(patches), weight, self.proj.bias))


def coordinates(grids: Grids, table: tuple[int, int], positions: str) -> np.ndarray:
    """(t, 2) fp32: the places in tables of so many rows and columns at which the positions of all patches are read.

    `absolute`: row and column as they are; of an image with more of them than the table, and under `fractional` of
    every image, the table is stretched over the side, as linear interpolation does it.
    """
    places = rows_and_columns(grids).astype(np.float64)
    lengths = lengths_of(grids)
    for axis, size in enumerate(table):
        sides = np.repeat([grid[axis] for grid in grids], lengths)
        stretched = np.clip((places[:, axis] + 0.5) * (size / sides) - 0.5, 0, size - 1)
        as_they_are = (sides <= size) & (positions == "absolute")
        places[:, axis] = np.where(as_they_are, places[:, axis], stretched)
    return places.astype(np.float32)


@built_once
def places_of(grid: tuple[int, int], table: tuple[int, int], positions: str, device: torch.device) -> Tensor:
    """`coordinates` of one image."""
    return torch.from_numpy(coordinates((grid,), table, positions)).to(device)


def places_in_graph(grid: tuple[int, int], table: tuple[int, int], positions: str, device: torch.device) -> Tensor:
    """`places_of` a grid whose sides are known only when the graph that is being made will run."""
    lines = []
    for side, size in zip(grid, table, strict=True):
        numbers = torch.arange(side, device=device).float()
        stretched = ((numbers + 0.5) * size / side - 0.5).clamp(0, size - 1)
        fits = (numbers.amax(dim=0) < size) & (positions == "absolute")
        lines.append(torch.where(fits, numbers, stretched))
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    return rearrange(torch.stack([rows, columns], dim=-1), "h w c -> (h w) c")


def _between(table: Tensor, places: Tensor) -> Tensor:
    low = places.floor()
    share = rearrange(places - low, "... -> ... 1")
    first = low.long()
    second = (first + 1).clamp_max(len(table) - 1)
    return F.embedding(first, table) * (1 - share) + F.embedding(second, table) * share
