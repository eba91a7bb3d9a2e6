"""T2T-ViT (Yuan et al. 2021): tokens made in three overlapping steps, then narrow and deep blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import reduce, repeat
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.encoders.base import drop_path_rates
from pretrain.encoders.sequence import Attention, ResidualBlock, SequenceEncoder, initialise_linear
from pretrain.encoders.t2t.config import T2tConfig
from pretrain.encoders.t2t.tokens import STEPS, TokensToToken

_EPS = 1e-5
_WINDOW = STEPS[0][0] ** 2  # px


class T2tEncoder(SequenceEncoder):
    """T2T-ViT behind the Encoder seam; `self.net` has the names of the authors' weights."""

    pixel_weights = ()

    def __init__(
        self, config: T2tConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth, _ = config.shape
        self.stride = self.patch = config.patch
        self.pool = config.pool
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.net = T2tVit(config, self.grid[0] * self.grid[1], channels)
        self.make_mask_token(mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.net.tokens_to_token(images)

    def fresh_blocks(self, count: int, after: int) -> list[nn.Module]:
        blocks = narrow_blocks(self.config, after, count)
        for block in blocks:
            block.apply(initialise_linear)
        return blocks

    @classmethod
    def channels_of(cls, weights: Mapping[str, Tensor]) -> int:
        return len(weights["tokens_to_token.attention1.norm1.weight"]) // _WINDOW

    def resized(self, key: str, value: Tensor, wanted: Tensor) -> Tensor | None:
        """What reads windows of pixels, for other channels: the mean over them, scaled as in `transfer.fit`."""
        reads = key.startswith("tokens_to_token.attention1.") and value.shape[:-1] == wanted.shape[:-1]
        if not reads or value.shape[-1] % _WINDOW:
            return None
        old, new = value.shape[-1] // _WINDOW, wanted.shape[-1] // _WINDOW
        mean = reduce(value, "... (c p) -> ... p", "mean", p=_WINDOW)
        return repeat(mean * (old / new if value.ndim == 2 else 1), "... p -> ... (c p)", c=new)


class T2tVit(nn.Module):
    """The modules: tokens_to_token, cls_token, pos_embed, blocks.N, norm."""

    def __init__(self, config: T2tConfig, num_patches: int, channels: int) -> None:
        super().__init__()
        dim, depth, _ = config.shape
        self.tokens_to_token = TokensToToken(config.tokens, channels, config.token_dim, dim, config.token_dropout)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(line_positions(1 + num_patches, dim), requires_grad=False)
        self.blocks = nn.ModuleList(narrow_blocks(config, 0, depth))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.apply(initialise_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)


def narrow_blocks(config: T2tConfig, first: int, count: int) -> list[ResidualBlock]:
    """`count` blocks from number `first` on."""
    dim, depth, heads = config.shape
    return [
        ResidualBlock(dim, Attention(dim, heads, qkv_bias=False), Mlp(dim, config.hidden), rate, _EPS)
        for rate in drop_path_rates(config.drop_path, depth, first, count)
    ]


def line_positions(count: int, dim: int) -> Tensor:
    """(1, count, dim) sines and cosines in turn of the place along the sequence, the class token's first (Vaswani et
    al. 2017): the place over 10000^(2 i / dim) in channels 2 i and 2 i + 1."""
    rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None].float()
