"""What families share whose tokens go through all blocks in one sequence: a class token, then the patches."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.base import Encoder, Features, Mask, on_token_grid, zero_hidden_pixels
from pretrain.encoders.positions import resize_positions


class SequenceEncoder(Encoder):
    """An encoder of a class token and patch tokens. Subclasses set `net`, `grid`, `pool` and implement `embed`.

    net: the modules, under the names of the authors' weights, with `cls_token` (1, 1, d), `pos_embed` (1, 1 + n, d) for
        a map of `grid` (h, w) patches, `blocks`, from (states (b, 1 + n, d), `drop_path.Paths` or None) to states, and
        the final `norm`.
    pool: what stands for the image, the class token or the mean of the patch tokens.
    overlapping: whether `embed` reads beyond the patch of a token; hidden pixels are then zeroed before it.
    """

    has_class_token = True
    overlapping = True
    net: nn.Module
    grid: tuple[int, int]
    pool: Literal["class", "mean"]
    mask_token: nn.Parameter | None

    def make_mask_token(self, wanted: bool) -> None:
        """The learned token of replaced units; none unless `wanted`."""
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if wanted else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) to patch tokens (b, h, w, d), before positions."""
        raise TypeError(f"{type(self).__name__} does not implement embed")

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        dropped, replaced = on_token_grid(mask, grid)
        if self.overlapping:
            images = zero_hidden_pixels(images, None if dropped is None else dropped.drop, replaced)
        tokens = rearrange(self.embed(images), "b h w d -> b (h w) d")
        if replaced is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            tokens = torch.where(rearrange(replaced, "b h w -> b (h w) 1"), self.mask_token.to(tokens.dtype), tokens)
        tokens = tokens + resize_positions(self.net.pos_embed[:, 1:], self.grid, grid)
        units = None
        if dropped is not None:
            units = dropped.visible_ids()
            tokens = tokens.gather(1, repeat(units, "b n -> b n d", d=self.dim))
        prefix = (self.net.cls_token + self.net.pos_embed[:, :1]).expand(len(images), -1, -1)
        states = torch.cat([prefix, tokens], dim=1)
        kept: dict[int, Tensor] = {}
        paths = drop_path.paths_of(self.blocks(), len(images), images.device)
        for index, (block, path) in enumerate(zip(self.blocks(), paths, strict=True)):
            states = block(states, path)
            kept[index] = states
        earlier = tuple(self._features(kept[index % self.depth], grid, units) for index in layers)
        return self._features(states, grid, units)._replace(layers=earlier)

    def _features(self, states: Tensor, grid: tuple[int, int], units: Tensor | None) -> Features:
        normed = self.final_norm(states)
        prefix, tokens = normed[:, :1], normed[:, 1:]
        return Features(
            tokens=tokens,
            prefix_tokens=prefix,
            grid=grid if units is None else None,
            ids_keep=None if units is None else rearrange(units, "b n -> b n 1"),
            pooled=prefix[:, 0] if self.pool == "class" else tokens.mean(dim=1),
            states=states,
        )

    def inner(self) -> nn.Module:
        return self.net

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.grid

    def final_norm(self, states: Tensor) -> Tensor:
        return self.net.norm(states)

    def blocks(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def further_blocks(self, count: int, after: int) -> nn.Module:
        return FurtherBlocks(self.fresh_blocks(count, after))

    def fresh_blocks(self, count: int, after: int) -> list[nn.Module]:
        """`count` blocks as they follow the first `after`, initialised."""
        raise TypeError(f"{type(self).__name__} does not implement fresh_blocks")

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if parts[-3:-1] == ["net", "norm"] else 0


class FurtherBlocks(nn.Module):
    """Fresh blocks for a head that goes on from an encoder's states."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """States (b, 1 + n, d) on a map of `grid` patches to states."""
        paths = drop_path.paths_of(self.blocks, states.shape[0], states.device, drop_path.FURTHER)
        for block, path in zip(self.blocks, paths, strict=True):
            states = block(states, path)
        return states


def initialise_linear(module: nn.Module) -> None:
    """Linear layers as timm's and most authors' code starts them; convolutions and norms keep PyTorch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Attention of `heads` heads among all tokens."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        """(b, n, d) to (b, n, d)."""
        query, key, value = rearrange(self.qkv(states), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(self.mixed(query, key, value), "b h n d -> b n (h d)"))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the heads make of queries, keys and values (b, h, n, d): (b, h, n, d)."""
        return F.scaled_dot_product_attention(query, key, value)


class ResidualBlock(nn.Module):
    """Norm, attention, norm, MLP, each with a residual and skipped where its path is dropped.

    scale: each branch reads `scale` times the states, and what it adds is divided by it (DeepViT's S and L: .5).
    whole_batches: whether the attention normalises over the batch, so that no image may be left out of it.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: nn.Module,
        drop_rate: float,
        eps: float,
        scale: float = 1.0,
        whole_batches: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()
        self.scale, self.whole_batches = scale, whole_batches

    def forward(self, states: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """(b, n, d) to (b, n, d)."""
        attention, mlp = paths or (None, None)
        if self.whole_batches:
            attention = drop_path.unskipped(attention, len(states))
        states = drop_path.add_branch(states, self._branch(self.norm1, self.attn), self.drop_path, attention)
        return drop_path.add_branch(states, self._branch(self.norm2, self.mlp), self.drop_path, mlp)

    def _branch(self, norm: nn.Module, mix: nn.Module) -> Any:
        if self.scale == 1:
            return lambda part, _: mix(norm(part))
        return lambda part, _: mix(norm(part * self.scale)) / self.scale
