"""DeepViT (Zhou et al. 2021): the heads of deep blocks exchange their attention maps, which would grow alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.encoders.base import drop_path_rates
from pretrain.encoders.deepvit.config import DeepVitConfig
from pretrain.encoders.sequence import Attention, ResidualBlock, SequenceEncoder, initialise_linear

_EPS = 1e-6
_STEM_WIDTH = 64


class DeepVitEncoder(SequenceEncoder):
    """DeepViT behind the Encoder seam; `self.net` has the names of the authors' weights."""

    pixel_weights = ("patch_embed.conv1.weight", "patch_embed.proj.weight")

    def __init__(
        self, config: DeepVitConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth, _ = config.shape
        self.stride = self.patch = config.patch
        self.pool = config.pool
        self.overlapping = config.stem == "conv"
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.net = DeepVit(config, self.grid[0] * self.grid[1], channels)
        self.make_mask_token(mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return rearrange(self.net.patch_embed(images), "b d h w -> b h w d")

    def fresh_blocks(self, count: int, after: int) -> list[nn.Module]:
        blocks = deep_blocks(self.config, after, count)
        for block in blocks:
            block.apply(initialise_linear)
        return blocks


class DeepVit(nn.Module):
    """The modules: patch_embed, cls_token, pos_embed, blocks.N, norm."""

    def __init__(self, config: DeepVitConfig, num_patches: int, channels: int) -> None:
        super().__init__()
        dim, depth, _ = config.shape
        self.patch_embed = (ConvPatches if config.stem == "conv" else Patches)(channels, dim, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, dim))
        self.blocks = nn.ModuleList(deep_blocks(config, 0, depth))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.apply(initialise_linear)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)


def deep_blocks(config: DeepVitConfig, first: int, count: int) -> list[ResidualBlock]:
    """`count` blocks from number `first` on; those beyond the last block are like it."""
    dim, depth, heads = config.shape
    num_mixed, scaled = config.mixed
    blocks = []
    for offset, rate in enumerate(drop_path_rates(config.drop_path, depth, first, count)):
        mixes = min(first + offset, depth - 1) >= depth - num_mixed
        attention = ReAttention(dim, heads, scaled) if mixes else Attention(dim, heads)
        mlp = Mlp(dim, round(dim * config.mlp_ratio))
        blocks.append(ResidualBlock(dim, attention, mlp, rate, _EPS, config.branch_scale, whole_batches=mixes))
    return blocks


class ReAttention(Attention):
    """Attention whose maps are mixed over the heads after the softmax, and normalised per head over the batch.

    scaled: they are then multiplied by head width^-.5, as the authors do it in S and not in L.
    """

    def __init__(self, dim: int, heads: int, scaled: bool) -> None:
        super().__init__(dim, heads)
        self.reatten_matrix = nn.Conv2d(heads, heads, 1)
        self.var_norm = nn.BatchNorm2d(heads)
        self.scale = (dim // heads) ** -0.5 if scaled else 1.0

    def maps(self, query: Tensor, key: Tensor) -> Tensor:
        """What each head attends with, (b, h, n, n); its rows sum to anything."""
        products = (query * query.shape[-1] ** -0.5) @ rearrange(key, "b h m d -> b h d m")
        return self.var_norm(self.reatten_matrix(products.softmax(dim=-1)))

    def mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.maps(query, key) @ (value * self.scale)


class Patches(nn.Module):
    """One convolution with kernel = stride."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, d, h / patch, w / patch)."""
        return self.proj(images)


class ConvPatches(nn.Module):
    """Two convolutions, the first of which halves the image, then one with kernel = stride = patch / 2."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, _STEM_WIDTH, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        self.conv2 = nn.Conv2d(_STEM_WIDTH, _STEM_WIDTH, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(_STEM_WIDTH)
        self.proj = nn.Conv2d(_STEM_WIDTH, dim, patch // 2, stride=patch // 2)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, d, h / patch, w / patch)."""
        layers: Sequence[tuple[nn.Module, nn.Module]] = ((self.conv1, self.bn1), (self.conv2, self.bn2))
        for convolution, norm in layers:
            images = norm(convolution(images)).relu()
        return self.proj(images)
