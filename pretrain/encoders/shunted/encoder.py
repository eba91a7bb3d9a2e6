"""The Shunted Transformer (Ren et al. 2022): tokens of several scales within one layer's attention."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.compact import Compact
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.shunted.blocks import EPS, OverlappingMerge, ShuntedBlock, Stem
from pretrain.encoders.shunted.config import ShuntedConfig


class ShuntedEncoder(Pyramid):
    """The Shunted Transformer behind the Encoder seam; `self.shunted` has the official weights' names.

    Its stem and its merges overlap, so hidden pixels are zeroed before they are embedded. On a compact map the
    overlaps and the depth-wise convolutions see the units that were moved beside each other, never hidden ones.
    """

    overlapping = True
    pixel_weights = ("patch_embed1.conv.0.weight",)

    def __init__(
        self, config: ShuntedConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dims, depths, _ = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dims[-1]
        self.shunted = Shunted(config, channels)
        self.make_mask_token(dims[0], mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.shunted.patch_embed1(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        kept: dict[int, Tensor] = {}
        index = 0
        for number in range(1, len(self.depths) + 1):
            if number > 1:  # every stage ends with a norm; the last one's is the final norm
                tokens = getattr(self.shunted, f"norm{number - 1}")(tokens)
                tokens = getattr(self.shunted, f"patch_embed{number}")(tokens)
            for block in getattr(self.shunted, f"block{number}"):
                tokens = block(tokens, paths[index])
                if index in wanted:
                    kept[index] = tokens
                index += 1
        return tokens, kept

    def final_norm(self, states: Tensor) -> Tensor:
        return getattr(self.shunted, f"norm{len(self.depths)}")(states)

    def inner(self) -> nn.Module:
        return self.shunted

    def blocks(self) -> list[nn.Module]:
        stages = range(1, len(self.depths) + 1)
        return [block for number in stages for block in getattr(self.shunted, f"block{number}")]

    def layer_of(self, parameter_name: str) -> int:
        head, *rest = parameter_name.removeprefix("encoder.").removeprefix("shunted.").split(".")
        if head == "mask_token":
            return 0
        stage = int(head[-1]) - 1
        before = sum(self.depths[:stage])
        if head.startswith("block"):
            return before + int(rest[0]) + 1
        if head.startswith("norm"):
            return before + self.depths[stage] + (stage == len(self.depths) - 1)
        return before + 1 if stage else 0


class Shunted(nn.Module):
    """Under the official names: patch_embedN, blockN, normN."""

    def __init__(self, config: ShuntedConfig, channels: int) -> None:
        super().__init__()
        dims, depths, further = config.shape
        rates = iter(np.linspace(0, config.drop_path, sum(depths)).tolist())
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            embed = OverlappingMerge(dims[stage - 1], dim) if stage else Stem(channels, dim, further)
            setattr(self, f"patch_embed{stage + 1}", embed)
            settings = (dim, config.heads[stage], config.mlp_ratios[stage], config.sr[stage])
            blocks = nn.ModuleList(ShuntedBlock(*settings, next(rates)) for _ in range(depth))
            setattr(self, f"block{stage + 1}", blocks)
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(dim, eps=EPS))
        _initialise(self)


def _initialise(model: nn.Module) -> None:
    """As PVT v2: linear layers N(0, .02) truncated, convolutions N(0, 2 / fan out); biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
