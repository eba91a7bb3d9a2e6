"""The vision transformer (Dosovitskiy et al. 2021) over timm, with tokens dropped or replaced before the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from timm.layers import PatchEmbed
from timm.models import named_apply
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.base import (
    Encoder,
    Features,
    Mask,
    Windows,
    drop_path_rates,
    on_token_grid,
    zero_hidden_pixels,
)
from pretrain.encoders.native import PackedImages, PackedMask
from pretrain.encoders.packed import Groups, Packed, attend_packed, in_groups, packed_paths
from pretrain.encoders.patches import sincos_positions
from pretrain.encoders.positions import resize_positions
from pretrain.encoders.vit import native
from pretrain.encoders.vit.config import VitConfig
from pretrain.encoders.vit.windowed import WindowedVit


class VitEncoder(Encoder):
    """A timm VisionTransformer (`self.vit`, whose weights load in timm as they are) behind the Encoder seam.

    Positions are interpolated when the image has another size than `image_size`, as DINO does it. With DeiT's
    distillation token it is timm's VisionTransformerDistilled; the token follows the class token in the prefix, and
    `pool: class` is the mean of the two, as timm reads them (Touvron et al. 2021, section 4).
    """

    pixel_weights = ("patch_embed.proj.weight", "patch_embed.convs.0.weight")
    packs = True
    takes_windows = True

    def __init__(
        self, config: VitConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth, heads = config.shape
        self.stride = self.patch = config.patch
        self.has_class_token = config.class_token
        self.pool = config.pool
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.num_pooled = 2 if config.distillation_token else 1
        model = VisionTransformerDistilled if config.distillation_token else VisionTransformer
        pooled_token = config.pool == "class" or config.distillation_token  # the distilled model knows no other pool
        self.vit = model(
            img_size=image_size,
            patch_size=config.patch,
            in_chans=channels,
            num_classes=0,
            global_pool="token" if pooled_token else "avg",
            fc_norm=False,
            embed_dim=self.dim,
            depth=self.depth,
            num_heads=heads,
            init_values=config.layer_scale,
            class_token=config.class_token,
            reg_tokens=config.registers,
            dynamic_img_size=True,
            drop_path_rate=config.drop_path,
            embed_layer=ConvStem if config.stem == "conv" else PatchEmbed,
            norm_layer=_norm,
        )
        for block in self.vit.blocks:
            block.__class__ = SkippingBlock  # timm builds its blocks itself; ours differ in `forward`, not in state
        self.overlapping = config.stem == "conv"
        self.native = not self.overlapping
        for token in self._prefix_tokens():
            nn.init.normal_(token, std=0.02)
        if config.positions == "sincos":
            self.vit.pos_embed.requires_grad_(False)
            self.vit.pos_embed.zero_()
            self.vit.pos_embed[:, self.vit.num_prefix_tokens :] = sincos_positions(self.dim, self.grid)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if mask_token else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Any, mask: Any = None, layers: tuple[int, ...] = ()) -> Any:
        if isinstance(images, PackedImages):
            return native.encode(self, images, mask or PackedMask(), layers)
        if not isinstance(images, Tensor):
            return self._forward_packed(list(zip(images, mask or [None] * len(images), strict=True)))
        tokens, grid, units = self.embed(images, mask)
        wanted = {index % self.depth for index in layers}
        kept = {}
        paths = drop_path.paths_of(self.vit.blocks, images.shape[0], images.device)
        for index, (block, path) in enumerate(zip(self.vit.blocks, paths, strict=True)):
            tokens = block(tokens, path)
            if index in wanted:
                kept[index] = tokens
        earlier = tuple(self.features_of(kept[index % self.depth], grid, units) for index in layers)
        return self.features_of(tokens, grid, units)._replace(layers=earlier)

    def _forward_packed(self, passes: Sequence[tuple[Tensor, Mask | None]]) -> tuple[Features, ...]:
        embedded = [self.embed(images, mask) for images, mask in passes]
        packed = Packed.of([tokens for tokens, _, _ in embedded])
        tokens, groups = packed.tokens, tuple((part.shape[0], part.shape[1]) for part, _, _ in embedded)
        paths = packed_paths(self.vit.blocks, groups, tokens.device)
        for block, path in zip(self.vit.blocks, paths, strict=True):
            tokens = block(tokens, path, groups)
        states = in_groups(tokens, groups)
        return tuple(self.features_of(part, *rest) for part, (_, *rest) in zip(states, embedded, strict=True))

    def embed(self, images: Tensor, mask: Mask | None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """The tokens (b, p + n, d) that the first block sees, the grid, and the units that were not dropped."""
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        dropped, replaced = on_token_grid(mask, grid)
        if self.overlapping:
            images = zero_hidden_pixels(images, None if dropped is None else dropped.drop, replaced)
        tokens = rearrange(self.vit.patch_embed(images), "b h w d -> b (h w) d")
        if replaced is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            hidden = rearrange(replaced, "b h w -> b (h w) 1")
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        prefix_positions, positions = self.positions(grid)
        tokens = tokens + positions
        units = None
        if dropped is not None:
            units = dropped.visible_ids()
            tokens = tokens.gather(1, repeat(units, "b n -> b n d", d=self.dim))
        tokens = torch.cat([self.prefix(images.shape[0], prefix_positions), tokens], dim=1)
        return tokens, grid, units

    def features_of(self, states: Tensor, grid: tuple[int, int], units: Tensor | None) -> Features:
        """The Features of states (b, p + n, d), before the final norm, on a map of `grid` patches."""
        tokens = self.vit.norm(states)
        num_prefix = self.vit.num_prefix_tokens
        prefix, tokens = tokens[:, :num_prefix], tokens[:, num_prefix:]
        return Features(
            tokens=tokens,
            prefix_tokens=prefix if num_prefix else None,
            grid=grid if units is None else None,
            ids_keep=None if units is None else rearrange(units, "b n -> b n 1"),
            pooled=prefix[:, : self.num_pooled].mean(dim=1) if self.pool == "class" else tokens.mean(dim=1),
            states=states,
        )

    def _prefix_tokens(self) -> list[nn.Parameter]:
        tokens = (self.vit.cls_token, getattr(self.vit, "dist_token", None), self.vit.reg_token)
        return [token for token in tokens if token is not None]

    def prefix(self, batch: int, positions: Tensor) -> Tensor:
        """The prefix tokens (batch, p, d) with these positions (1, p, d)."""
        tokens = self._prefix_tokens()
        if not tokens:
            return positions.expand(batch, -1, -1)
        return (torch.cat(tokens, dim=1) + positions).expand(batch, -1, -1)

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions of the prefix tokens (1, p, d) and of a `grid` of patches (1, n, d)."""
        num_prefix = self.vit.num_prefix_tokens
        prefix, positions = self.vit.pos_embed[:, :num_prefix], self.vit.pos_embed[:, num_prefix:]
        return prefix, resize_positions(positions, self.grid, grid)

    def inner(self) -> nn.Module:
        return self.vit

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.grid

    def final_norm(self, states: Tensor) -> Tensor:
        return self.vit.norm(states)

    def further_blocks(self, count: int, after: int) -> nn.Module:
        return FurtherBlocks(self.config, count, after)

    def windowed(self, windows: Windows) -> nn.Module:
        return WindowedVit(self, windows)

    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if "norm" in parts else 0


class SkippingBlock(Block):
    """timm's block, which computes the paths that are kept and no others."""

    def forward(self, x: Tensor, paths: Any = None, groups: Groups | None = None) -> Tensor:
        """x (b, n, d) and `drop_path.Paths`; or packed tokens (t, d), their `groups` and `packed_paths`."""
        (attention, left), (mlp, _) = ((path, None) for path in paths or (None, None)) if groups is None else paths

        def attend(part: Tensor, _: Tensor | None) -> Tensor:
            normed = self.norm1(part)
            if left is None:
                return self.ls1(self.attn(normed))
            return self.ls1(self.attn.proj(attend_packed(self.attn.qkv(normed), self.attn.num_heads, left)))

        x = drop_path.add_branch(x, attend, self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.ls2(self.mlp(self.norm2(part))), self.drop_path2, mlp)


class FurtherBlocks(nn.Module):
    """Fresh blocks like those after the first `after` of a `VitEncoder`, initialised as timm does it."""

    def __init__(self, config: VitConfig, count: int, after: int) -> None:
        super().__init__()
        dim, depth, heads = config.shape
        self.blocks = nn.ModuleList(
            SkippingBlock(
                dim,
                heads,
                qkv_bias=True,
                init_values=config.layer_scale,
                drop_path=rate,
                norm_layer=_norm,
            )
            for rate in drop_path_rates(config.drop_path, depth, after, count)
        )
        named_apply(init_weights_vit_timm, self.blocks)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """States (b, p + n, d) on a map of `grid` patches to states."""
        paths = drop_path.paths_of(self.blocks, states.shape[0], states.device, drop_path.FURTHER)
        for block, path in zip(self.blocks, paths, strict=True):
            states = block(states, path)
        return states


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions instead of one large patch projection (Early Convolutions, Xiao et al. 2021).

    The paper normalises over the batch; here it is over each image, so that the result does not depend on which
    images share a rank. Over the channels of each pixel it would give flat regions the weight of strokes.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        num_halvings = patch_size.bit_length() - 1
        width = in_chans
        for halving in range(num_halvings):
            out = max(8, embed_dim // 2 ** (num_halvings - halving))
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, out), nn.ReLU()]
            width = out
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, embed_dim, 1, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, h / patch, w / patch, d)."""
        return rearrange(self.proj(self.convs(images)), "b d h w -> b h w d")


def _norm(dim: int, **kwargs: Any) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, **kwargs)
