"""The vision transformer (Dosovitskiy et al. 2021) over timm, with tokens dropped or replaced before the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
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
from pretrain.encoders.patches import sincos_1d_positions, sincos_positions
from pretrain.encoders.places import ConditionalPositions, Place, Spot, attend_at
from pretrain.encoders.positions import resize_line, resize_positions
from pretrain.encoders.relative import RelativeBias, RelativeShift
from pretrain.encoders.rotary import packed_turns, turns_of
from pretrain.encoders.vit import native, placeless
from pretrain.encoders.vit.config import VitConfig, takes_own_shape
from pretrain.encoders.vit.parts import block_of, mlp_of, norm_of
from pretrain.encoders.vit.stems import OVERLAPPING, STEMS
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
            embed_layer=STEMS[config.stem],
            pre_norm=config.pre_norm,
            **mlp_of(config),
            norm_layer=norm_of(config),
        )
        for block in self.vit.blocks:
            block.__class__ = SkippingBlock  # timm builds its blocks itself; ours differ in `forward`, not in state
        self.overlapping = config.stem in OVERLAPPING
        for token in self._prefix_tokens():
            nn.init.normal_(token, std=0.02)
        if config.positions in FIXED:
            self.vit.pos_embed.requires_grad_(False)
            self.vit.pos_embed.zero_()
            self.vit.pos_embed[:, self.vit.num_prefix_tokens :] = FIXED[config.positions](self.dim, self.grid)
        elif config.positions != "learned":
            self.vit.pos_embed = None
        self.takes_windows = self.vit.pos_embed is not None
        self.native = takes_own_shape(config)
        if config.positions == "conditional":
            self.vit.conditional = ConditionalPositions(self.dim)
        for block in self.vit.blocks:
            teach_positions(block, config, self.grid)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if mask_token else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Any, mask: Any = None, layers: tuple[int, ...] = ()) -> Any:
        if isinstance(images, PackedImages):
            return native.encode(self, images, mask or PackedMask(), layers)
        if not isinstance(images, Tensor):
            return self._forward_packed(list(zip(images, mask or [None] * len(images), strict=True)))
        if mask is not None and mask.unseen is not None:
            return placeless.encode(self, images, mask, layers)
        tokens, grid, units = self.embed(images, mask)
        wanted = {index % self.depth for index in layers}
        kept = {}
        paths = drop_path.paths_of(self.vit.blocks, images.shape[0], images.device)
        places = self._places([(grid, units)], None, images.device)
        for index, (block, path, place) in enumerate(zip(self.vit.blocks, paths, places, strict=True)):
            tokens = block(tokens, path, None, place)
            if index == 0 and self.config.positions == "conditional":
                tokens = self.vit.conditional(tokens, place)
            if index in wanted:
                kept[index] = tokens
        earlier = tuple(self.features_of(kept[index % self.depth], grid, units) for index in layers)
        return self.features_of(tokens, grid, units)._replace(layers=earlier)

    def _forward_packed(self, passes: Sequence[tuple[Tensor, Mask | None]]) -> tuple[Features, ...]:
        embedded = [self.embed(images, mask) for images, mask in passes]
        packed = Packed.of([tokens for tokens, _, _ in embedded])
        tokens, groups = packed.tokens, tuple((part.shape[0], part.shape[1]) for part, _, _ in embedded)
        paths = packed_paths(self.vit.blocks, groups, tokens.device)
        places = self._places([(grid, units) for _, grid, units in embedded], groups, tokens.device)
        for index, (block, path, place) in enumerate(zip(self.vit.blocks, paths, places, strict=True)):
            tokens = block(tokens, path, groups, place)
            if index == 0 and self.config.positions == "conditional":
                tokens = self.vit.conditional(tokens, place)
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
        prefix_positions = None
        if self.vit.pos_embed is not None:
            prefix_positions, positions = self.positions(grid)
            tokens = tokens + positions
        units = None
        if dropped is not None:
            units = dropped.visible_ids()
            tokens = tokens.gather(1, repeat(units, "b n -> b n d", d=self.dim))
        if self.vit.num_prefix_tokens:
            tokens = torch.cat([self.prefix(images.shape[0], prefix_positions), tokens], dim=1)
        return self.vit.norm_pre(tokens), grid, units

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

    def prefix(self, batch: int, positions: Tensor | None) -> Tensor:
        """The prefix tokens (batch, p, d) with these positions (1, p, d)."""
        tokens = torch.cat(self._prefix_tokens(), dim=1)
        return (tokens if positions is None else tokens + positions).expand(batch, -1, -1)

    def _places(
        self, spots: Sequence[tuple[tuple[int, int], Tensor | None]], groups: Groups | None, device: torch.device
    ) -> Sequence[Place | None]:
        """For each block where the tokens lie, of positions that are not added to them before the first."""
        return places_of(self.config, self.vit.num_prefix_tokens, self.depth, spots, groups, device, self.training)

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions of the prefix tokens (1, p, d) and of a `grid` of patches (1, n, d)."""
        num_prefix = self.vit.num_prefix_tokens
        prefix, positions = self.vit.pos_embed[:, :num_prefix], self.vit.pos_embed[:, num_prefix:]
        return prefix, resize_positions(positions, self.grid, grid, self.config.interpolation)

    def inner(self) -> nn.Module:
        return self.vit

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.grid

    def final_norm(self, states: Tensor) -> Tensor:
        return self.vit.norm(states)

    def further_blocks(self, count: int, after: int) -> nn.Module:
        return FurtherBlocks(self.config, count, after, self.grid, self.vit.num_prefix_tokens)

    def windowed(self, windows: Windows) -> nn.Module:
        if not self.takes_windows:
            raise ValueError(
                f"a ViT of positions={self.config.positions} has no form of windows; learned and sin-cos ones have"
            )
        return WindowedVit(self, windows)

    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if "norm" in parts and "patch_embed" not in parts else 0

    def no_decay(self, parameter_name: str) -> bool:
        return parameter_name.endswith(("relative_rows", "relative_columns"))

    def resized(self, key: str, value: Tensor, wanted: Tensor) -> Tensor | None:
        line = key.endswith(("relative_rows", "relative_columns")) and value.shape[1] == wanted.shape[1]
        return resize_line(value, len(wanted)) if line and value.shape != wanted.shape else None


class SkippingBlock(Block):
    """timm's block, which computes the paths that are kept and no others."""

    relative: nn.Module | None

    def forward(
        self, x: Tensor, paths: Any = None, groups: Groups | None = None, place: Place | placeless.Context | None = None
    ) -> Tensor:
        """x (b, n, d) and `drop_path.Paths`; or packed tokens (t, d), their `groups` and `packed_paths`.

        place: where the tokens lie, for positions that attention reads, or what alone is attended to.
        """
        (attention, left), (mlp, _) = ((path, None) for path in paths or (None, None)) if groups is None else paths

        def projected(values: Tensor) -> Tensor:
            return self.ls1(self.attn.proj(self.attn.norm(values)))

        def attend(part: Tensor, rows: Tensor | None) -> Tensor:
            normed = self.norm1(part)
            if isinstance(place, placeless.Context):
                return projected(place.attend(self.attn, self.norm1, normed, rows))
            if place is not None and (place.turn is not None or self.relative is not None):
                qkv = self.attn.qkv(normed)
                return projected(attend_at(place, qkv, self.attn.num_heads, self.relative, rows, left))
            if left is None:
                return self.ls1(self.attn(normed))
            return projected(attend_packed(self.attn.qkv(normed), self.attn.num_heads, left))

        x = drop_path.add_branch(x, attend, self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.ls2(self.mlp(self.norm2(part))), self.drop_path2, mlp)


class FurtherBlocks(nn.Module):
    """Fresh blocks like those after the first `after` of a `VitEncoder`, initialised as timm does it."""

    def __init__(self, config: VitConfig, count: int, after: int, grid: tuple[int, int], num_prefix: int) -> None:
        super().__init__()
        dim, depth, heads = config.shape
        self.config, self.num_prefix = config, num_prefix
        self.blocks = nn.ModuleList(
            SkippingBlock(dim, heads, drop_path=rate, **block_of(config))
            for rate in drop_path_rates(config.drop_path, depth, after, count)
        )
        named_apply(init_weights_vit_timm, self.blocks)
        for block in self.blocks:
            teach_positions(block, config, grid)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """States (b, p + n, d) on a map of `grid` patches to states."""
        paths = drop_path.paths_of(self.blocks, states.shape[0], states.device, drop_path.FURTHER)
        spots, count = [(grid, None)], len(self.blocks)
        places = places_of(self.config, self.num_prefix, count, spots, None, states.device, self.training)
        for block, path, place in zip(self.blocks, paths, places, strict=True):
            states = block(states, path, None, place)
        return states


#: Positions that are a fixed table.
FIXED = {"sincos": sincos_positions, "sincos_1d": sincos_1d_positions}


def teach_positions(block: SkippingBlock, config: VitConfig, grid: tuple[int, int]) -> None:
    """Give a block the positions between tokens that its settings ask for."""
    dim, _, heads = config.shape
    if config.positions == "relative_bias":
        block.relative = RelativeBias(heads, grid, prefix=config.class_token)
    elif config.positions == "relative_shift":
        block.relative = RelativeShift(dim // heads, grid)
    else:
        block.relative = None


def places_of(
    config: VitConfig,
    num_prefix: int,
    blocks: int,
    spots: Sequence[tuple[tuple[int, int], Tensor | None]],
    groups: Groups | None,
    device: torch.device,
    training: bool,
) -> Sequence[Place | None]:
    """For each of the `blocks` where the tokens of a pass lie: on the `spots`' grids, and on which units of them."""
    if config.positions in ("learned", "none", *FIXED):
        return [None] * blocks
    place = Place(num_prefix, tuple(Spot(*spot) for spot in spots), groups)
    if config.positions != "rotary":
        return [place] * blocks
    dim, _, heads = config.shape
    each = [turns_of(config.rotary, *spot, dim // heads, num_prefix, blocks, device, training) for spot in spots]
    turns = each[0] if groups is None else packed_turns(each, groups)
    return [place._replace(turn=turn) for turn in turns]
