"""The Swin transformer over timm, version 1 (Liu et al. 2021) and 2 (Liu et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from pretrain.encoders.compact import Compact
from pretrain.encoders.pyramid import Pyramid
from pretrain.encoders.swin.config import SwinConfig


class SwinEncoder(Pyramid):
    """A timm SwinTransformer or SwinTransformerV2 (`self.swin`, whose weights load in timm as they are)."""

    def __init__(
        self, config: SwinConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths, heads = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depth = sum(depths)
        model, block_class = (
            (SwinTransformer, AnySizeBlock) if config.version == 1 else (SwinTransformerV2, AnySizeBlockV2)
        )
        self.swin = model(
            img_size=image_size,
            patch_size=config.patch,
            in_chans=channels,
            num_classes=0,
            embed_dim=dim,
            depths=depths,
            num_heads=heads,
            window_size=config.window,
            drop_path_rate=config.drop_path,
            strict_img_size=False,
        )
        for stage in self.swin.layers:
            for block in stage.blocks:
                block.__class__ = block_class  # timm builds its blocks itself; ours differ in one method, not in state
        self.dim = self.swin.num_features
        self.make_mask_token(dim, mask_token)

    def embed(self, images: Tensor) -> Tensor:
        return self.swin.patch_embed(images)

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}
        index = 0
        for stage in self.swin.layers:
            tokens = stage.downsample(tokens)
            for block in stage.blocks:
                tokens = block(tokens)
                if index in wanted:
                    kept[index] = tokens
                index += 1
        return tokens, kept

    def final_norm(self, states: Tensor) -> Tensor:
        return self.swin.norm(states)

    def inner(self) -> nn.Module:
        return self.swin

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.swin.layers for block in stage.blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "layers" not in parts:
            return self.depth + 1 if "norm" in parts and "patch_embed" not in parts else 0
        stage = int(parts[parts.index("layers") + 1])
        before = sum(len(earlier.blocks) for earlier in self.swin.layers[:stage])
        return before + (int(parts[parts.index("blocks") + 1]) + 1 if "blocks" in parts else 1)

    def no_decay(self, parameter_name: str) -> bool:
        return "cpb_mlp" in parameter_name or "logit_scale" in parameter_name  # of version 2


class AnySizeWindows:
    """The windows of timm's Swin blocks (`_attn` of both versions), right for maps of any size.

    Tokens added to fill the last windows are masked out (timm attends to them), and a map no larger than its window
    is not shifted, so local crops and compact maps see what a model built for their size would see.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        window = self.window_size
        # not `shift_size`, which timm sets to 0 where the map of the size it is built for is one window
        shift = tuple(
            0 if side <= w else min(s, w // 2)
            for side, w, s in zip((height, width), window, self.target_shift_size, strict=True)
        )
        pad = (-width % window[1], -height % window[0])
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        x = F.pad(x, (0, 0, 0, pad[0], 0, pad[1]))
        padded = (x.shape[1], x.shape[2])
        mask = None
        if any(shift) or any(pad):
            mask = window_mask((height, width), padded, window, shift, x.device, x.dtype)
        windows = rearrange(window_partition(x, window), "n h w d -> n (h w) d")
        windows = rearrange(self.attn(windows, mask=mask), "n (h w) d -> n h w d", h=window[0])
        x = window_reverse(windows, window, *padded)[:, :height, :width]
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2))
        return x


class AnySizeBlock(AnySizeWindows, SwinTransformerBlock):
    """timm's block of version 1."""


class AnySizeBlockV2(AnySizeWindows, SwinTransformerV2Block):
    """timm's block of version 2."""


def window_mask(
    size: tuple[int, int],
    padded: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(windows, tokens, tokens) added to the attention: -100 between tokens that are not neighbours in the image.

    A window of the shifted map may hold tokens of opposite borders, and filling tokens; each is a region of its own.
    """
    labels = []
    for side, whole, moved in zip(size, padded, shift, strict=True):
        position = torch.arange(whole, device=device)
        labels.append((position >= side - moved).long() + (position >= side).long())  # 0 in place, wrapped, filling
    regions = rearrange(labels[0], "h -> 1 h 1 1") * 3 + rearrange(labels[1], "w -> 1 1 w 1")
    flat = rearrange(window_partition(regions, window), "n h w 1 -> n (h w)")
    apart = rearrange(flat, "n i -> n i 1") != rearrange(flat, "n j -> n 1 j")
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill_(apart, -100.0)
