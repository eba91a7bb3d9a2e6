"""DINOv3's vision transformer (Simeoni et al. 2025) over timm's, with tokens dropped or replaced before the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import DropPath
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from pretrain.encoders import drop_path, rotary
from pretrain.encoders.base import Encoder, Features, Mask, on_token_grid
from pretrain.encoders.dinov3 import native
from pretrain.encoders.dinov3.config import Dinov3Config, takes_own_shape, timm_architecture
from pretrain.encoders.native import PackedImages, PackedMask
from pretrain.encoders.packed import Groups, Packed, in_groups, packed_paths

Embedded = tuple[Tensor, tuple[int, int], Tensor | None]


class Dinov3Encoder(Encoder):
    """A timm Eva (`self.vit`, whose weights load in timm as they are) behind the Encoder seam.

    There is no table of positions: images of any size take their angles from their own coordinates. Norms of class
    tokens alone, which timm has not, are `cls_norm` and `local_cls_norm` of the same module.
    """

    has_class_token = True
    packs = True

    def __init__(
        self, config: Dinov3Config, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth, heads, _, _ = config.shape
        self.width = self.dim // heads
        self.native = takes_own_shape(config)
        self.stride = self.patch = config.patch
        self.num_prefix = 1 + config.registers
        self.vit = Eva(
            img_size=image_size,
            in_chans=channels,
            num_classes=0,
            use_abs_pos_emb=False,
            use_fc_norm=False,
            dynamic_img_size=True,
            norm_layer=norm_of(config),
            **timm_architecture(config),
        )
        if config.class_norm:
            self.vit.cls_norm = norm_of(config)(self.dim)
        if config.local_class_norm:
            self.vit.local_cls_norm = norm_of(config)(self.dim)
        for block in self.vit.blocks:
            _teach(block, config.drop_path)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if mask_token else None
        self._initialise()

    def _initialise(self) -> None:
        """As DINOv3's code does it; the mask token starts at zero."""
        for token in (self.vit.cls_token, self.vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        self.vit.patch_embed.proj.reset_parameters()
        for block in self.vit.blocks:
            initialise_block(block)

    def forward(self, images: Any, mask: Any = None, layers: tuple[int, ...] = ()) -> Any:
        if isinstance(images, PackedImages):
            return native.encode(self, images, mask or PackedMask(), layers)
        if not isinstance(images, Tensor):
            return self._forward_packed(list(zip(images, mask or [None] * len(images), strict=True)))
        tokens, grid, units = self.embed(images, mask)
        wanted = {index % self.depth for index in layers}
        kept = {}
        paths = drop_path.paths_of(self.vit.blocks, images.shape[0], images.device)
        turns = self._turns(grid, units, images.device)
        for index, (block, turn, path) in enumerate(zip(self.vit.blocks, turns, paths, strict=True)):
            tokens = block(tokens, turn, path)
            if index in wanted:
                kept[index] = tokens
        earlier = tuple(self._features(kept[index % self.depth], grid, units) for index in layers)
        return self._features(tokens, grid, units)._replace(layers=earlier)

    def _forward_packed(self, passes: Sequence[tuple[Tensor, Mask | None]]) -> tuple[Features, ...]:
        embedded = [self.embed(images, mask) for images, mask in passes]
        tokens = Packed.of([tokens for tokens, _, _ in embedded]).tokens
        groups = tuple((part.shape[0], part.shape[1]) for part, _, _ in embedded)
        paths = packed_paths(self.vit.blocks, groups, tokens.device)
        each = [self._turns(grid, units, tokens.device) for _, grid, units in embedded]
        for block, turn, path in zip(self.vit.blocks, rotary.packed_turns(each, groups), paths, strict=True):
            tokens = block(tokens, turn, path, groups)
        return tuple(
            self._features(states, grid, units, local=number > 0)
            for number, (states, (_, grid, units)) in enumerate(zip(in_groups(tokens, groups), embedded, strict=True))
        )

    def embed(self, images: Tensor, mask: Mask | None) -> Embedded:
        """The tokens (b, p + n, d) that the first block sees, the grid, and the units that were not dropped."""
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        dropped, replaced = on_token_grid(mask, grid)
        tokens = rearrange(self.vit.patch_embed(images), "b h w d -> b (h w) d")
        if replaced is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            hidden = rearrange(replaced, "b h w -> b (h w) 1")
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        units = None
        if dropped is not None:
            units = dropped.visible_ids()
            tokens = tokens.gather(1, repeat(units, "b n -> b n d", d=self.dim))
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        return torch.cat([token.expand(len(tokens), -1, -1) for token in prefix] + [tokens], dim=1), grid, units

    def _turns(self, grid: tuple[int, int], units: Tensor | None, device: torch.device) -> list[Tensor]:
        return rotary.turns_of(
            self.config.rope, grid, units, self.width, self.num_prefix, self.depth, device, self.training
        )

    def _features(self, states: Tensor, grid: tuple[int, int], units: Tensor | None, local: bool = False) -> Features:
        normed = self.final_norm(states, local)
        prefix, tokens = normed[:, : self.num_prefix], normed[:, self.num_prefix :]
        return Features(
            tokens=tokens,
            prefix_tokens=prefix,
            grid=grid if units is None else None,
            ids_keep=None if units is None else rearrange(units, "b n -> b n 1"),
            pooled=prefix[:, 0] if self.config.pool == "class" else tokens.mean(dim=1),
            states=states,
        )

    def inner(self) -> nn.Module:
        return self.vit

    def final_norm(self, states: Tensor, local: bool = False) -> Tensor:
        """The norm after the last block; class and register tokens may have one of their own, and those of `local`
        crops another in training (the authors': of the second and later sizes of a pass)."""
        own = self.vit.cls_norm if self.config.class_norm else None
        if self.config.local_class_norm and self.training and local:
            own = self.vit.local_cls_norm
        if own is None:
            normed = self.vit.norm(states)
        else:
            prefix = own(states[:, : self.num_prefix])
            normed = torch.cat([prefix, self.vit.norm(states[:, self.num_prefix :])], dim=1)
        if self.config.local_class_norm and self.training and not local:  # a gradient of zero, not none, on any rank
            normed = normed + 0.0 * sum(parameter.sum() for parameter in self.vit.local_cls_norm.parameters())
        return normed

    def further_blocks(self, count: int, after: int) -> nn.Module:
        return FurtherBlocks(self.config, count)

    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if {"norm", "cls_norm", "local_cls_norm"} & set(parts) else 0


class RotaryAttention(EvaAttention):
    """timm's attention, whose queries and keys are turned; its keys have no bias, so no table of zeros is kept."""

    def project(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., 3 d), queries, keys and values side by side."""
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias)

    def forward(self, x: Tensor, turn: Tensor, groups: Groups | None = None) -> Tensor:
        """x (b, n, d) and turns (2, 1 or b, n, k); or packed tokens (t, d) with turns (2, t, k) and their `groups`."""
        return self.proj(rotary.attend_turned(self.project(x), self.num_heads, turn, groups))


class RotaryBlock(EvaBlock):
    """timm's block, which hands its turns on and computes the paths that are kept and no others."""

    def forward(self, x: Tensor, turn: Tensor, paths: Any = None, groups: Groups | None = None) -> Tensor:
        """x (b, n, d) with turns (2, 1 or b, n, k) and `drop_path.Paths`; or packed tokens (t, d) with turns (2, t, k),
        their `groups` and `packed_paths`."""
        (attention, left), (mlp, _) = ((path, None) for path in paths or (None, None)) if groups is None else paths

        def attend(part: Tensor, rows: Tensor | None) -> Tensor:
            return scaled(self.attn(self.norm1(part), rotary.rows_of(turn, rows), left), self.gamma_1)

        def mix(part: Tensor, _: Tensor | None) -> Tensor:
            return scaled(self.mlp(self.norm2(part)), self.gamma_2)

        x = drop_path.add_branch(x, attend, self.drop_path1, attention)
        return drop_path.add_branch(x, mix, self.drop_path2, mlp)


class FurtherBlocks(nn.Module):
    """Fresh blocks like a `Dinov3Encoder`'s, which are alike at every depth."""

    def __init__(self, config: Dinov3Config, count: int) -> None:
        super().__init__()
        self.config = config
        arguments = {key: value for key, value in timm_architecture(config).items() if key in BLOCK}
        dim, _, heads, _, _ = config.shape
        self.width = dim // heads
        self.blocks = nn.ModuleList(EvaBlock(dim, heads, norm_layer=norm_of(config), **arguments) for _ in range(count))
        for block in self.blocks:
            _teach(block, config.drop_path)
            initialise_block(block)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """States (b, p + n, d) on a map of `grid` patches to states."""
        paths = drop_path.paths_of(self.blocks, states.shape[0], states.device, drop_path.FURTHER)
        turns = rotary.turns_of(
            self.config.rope, grid, None, self.width, 1 + self.config.registers, len(self.blocks), states.device,
            self.training,
        )  # fmt: skip
        for block, turn, path in zip(self.blocks, turns, paths, strict=True):
            states = block(states, turn, path)
        return states


#: Of `timm_architecture` what a block takes.
BLOCK = ("mlp_ratio", "swiglu_mlp", "swiglu_align_to", "qkv_bias", "init_values")


def scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    """A branch times its layer scale, where there is one."""
    return branch if gamma is None else gamma * branch


def norm_of(config: Dinov3Config) -> Callable[..., nn.Module]:
    """What builds a norm of a width."""
    return partial(nn.LayerNorm if config.norm == "layer" else nn.RMSNorm, eps=config.norm_eps)


def initialise_block(block: nn.Module) -> None:
    """Every linear layer from a normal of deviation .02, as in DINOv3's code."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _teach(block: EvaBlock, rate: float) -> None:
    """Make a block that timm built one of ours: they differ in `forward`, not in state."""
    block.__class__ = RotaryBlock
    block.attn.__class__ = RotaryAttention
    if rate:
        block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
