"""The Swin transformer (Liu et al. 2021) over timm, on whole images or on the dense map of the visible units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from pretrain.encoders.base import Encoder, Features, Mask, refine
from pretrain.schema import SwinConfig


class SwinEncoder(Encoder):
    """A timm SwinTransformer (`self.swin`, whose weights load in timm as they are) behind the Encoder seam.

    With one visible unit in every 2x2, the visible units are moved together and the encoder runs densely on an image
    of half the side (UM-MAE, Li et al. 2022, section 3): hidden pixels are never read.
    """

    drop_layout = "one_in_2x2"
    has_class_token = False

    def __init__(
        self, config: SwinConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        dim, depths, heads = config.shape
        self.patch, self.stride = config.patch, config.stride
        self.depth = sum(depths)
        self.swin = SwinTransformer(
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
                block.__class__ = AnySizeBlock  # timm builds its blocks itself; ours differ in one method, not in state
        self.dim = self.swin.num_features
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, dim)) if mask_token else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        units = replaced = None
        if mask is not None:
            replaced = mask.replaced
            if mask.dropped is not None:
                images, units, replaced = self._compact(images, mask)
        tokens = self.swin.patch_embed(images)
        if replaced is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            hidden = rearrange(refine(replaced, (tokens.shape[1], tokens.shape[2])), "b h w -> b h w 1")
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        wanted = {index % self.depth for index in layers}
        kept: dict[int, Tensor] = {}
        index = 0
        for stage in self.swin.layers:
            tokens = stage.downsample(tokens)
            for block in stage.blocks:
                tokens = block(tokens)
                if index in wanted:
                    kept[index] = tokens
                index += 1
        last = self._features(tokens, units)
        return Features(
            last.tokens,
            None,
            last.grid,
            units,
            last.pooled,
            tuple(self._features(kept[index % self.depth], None) for index in layers),
        )

    def _features(self, tokens: Tensor, units: Tensor | None) -> Features:
        grid = (tokens.shape[1], tokens.shape[2])
        if tokens.shape[-1] == self.dim:
            tokens = self.swin.norm(tokens)
        tokens = rearrange(tokens, "b h w d -> b (h w) d")
        return Features(tokens, None, grid if units is None else None, units, tokens.mean(dim=1))

    def _compact(self, images: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor | None]:
        """The visible units of each image moved together, and what the output tokens then stand for.

        Returns images (b, c, h / 2, w / 2), units (b, n, k) and the map of replaced units among the visible ones.
        """
        assert mask.dropped is not None
        grid = (mask.dropped.shape[1], mask.dropped.shape[2])
        compact_grid = (grid[0] // 2, grid[1] // 2)
        quads = rearrange(mask.dropped, "b (gh dy) (gw dx) -> b (gh gw) (dy dx)", dy=2, dx=2)
        assert mask.num_visible is not None or bool((quads.sum(-1) == 3).all()), "needs one visible unit in every 2x2"
        corner = (~quads).to(torch.uint8).argmax(dim=-1)  # (b, n) which of the four is visible

        def visible(cells: Tensor) -> Tensor:
            """From (b, gh, gw, ...) the cells of the visible units, (b, gh / 2, gw / 2, ...)."""
            cells = rearrange(cells, "b (gh dy) (gw dx) f -> b (gh gw) (dy dx) f", dy=2, dx=2)
            chosen = cells.gather(2, repeat(corner, "b n -> b n 1 f", f=cells.shape[-1]))
            return rearrange(chosen, "b (gh gw) 1 f -> b gh gw f", gh=compact_grid[0])

        height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
        cells = visible(rearrange(images, "b c (gh p) (gw q) -> b gh gw (p q c)", gh=grid[0], gw=grid[1]))
        compact = rearrange(cells, "b gh gw (p q c) -> b c (gh p) (gw q)", p=height, q=width)
        replaced = None
        if mask.replaced is not None:
            replaced = rearrange(visible(rearrange(mask.replaced, "b gh gw -> b gh gw 1")), "b gh gw 1 -> b gh gw")

        # raster indices over the finer of mask grid and token grid, moved the same way as the pixels
        fine = (max(grid[0], images.shape[2] // self.stride), max(grid[1], images.shape[3] // self.stride))
        raster = torch.arange(fine[0] * fine[1], device=images.device)
        raster = rearrange(
            repeat(raster, "n -> b n", b=len(images)),
            "b (gh p gw q) -> b gh gw (p q)",
            gh=grid[0],
            gw=grid[1],
            q=fine[1] // grid[1],
        )
        raster = rearrange(visible(raster), "b gh gw (p q) -> b (gh p) (gw q)", q=fine[1] // grid[1])
        units = rearrange(
            raster,
            "b (h p) (w q) -> b (h w) (p q)",
            h=compact.shape[2] // self.stride,
            w=compact.shape[3] // self.stride,
        )
        return compact, units, replaced

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.swin.layers for block in stage.blocks]

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "layers" not in parts:
            return self.depth + 1 if "norm" in parts and "patch_embed" not in parts else 0
        stage = int(parts[parts.index("layers") + 1])
        before = sum(len(earlier.blocks) for earlier in self.swin.layers[:stage])
        return before + (int(parts[parts.index("blocks") + 1]) + 1 if "blocks" in parts else 1)


class AnySizeBlock(SwinTransformerBlock):
    """timm's block, right for maps of any size.

    Tokens added to fill the last windows are masked out (timm attends to them), and a map no larger than its window
    is not shifted, so local crops and compact maps see what a model built for their size would see.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        window = self.window_size
        shift = tuple(
            0 if side <= w else s for side, w, s in zip((height, width), window, self.shift_size, strict=True)
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
