"""ConvNeXt (Liu et al. 2022) over timm's, with units replaced or moved together before the first stage."""

from __future__ import annotations

from typing import Any

from einops import rearrange, reduce
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.base import Features
from pretrain.encoders.compact import Compact
from pretrain.encoders.convnext.config import ConvnextConfig, timm_architecture
from pretrain.encoders.pyramid import Pyramid


class ConvnextEncoder(Pyramid):
    """A timm ConvNeXt (`self.convnext`, whose weights load in timm as they are) for images of any size.

    Its first patches do not overlap. On a compact map its depth-wise convolutions see the units that were moved beside
    each other, never hidden ones.
    """

    pixel_weights = ("stem.0.weight",)
    norm_in_head = True

    def __init__(
        self, config: ConvnextConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dims, depths = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dims[-1]
        self.convnext = ConvNeXt(
            in_chans=channels, num_classes=0, drop_path_rate=config.drop_path, **timm_architecture(config)
        )
        for block in self.blocks():
            block.__class__ = SkippingBlock  # timm builds its blocks itself; ours differ in `forward`, not in state
        self.make_mask_token(dims[0], mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return rearrange(self.convnext.stem(images), "b d h w -> b h w d")

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        kept: dict[int, Tensor] = {}
        index = 0
        cells = rearrange(tokens, "b h w d -> b d h w")
        for stage in self.convnext.stages:
            cells = stage.downsample(cells)
            for block in stage.blocks:
                cells = block(cells, paths[index])
                if index in wanted:
                    kept[index] = rearrange(cells, "b d h w -> b h w d")
                index += 1
        return rearrange(cells, "b d h w -> b h w d"), kept

    def _features(self, tokens: Tensor, units: Tensor | None) -> Features:
        """The pooled feature is the norm of the mean, in DINOv3's and timm's ConvNeXt alike."""
        mean = reduce(tokens, "b h w d -> b 1 1 d", "mean")
        if tokens.shape[-1] == self.dim:
            mean = self.final_norm(mean)
        return super()._features(tokens, units)._replace(pooled=rearrange(mean, "b 1 1 d -> b d"))

    def final_norm(self, states: Tensor) -> Tensor:
        """The norm of the channels, which come last here and first in timm's head."""
        norm = self.convnext.head.norm
        return nn.functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def inner(self) -> nn.Module:
        return self.convnext

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.convnext.stages for block in stage.blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "head" in parts:
            return self.depth + 1
        if "stages" not in parts:
            return 0
        part = parts[parts.index("stages") + 1 :]  # such as 2.blocks.0.mlp.fc1.weight
        before = sum(self.depths[: int(part[0])])
        return before + 1 + (int(part[2]) if part[1] == "blocks" else 0)


class SkippingBlock(ConvNeXtBlock):
    """timm's block, which computes the path that is kept alone."""

    def forward(self, x: Tensor, paths: Any = None) -> Tensor:
        """x (b, d, h, w) and `drop_path.Paths`, of which a block of one branch takes the first."""

        def branch(part: Tensor, _: Tensor | None) -> Tensor:
            mixed = self.mlp(self.norm(rearrange(self.conv_dw(part), "b d h w -> b h w d")))
            if self.gamma is not None:
                mixed = self.gamma * mixed
            return rearrange(mixed, "b h w d -> b d h w")

        return drop_path.add_branch(x, branch, self.drop_path, None if paths is None else paths.attention)
