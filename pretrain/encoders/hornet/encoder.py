"""HorNet (Rao et al. 2022): high-order spatial interactions by recursive gated convolutions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.base import Features
from pretrain.encoders.compact import Compact
from pretrain.encoders.hornet.config import HorNetConfig
from pretrain.encoders.hornet.gated import EPS, GatedConvolution
from pretrain.encoders.pyramid import Pyramid


class HorNetEncoder(Pyramid):
    """HorNet behind the Encoder seam; `self.hornet` has the official weights' names, for images of any size.

    Patches and what lies between stages don't overlap. The gated convolutions of a compact map see the units that were
    moved beside each other, never hidden ones. `pooled` is the authors': the norm of the mean of the last map.
    """

    pixel_weights = ("downsample_layers.0.0.weight",)

    def __init__(
        self, config: HorNetConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dim * 2 ** (len(depths) - 1)
        self.hornet = HorNet(config, channels)
        self.make_mask_token(dim, mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.hornet.downsample_layers[0](images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        paths = drop_path.paths_of(self.blocks(), tokens.shape[0], tokens.device)
        kept: dict[int, Tensor] = {}
        index = 0
        for stage, blocks in enumerate(self.hornet.stages):
            if stage:
                tokens = self.hornet.downsample_layers[stage](tokens)
            for block in blocks:
                tokens = block(tokens, paths[index])
                if index in wanted:
                    kept[index] = tokens
                index += 1
        return tokens, kept

    def _features(self, tokens: Tensor, units: Tensor | None) -> Features:
        features = super()._features(tokens, units)
        if tokens.shape[-1] != self.dim:
            return features
        return features._replace(pooled=self.final_norm(tokens.mean(dim=(1, 2))))

    def final_norm(self, states: Tensor) -> Tensor:
        return self.hornet.norm(states)

    def inner(self) -> nn.Module:
        return self.hornet

    def blocks(self) -> list[nn.Module]:
        return [block for blocks in self.hornet.stages for block in blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        found = next((name for name in ("stages", "downsample_layers") if name in parts), None)
        if found is None:
            return self.depth + 1 if "norm" in parts else 0
        stage, place = (int(part) for part in parts[parts.index(found) + 1 :][:2])
        before = sum(self.depths[:stage])
        if found == "stages":
            return before + place + 1
        return before + 1 if stage else 0


class HorNet(nn.Module):
    """Under the official names: downsample_layers.N, stages.N.M, norm."""

    def __init__(self, config: HorNetConfig, channels: int) -> None:
        super().__init__()
        dim, depths = config.shape
        rates = iter(np.linspace(0, config.drop_path, sum(depths)).tolist())
        self.downsample_layers = nn.ModuleList([Stem(channels, dim, config.patch)])
        self.stages = nn.ModuleList()
        settings = zip(depths, config.orders, config.stage_filters, strict=True)
        for stage, (depth, order, frequencies) in enumerate(settings):
            width = dim * 2**stage
            if stage:
                self.downsample_layers.append(Halving(width // 2, width))
            self.stages.append(
                nn.Sequential(
                    *(HorBlock(width, order, config.gate_scale, frequencies, next(rates)) for _ in range(depth))
                )
            )
        self.norm = nn.LayerNorm(width, eps=EPS)
        _initialise(self)


class HorBlock(nn.Module):
    """Norm, gated convolution, norm, MLP, each with a scale and a residual."""

    def __init__(
        self, dim: int, order: int, gate_scale: float, frequencies: tuple[int, int] | None, drop_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.gnconv = GatedConvolution(dim, order, gate_scale, frequencies)
        self.gamma1 = nn.Parameter(torch.full((dim,), 1e-6))
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma2 = nn.Parameter(torch.full((dim,), 1e-6))
        self.drop_path = DropPath(drop_rate) if drop_rate > 0 else nn.Identity()

    def forward(self, tokens: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        """tokens (b, h, w, d)."""
        mixing, mlp = paths or (None, None)
        tokens = drop_path.add_branch(
            tokens, lambda part, _: self.gamma1 * self.gnconv(self.norm1(part)), self.drop_path, mixing
        )
        return drop_path.add_branch(tokens, lambda part, _: self.gamma2 * self._mlp(part), self.drop_path, mlp)

    def _mlp(self, tokens: Tensor) -> Tensor:
        return self.pwconv2(F.gelu(self.pwconv1(self.norm2(tokens))))


class Stem(nn.Sequential):
    """Patches by a convolution with kernel = stride, and a norm: (b, c, h, w) -> (b, h / patch, w / patch, d)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__(nn.Conv2d(channels, dim, patch, stride=patch), nn.LayerNorm(dim, eps=EPS))

    def forward(self, images: Tensor) -> Tensor:
        project, norm = self
        return norm(rearrange(project(images), "b d h w -> b h w d"))


class Halving(nn.Sequential):
    """A norm, and 2x2 tokens to one: (b, h, w, d) -> (b, h / 2, w / 2, out)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(nn.LayerNorm(dim, eps=EPS), nn.Conv2d(dim, out, 2, stride=2))

    def forward(self, tokens: Tensor) -> Tensor:
        norm, project = self
        return rearrange(project(rearrange(norm(tokens), "b h w d -> b d h w")), "b d h w -> b h w d")


def _initialise(model: nn.Module) -> None:
    """As ConvNeXt: linear layers and convolutions N(0, .02) truncated; biases zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
