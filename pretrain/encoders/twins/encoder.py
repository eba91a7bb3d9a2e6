"""Twins-SVT (Chu et al. 2021) over timm."""

from __future__ import annotations

import timm
from einops import rearrange
from timm.models.twins import Block
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.twins.config import TwinsConfig, timm_architecture


class TwinsEncoder(Pyramid):
    """A timm Twins (`self.twins`, whose weights load in timm as they are) for images of any size.

    Blocks attend within windows (the last ones filled up with zeros, which are attended to, as published) and to a
    sub-sampled map in turn. Positions come from a depth-wise convolution after the first block of every stage.
    """

    pixel_weights = ("patch_embeds.0.proj.weight",)

    def __init__(
        self, config: TwinsConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dims, depths, _ = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dims[-1]
        recipe = timm_architecture(config) | {"img_size": image_size, "in_chans": channels, "num_classes": 0}
        self.twins = timm.create_model(**recipe, drop_path_rate=config.drop_path)
        for block in self.blocks():
            block.__class__ = SkippingBlock  # timm builds its blocks itself; ours differ in `forward`, not in state
        self.make_mask_token(dims[0], mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self._embed(0, images)

    def _embed(self, stage: int, cells: Tensor) -> Tensor:
        """(b, c, h, w) to the tokens (b, h, w, d) that `stage` starts with."""
        tokens, (height, _) = self.twins.patch_embeds[stage](cells)
        return rearrange(tokens, "b (h w) d -> b h w d", h=height)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        kept: dict[int, Tensor] = {}
        index = 0
        for stage, blocks in enumerate(self.twins.blocks):
            if stage:
                tokens = self._embed(stage, rearrange(tokens, "b h w d -> b d h w").contiguous())
            grid = (tokens.shape[1], tokens.shape[2])
            sequence = rearrange(tokens, "b h w d -> b (h w) d")
            for position, block in enumerate(blocks):
                sequence = block(sequence, grid, paths[index])
                if position == 0:
                    sequence = self.twins.pos_block[stage](sequence, grid)
                if index in wanted:
                    kept[index] = rearrange(sequence, "b (h w) d -> b h w d", h=grid[0])
                index += 1
            tokens = rearrange(sequence, "b (h w) d -> b h w d", h=grid[0])
        return tokens, kept

    def final_norm(self, states: Tensor) -> Tensor:
        return self.twins.norm(states)

    def inner(self) -> nn.Module:
        return self.twins

    def blocks(self) -> list[nn.Module]:
        return [block for blocks in self.twins.blocks for block in blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        found = next((name for name in ("blocks", "patch_embeds", "pos_block") if name in parts), None)
        if found is None:
            return self.depth + 1 if "norm" in parts else 0
        stage = int(parts[parts.index(found) + 1])
        if found == "patch_embeds" and stage == 0:
            return 0
        before = sum(len(blocks) for blocks in self.twins.blocks[:stage])
        return before + 1 + (int(parts[parts.index(found) + 2]) if found == "blocks" else 0)

    def no_decay(self, parameter_name: str) -> bool:
        return "pos_block" in parameter_name  # positions, as in the authors' code


class SkippingBlock(Block):
    """timm's block, which computes the paths that are kept and no others."""

    def forward(self, x: Tensor, size: tuple[int, int], paths: drop_path.Paths | None = None) -> Tensor:
        attention, mlp = paths or (None, None)
        x = drop_path.add_branch(x, lambda part, _: self.attn(self.norm1(part), size), self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.mlp(self.norm2(part)), self.drop_path2, mlp)
