"""Visual transformers (Wu et al. 2020): a map is summed up in a few tokens, they attend to each other, and the map
takes up what they have become."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.residual import (
    ConvStem,
    ResidualBlock,
    ResidualPyramid,
    group_norm,
    initialise_convolutions,
)
from pretrain.encoders.sequence import initialise_linear
from pretrain.encoders.spatial_transformer import SpatialTransformer
from pretrain.encoders.visual_transformer.config import VisualTransformerConfig


class VisualTransformerEncoder(ResidualPyramid):
    """A ResNet that ends in blocks with visual tokens, behind the Encoder seam.

    Its features are the map, into which the last block has projected its tokens.
    """

    def __init__(
        self, config: VisualTransformerConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.patch, self.stride = config.patch, config.stride
        self.depths = (*config.shape[:-1], config.shape[-1] + config.token_blocks)
        self.depth, self.dim = sum(self.depths), config.dim * 2 ** (len(config.shape) - 1)
        self.net = VisualTransformerNet(config, channels)
        self.make_mask_token(config.dim, mask_token)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        cells, kept = rearrange(tokens, "b h w d -> b d h w"), {}
        visual, first = None, self.depth - len(self.net.visual_blocks)
        for index, (block, path) in enumerate(zip(self.blocks(), paths, strict=True)):
            if index == first and self.net.straighten is not None:
                cells = self.net.straighten(cells)
            if index < first:
                cells = block(cells, path)
            else:
                cells, visual = block(cells, visual, path)
            if index in wanted:
                kept[index] = rearrange(cells, "b d h w -> b h w d")
        return rearrange(cells, "b d h w -> b h w d"), kept

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.net.visual_blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        before = self.depth - len(self.net.visual_blocks)
        if "visual_blocks" in parts:
            return before + int(parts[parts.index("visual_blocks") + 1]) + 1
        return before + 1 if "straighten" in parts else super().layer_of(parameter_name)


class VisualTransformerNet(nn.Module):
    """The modules: stem, stages.N.M of convolutions, straighten where there is one, visual_blocks.N."""

    def __init__(self, config: VisualTransformerConfig, channels: int) -> None:
        super().__init__()
        depths = config.shape
        rates = iter(np.linspace(0, config.drop_path, sum(depths) + config.token_blocks).tolist())
        self.stem = ConvStem(channels, config.dim)
        self.stages, width = nn.ModuleList(), config.dim
        for stage, depth in enumerate(depths):
            blocks = nn.ModuleList()
            for place in range(depth):
                dim = config.dim * 2**stage
                blocks.append(ConvBlock(width, dim, stage > 0 and place == 0, next(rates)))
                width = dim
            self.stages.append(blocks)
        self.visual_blocks = nn.ModuleList(
            TokenBlock(width, config.tokens, number > 0 and config.tokenizer == "recurrent", next(rates))
            for number in range(config.token_blocks)
        )
        initialise_convolutions(self)
        self.apply(initialise_linear)
        self.straighten = None if config.straightened is None else SpatialTransformer(width, config.straightened)


class ConvBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    def __init__(self, width: int, dim: int, halves: bool, drop_rate: float) -> None:
        super().__init__(width, dim, halves, drop_rate)
        self.conv1 = nn.Conv2d(width, dim, 3, stride=2 if halves else 1, padding=1, bias=False)
        self.norm1 = group_norm(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm2 = group_norm(dim)

    def branch(self, cells: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(cells)).relu()))


class TokenBlock(nn.Module):
    """A tokenizer, a transformer on visual tokens, and their projection onto the map (section 3 of the paper).

    Products are not scaled, and there are no norms, as in the paper. What drops is the projection.
    """

    def __init__(self, dim: int, tokens: int, recurrent: bool, drop_rate: float) -> None:
        super().__init__()
        self.recurrent = recurrent
        if recurrent:  # what each token looks for comes from the tokens before
            self.look = nn.Linear(dim, dim, bias=False)
        else:  # or is learned
            self.filters = nn.Parameter(torch.empty(tokens, dim))
            nn.init.trunc_normal_(self.filters, std=0.02)
        self.value = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim // 2, bias=False)
        self.query = nn.Linear(dim, dim // 2, bias=False)
        self.fc1 = nn.Linear(dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.back_query = nn.Linear(dim, dim // 2, bias=False)
        self.back_key = nn.Linear(dim, dim // 2, bias=False)
        self.back_value = nn.Linear(dim, dim, bias=False)
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()

    def tokenize(self, pixels: Tensor, before: Tensor | None) -> Tensor:
        """Tokens (b, l, d): means of the values of pixels (b, n, d), by a softmax over the pixels."""
        looked_for = self.look(before) if self.recurrent else repeat(self.filters, "l d -> b l d", b=len(pixels))
        return F.scaled_dot_product_attention(looked_for, pixels, self.value(pixels), scale=1.0)

    def transform(self, tokens: Tensor) -> Tensor:
        """(b, l, d) to (b, l, d)."""
        tokens = tokens + F.scaled_dot_product_attention(self.key(tokens), self.query(tokens), tokens, scale=1.0)
        return tokens + self.fc2(self.fc1(tokens).relu())

    def project(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """What is added to pixels (b, n, d): values of tokens (b, l, d), by a softmax over the tokens."""
        return F.scaled_dot_product_attention(
            self.back_query(pixels), self.back_key(tokens), self.back_value(tokens), scale=1.0
        )

    def forward(
        self, cells: Tensor, before: Tensor | None, paths: drop_path.Paths | None = None
    ) -> tuple[Tensor, Tensor]:
        """A map (b, d, h, w) and the tokens (b, l, d) of the block before: both, as they are after this block."""
        pixels = rearrange(cells, "b d h w -> b (h w) d")
        tokens = self.transform(self.tokenize(pixels, before))

        def project(part: Tensor, rows: Tensor | None) -> Tensor:
            return self.project(part, tokens if rows is None else tokens.index_select(0, rows))

        pixels = drop_path.add_branch(pixels, project, self.drop_path, None if paths is None else paths.attention)
        return rearrange(pixels, "b (h w) d -> b d h w", h=cells.shape[2]), tokens
