"""The pyramid vision transformer, version 2 (Wang et al. 2022), over timm."""

from __future__ import annotations

import timm
from einops import rearrange
from timm.models.pvt_v2 import Block
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.pvt_v2.config import PvtV2Config, timm_architecture
from pretrain.encoders.pyramid import Pyramid


class PvtV2Encoder(Pyramid):
    """A timm PyramidVisionTransformerV2 (`self.pvt`, whose weights load in timm as they are) for images of any size.

    Its patches overlap, so hidden pixels are zeroed before they are embedded. On a compact map the overlaps and the
    depth-wise convolutions see the units that were moved beside each other, never hidden ones.
    """

    overlapping = True

    def __init__(
        self, config: PvtV2Config, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dims, depths, _ = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dims[-1]
        recipe = timm_architecture(config) | {"in_chans": channels, "num_classes": 0}
        self.pvt = timm.create_model(**recipe, drop_path_rate=config.drop_path)
        for block in self.blocks():
            block.__class__ = SkippingBlock  # timm builds its blocks itself; ours differ in `forward`, not in state
        self.make_mask_token(dims[0], mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.pvt.patch_embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        kept: dict[int, Tensor] = {}
        index, last = 0, len(self.pvt.stages) - 1
        for number, stage in enumerate(self.pvt.stages):
            if stage.downsample is not None:
                tokens = stage.downsample(rearrange(tokens, "b h w d -> b d h w").contiguous())
            grid = (tokens.shape[1], tokens.shape[2])
            sequence = rearrange(tokens, "b h w d -> b (h w) d")
            for block in stage.blocks:
                sequence = block(sequence, grid, paths[index])
                if index in wanted:
                    kept[index] = rearrange(sequence, "b (h w) d -> b h w d", h=grid[0])
                index += 1
            if number < last:  # every stage ends with a norm; the last one's is the final norm
                sequence = stage.norm(sequence)
            tokens = rearrange(sequence, "b (h w) d -> b h w d", h=grid[0])
        return tokens, kept

    def final_norm(self, states: Tensor) -> Tensor:
        return self.pvt.stages[-1].norm(states)

    def inner(self) -> nn.Module:
        return self.pvt

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.pvt.stages for block in stage.blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "stages" not in parts:
            return 0
        part = parts[parts.index("stages") + 1 :]  # such as 2.blocks.0.attn.q.weight
        stage = int(part[0])
        before = sum(len(earlier.blocks) for earlier in self.pvt.stages[:stage])
        if part[1] == "blocks":
            return before + int(part[2]) + 1
        if part[1] == "downsample":
            return before + 1
        after = before + len(self.pvt.stages[stage].blocks)
        return after + 1 if stage == len(self.pvt.stages) - 1 else after


class SkippingBlock(Block):
    """timm's block, which computes the paths that are kept and no others."""

    def forward(self, x: Tensor, feat_size: tuple[int, int], paths: drop_path.Paths | None = None) -> Tensor:
        attention, mlp = paths or (None, None)
        x = drop_path.add_branch(x, lambda part, _: self.attn(self.norm1(part), feat_size), self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.mlp(self.norm2(part), feat_size), self.drop_path2, mlp)
