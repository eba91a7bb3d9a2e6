"""TimeSformer (Bertasius et al. 2021): attention over the places and the frames of a stack."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.base import Encoder, Features, Mask, drop_path_rates, on_token_grid
from pretrain.encoders.positions import nearest_on_line, nearest_positions
from pretrain.encoders.timesformer.config import TimesformerConfig


class TimesformerEncoder(Encoder):
    """A TimeSformer (`self.net`, whose weights have the names of the authors' code) behind the Encoder seam.

    Images are stacks (b, t * c, h, w), the channels of a frame side by side. A token that it gives is a tube: the mean,
    over the frames, of the tokens at one place. Masks are of tubes, too: a hidden unit is hidden in every frame.

    Stacks of other sizes or other numbers of frames take the nearest positions, as in the authors' code.
    """

    has_class_token = True
    line_tables = ("time_embed",)

    def __init__(
        self, config: TimesformerConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.dim, self.depth, heads = config.shape
        self.stride = self.patch = config.patch
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        self.kind = config.attention
        self.net = nn.Module()
        self.net.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.net.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], self.dim))
        if self.kind != "space_only":
            self.net.time_embed = nn.Parameter(torch.zeros(1, config.frames, self.dim))  # zero, as in the authors' code
        self.net.patch_embed = nn.Module()
        self.net.patch_embed.proj = nn.Conv2d(channels, self.dim, config.patch, stride=config.patch)
        block = DividedBlock if self.kind == "divided" else StackBlock
        self.net.blocks = nn.ModuleList(
            block(
                self.dim,
                heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=True,
                drop_path=rate,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for rate in drop_path_rates(config.drop_path, self.depth, 0, self.depth)
        )
        self.net.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if mask_token else None
        self._initialise()

    def _initialise(self) -> None:
        """As the authors' code; `temporal_fc` is zero in every block, so that a fresh one sees each frame by itself."""
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.net.cls_token, self.net.pos_embed, self.mask_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for block in self.net.blocks:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_fc.weight)

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        states, grid, units = self._embed(images, mask)
        wanted = {index % self.depth for index in layers}
        kept = {}
        paths = drop_path.paths_of(self.net.blocks, images.shape[0], images.device)
        for index, (block, path) in enumerate(zip(self.net.blocks, paths, strict=True)):
            states = block(states, path)
            if index in wanted:
                kept[index] = states
        earlier = tuple(self._features(kept[index % self.depth], grid, units) for index in layers)
        return self._features(states, grid, units)._replace(layers=earlier)

    def _embed(self, images: Tensor, mask: Mask | None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """States (b, t, 1 + n, d) that the first block sees, the grid, and the units that were not dropped.

        Every frame has the class token: they are equal, and stay so where they must (see the blocks).
        """
        frames = images.shape[1] // self.channels
        assert frames * self.channels == images.shape[1], (images.shape, self.channels)
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        dropped, replaced = on_token_grid(mask, grid)
        tokens = self.net.patch_embed.proj(rearrange(images, "b (t c) h w -> (b t) c h w", t=frames))
        tokens = rearrange(tokens, "(b t) d h w -> b t (h w) d", t=frames)
        if replaced is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            hidden = rearrange(replaced, "b h w -> b 1 (h w) 1")
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        prefix, positions = self.net.pos_embed[:, :1], self.net.pos_embed[:, 1:]
        tokens = tokens + nearest_positions(positions, self.grid, grid)
        if self.kind != "space_only":
            tokens = tokens + rearrange(nearest_on_line(self.net.time_embed, frames), "1 t d -> 1 t 1 d")
        units = None
        if dropped is not None:
            units = dropped.visible_ids()
            tokens = tokens.gather(2, repeat(units, "b n -> b t n d", t=frames, d=self.dim))
        prefix = repeat(self.net.cls_token + prefix, "1 1 d -> b t 1 d", b=len(images), t=frames)
        if self.kind == "joint":  # one class token for all: (b, 1, 1 + t * n, d), the frames of a place side by side
            together = rearrange(tokens, "b t n d -> b 1 (n t) d")
            return torch.cat([prefix[:, :1], together], dim=2), grid, units
        return torch.cat([prefix, tokens], dim=2), grid, units

    def _features(self, states: Tensor, grid: tuple[int, int], units: Tensor | None) -> Features:
        num_tubes = grid[0] * grid[1] if units is None else units.shape[1]
        if self.kind == "space_only":  # averaged before the norm, as in the authors' code
            normed = self.net.norm(states.mean(dim=1))
            prefix, tokens = normed[:, :1], normed[:, 1:]
        else:
            normed = self.net.norm(states)
            prefix, tokens = normed[:, 0, :1], normed[:, :, 1:]
            if self.kind == "joint":
                tokens = rearrange(tokens, "b 1 (n t) d -> b t n d", n=num_tubes)
            tokens = tokens.mean(dim=1)
        return Features(
            tokens=tokens,
            prefix_tokens=prefix,
            grid=grid if units is None else None,
            ids_keep=None if units is None else rearrange(units, "b n -> b n 1"),
            pooled=prefix[:, 0] if self.config.pool == "class" else tokens.mean(dim=1),
        )

    def inner(self) -> nn.Module:
        return self.net

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.grid

    def final_norm(self, states: Tensor) -> Tensor:
        return self.net.norm(states)

    def blocks(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if "norm" in parts else 0

    def no_decay(self, parameter_name: str) -> bool:
        return parameter_name.endswith("time_embed")


class StackBlock(Block):
    """timm's block on the rows of states (b, t, s, d), each for itself; paths are dropped by stack."""

    def forward(self, x: Tensor, paths: drop_path.Paths | None = None) -> Tensor:
        attention, mlp = paths or (None, None)
        x = drop_path.add_branch(x, lambda part, _: self._attended(part), self.drop_path1, attention)
        return drop_path.add_branch(x, lambda part, _: self.mlp(self.norm2(part)), self.drop_path2, mlp)

    def _attended(self, x: Tensor) -> Tensor:
        rows = self.attn(rearrange(self.norm1(x), "b t s d -> (b t) s d"))
        return rearrange(rows, "(b t) s d -> b t s d", b=len(x))


class DividedBlock(StackBlock):
    """Attention over time at each place, then over the places of each frame (section 3.3 of the paper).

    Time is for patches alone. In space the class token goes with every frame, and what they say to it is averaged. Both
    are one branch to drop path, so that a stack keeps or leaves them together.
    """

    def __init__(self, dim: int, num_heads: int, **settings: object) -> None:
        super().__init__(dim, num_heads, **settings)
        fresh = Block(dim, num_heads, **settings)
        self.temporal_norm1, self.temporal_attn = fresh.norm1, fresh.attn
        self.temporal_fc = nn.Linear(dim, dim)

    def _attended(self, x: Tensor) -> Tensor:
        in_time = self._in_time(x)
        in_space = super()._attended(x + in_time)
        prefix = in_space[:, :, :1].mean(dim=1, keepdim=True).expand(-1, x.shape[1], -1, -1)
        return in_time + torch.cat([prefix, in_space[:, :, 1:]], dim=2)

    def _in_time(self, x: Tensor) -> Tensor:
        """What attention over the frames adds (b, t, 1 + n, d); to the class token nothing."""
        normed = rearrange(self.temporal_norm1(x[:, :, 1:]), "b t n d -> (b n) t d")
        added = rearrange(self.temporal_fc(self.temporal_attn(normed)), "(b n) t d -> b t n d", b=len(x))
        return F.pad(added, (0, 0, 1, 0))
