"""The pyramid vision transformer, version 1 (Wang et al. 2021), and UM-MAE's variant of it (Li et al. 2022)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.base import Features
from pretrain.encoders.compact import Compact
from pretrain.encoders.patches import sincos_positions
from pretrain.encoders.pvt.blocks import PatchMerge, PatchProjection, PvtBlock
from pretrain.encoders.pvt.config import PvtConfig
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.tables import built_once


class PvtEncoder(Pyramid):
    """PVT v1 behind the Encoder seam; `self.pvt` has the official weights' names.

    `reduction: conv` is the official model, whose class token joins in the last stage. `reduction: pool` is UM-MAE's:
    on the compact map of the visible units, half as wide, keys and values are pooled half as much, with one set of
    weights for both.
    """

    pixel_weights = ("patch_embed1.proj.weight", "patch_embed.proj.weight")

    def __init__(
        self, config: PvtConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dims, depths = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depths, self.depth, self.dim = depths, sum(depths), dims[-1]
        self.has_class_token = config.reduction == "conv"
        self.pvt = (ConvPvt if self.has_class_token else PoolPvt)(config, image_size, channels)
        self.make_mask_token(dims[0], mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.pvt.embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        return self.pvt.run(tokens, compact, wanted)

    def _features(self, tokens: Tensor, units: Tensor | None) -> Features:
        if not isinstance(tokens, tuple):
            return super()._features(tokens, units)
        tokens, prefix = tokens
        prefix = self.final_norm(prefix)
        return super()._features(tokens, units)._replace(prefix_tokens=prefix, pooled=prefix[:, 0])

    def inner(self) -> nn.Module:
        return self.pvt

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.pvt.position_grid(key)

    def final_norm(self, states: Tensor) -> Tensor:
        return self.pvt.norm(states)

    def blocks(self) -> list[nn.Module]:
        return self.pvt.all_blocks()

    def layer_of(self, parameter_name: str) -> int:
        name = parameter_name.removeprefix("encoder.")
        return self.pvt.layer_of(name.removeprefix("pvt.")) if name.startswith("pvt.") else 0

    def no_decay(self, parameter_name: str) -> bool:
        return "pos_embed" in parameter_name  # one table a stage, numbered


class ConvPvt(nn.Module):
    """The official PVT v1, under its names: patch_embedN, pos_embedN, blockN, cls_token, norm."""

    def __init__(self, config: PvtConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        dims, depths = config.shape
        self.num_stages = len(dims)
        rates = iter(np.linspace(0, config.drop_path, sum(depths)).tolist())
        grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.grids = [(grid[0] // 2**stage, grid[1] // 2**stage) for stage in range(self.num_stages)]
        previous, last = channels, self.num_stages - 1
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            height, width = self.grids[stage]
            setattr(self, f"patch_embed{stage + 1}", PatchProjection(previous, dim, config.patch if stage == 0 else 2))
            setattr(self, f"pos_embed{stage + 1}", nn.Parameter(torch.zeros(1, height * width + (stage == last), dim)))
            blocks = [
                PvtBlock(
                    dim, config.heads[stage], config.mlp_ratios[stage], config.sr[stage], next(rates), False, eps=1e-6
                )
                for _ in range(depth)
            ]
            setattr(self, f"block{stage + 1}", nn.ModuleList(blocks))
            previous = dim
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        _initialise(self)

    def embed(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h, w, d) of the first stage."""
        return self.patch_embed1(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple:
        """See `Pyramid.run`; outputs of the last stage are (map, class token)."""
        paths = drop_path.paths_of(self.all_blocks(), tokens.shape[0], tokens.device)
        kept: dict = {}
        index = 0
        for stage in range(self.num_stages):
            if stage:
                tokens = getattr(self, f"patch_embed{stage + 1}")(rearrange(tokens, "b h w d -> b d h w"))
            grid = (tokens.shape[1], tokens.shape[2])
            prefix_position, positions = self._positions(stage, grid, compact)
            tokens = rearrange(tokens + positions, "b h w d -> b (h w) d")
            last = stage == self.num_stages - 1
            if last:
                prefix = (self.cls_token + prefix_position).expand(tokens.shape[0], -1, -1)
                tokens = torch.cat([prefix, tokens], dim=1)
            for block in getattr(self, f"block{stage + 1}"):
                tokens = block(tokens, grid, 1, paths[index])
                if index in wanted:
                    kept[index] = _split(tokens, grid, last)
                index += 1
            split = _split(tokens, grid, last)
            tokens = split if last else rearrange(tokens, "b (h w) d -> b h w d", h=grid[0])
        return tokens, kept

    def _positions(self, stage: int, grid: tuple[int, int], compact: Compact | None) -> tuple[Tensor, Tensor]:
        """Of the class token (1, p, d) and of the map (b, h, w, d), interpolated linearly, and compact if asked."""
        positions = getattr(self, f"pos_embed{stage + 1}")
        built = self.grids[stage]
        num_prefix = positions.shape[1] - built[0] * built[1]
        prefix, positions = positions[:, :num_prefix], positions[:, num_prefix:]
        positions = rearrange(positions, "1 (h w) d -> 1 d h w", h=built[0])
        whole = grid if compact is None else (2 * grid[0], 2 * grid[1])
        if whole != built:
            positions = F.interpolate(positions.float(), size=whole, mode="bilinear")
        positions = rearrange(positions, "1 d h w -> 1 h w d")
        return prefix, positions if compact is None else compact.positions(positions)

    def position_grid(self, key: str) -> tuple[int, int]:
        """See `Encoder.position_grid`."""
        return self.grids[int(key.removeprefix("pos_embed")) - 1]

    def all_blocks(self) -> list[nn.Module]:
        """All stages' blocks in order."""
        return [block for stage in range(self.num_stages) for block in getattr(self, f"block{stage + 1}")]

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`; a stage's patch embedding and positions belong to its first block."""
        head, *rest = name.split(".")
        total = len(self.all_blocks())
        if head == "norm":
            return total + 1
        if head == "cls_token":
            return total - len(getattr(self, f"block{self.num_stages}")) + 1
        stage = int(head[-1]) - 1
        before = sum(len(getattr(self, f"block{earlier + 1}")) for earlier in range(stage))
        if head.startswith("block"):
            return before + int(rest[0]) + 1
        return before + 1 if stage else 0


class PoolPvt(nn.Module):
    """UM-MAE's PVT, under its names: patch_embed, pos_embed (fixed sin-cos), blocks.N with .downsample, norm."""

    def __init__(self, config: PvtConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        dims, depths = config.shape
        rates = iter(np.linspace(0, config.drop_path, sum(depths)).tolist())
        self.patch_embed = PatchProjection(channels, dims[0], config.patch, norm=False)
        grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.pos_embed = nn.Parameter(sincos_positions(dims[0], grid)[None], requires_grad=False)
        self.grid = grid
        blocks = []
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            for position in range(depth):
                first = stage > 0 and position == 0
                blocks.append(
                    PvtBlock(
                        dim, config.heads[stage], config.mlp_ratios[stage], config.sr[stage], next(rates), True,
                        eps=1e-6, downsample=PatchMerge(dims[stage - 1], dim) if first else None,
                    )
                )  # fmt: skip
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        _initialise(self)

    def embed(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h, w, d) of the first stage."""
        return self.patch_embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """See `Pyramid.run`."""
        grid = (tokens.shape[1], tokens.shape[2])
        whole = grid if compact is None else (2 * grid[0], 2 * grid[1])
        positions = self.pos_embed if whole == self.grid else _fixed_positions(tokens.shape[-1], whole, tokens.device)
        positions = rearrange(positions, "... (h w) d -> (...) h w d", h=whole[0])
        tokens = tokens + (positions if compact is None else compact.positions(positions))
        tokens = rearrange(tokens, "b h w d -> b (h w) d")
        paths = drop_path.paths_of(self.blocks, tokens.shape[0], tokens.device)
        kept = {}
        for index, block in enumerate(self.blocks):
            if block.downsample is not None:
                grid = (grid[0] // 2, grid[1] // 2)
            sr = block.attn.sr_ratio
            # the compact map is half as wide: half the pooling leaves cells of the same number and size
            tokens = block(tokens, grid, sr if compact is None else max(1, sr // 2), paths[index])
            if index in wanted:
                kept[index] = rearrange(tokens, "b (h w) d -> b h w d", h=grid[0])
        return rearrange(tokens, "b (h w) d -> b h w d", h=grid[0]), kept

    def position_grid(self, key: str) -> tuple[int, int]:
        """See `Encoder.position_grid`."""
        return self.grid

    def all_blocks(self) -> list[nn.Module]:
        """All stages' blocks in order."""
        return list(self.blocks)

    def layer_of(self, name: str) -> int:
        """See `Encoder.layer_of`."""
        head, *rest = name.split(".")
        if head == "norm":
            return len(self.blocks) + 1
        return int(rest[0]) + 1 if head == "blocks" else 0


@built_once
def _fixed_positions(dim: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    return sincos_positions(dim, grid).to(device)


def _split(tokens: Tensor, grid: tuple[int, int], has_prefix: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens (b, n, d) as a map, with the class token beside it where there is one."""
    if not has_prefix:
        return rearrange(tokens, "b (h w) d -> b h w d", h=grid[0])
    return rearrange(tokens[:, 1:], "b (h w) d -> b h w d", h=grid[0]), tokens[:, :1]


def _initialise(model: nn.Module) -> None:
    """As the official code: linear layers, tokens and learned positions N(0, .02) truncated; biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (name.startswith("pos_embed") or name == "cls_token"):
            nn.init.trunc_normal_(parameter, std=0.02)
