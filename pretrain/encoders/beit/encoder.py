"""BEiT's vision transformer (Bao et al. 2022; Peng et al. 2022) over timm: relative positions, layer scale."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers import gen_relative_position_index
from timm.models.beit import Attention, Beit, Block, RelativePositionBias
from torch import Tensor, nn

from pretrain.encoders import drop_path
from pretrain.encoders.attention import attend
from pretrain.encoders.base import Encoder, Features, Mask, drop_path_rates, on_token_grid, trunc_normal_at_std_
from pretrain.encoders.beit.config import BeitConfig
from pretrain.encoders.positions import resize_positions, resize_relative_table
from pretrain.encoders.tables import built_once


class BeitEncoder(Encoder):
    """A timm Beit (`self.beit`, whose weights load in timm as they are) behind the Encoder seam.

    Tables of relative positions are interpolated for images of another size than `image_size`, and read at the visible
    tokens' own offsets when units are dropped.
    """

    has_class_token = True
    decayed = ("mask_token", "relative_position_bias_table")  # unilm: no_weight_decay names pos_embed and cls_token

    def __init__(
        self, config: BeitConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth, heads = config.shape
        self.stride = self.patch = config.patch
        self.grid = (image_size[0] // config.patch, image_size[1] // config.patch)
        shared = config.relative_positions == "shared"
        self.beit = Beit(
            img_size=image_size,
            patch_size=config.patch,
            in_chans=channels,
            num_classes=0,
            global_pool="token" if config.pool == "class" else "avg",
            embed_dim=self.dim,
            depth=self.depth,
            num_heads=heads,
            drop_path_rate=config.drop_path,
            init_values=config.layer_scale,
            use_abs_pos_emb=config.absolute_positions,
            use_rel_pos_bias=not shared,
            use_shared_rel_pos_bias=shared,
            use_fc_norm=config.pooled_norm,
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        )
        if shared:
            self.beit.rel_pos_bias.__class__ = SharedBias
        for block in self.beit.blocks:
            _teach(block)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if mask_token else None
        self._initialise()

    def _initialise(self) -> None:
        """Tokens, positions and weights as BEiT's code starts them; timm has zeroed the biases and the tables."""
        for token in (self.beit.cls_token, self.beit.pos_embed, self.mask_token):
            if token is not None:
                trunc_normal_at_std_(token)
        for module in self.beit.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                trunc_normal_at_std_(module.weight)
        nn.init.zeros_(self.beit.patch_embed.proj.bias)
        self.beit.fix_init_weight()  # proj and fc2 by sqrt(2 * layer)

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        grid = (images.shape[2] // self.patch, images.shape[3] // self.patch)
        dropped, replaced = on_token_grid(mask, grid)
        tokens = rearrange(self.beit.patch_embed.proj(images), "b d h w -> b (h w) d")
        if replaced is not None:
            assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
            tokens = torch.where(rearrange(replaced, "b h w -> b (h w) 1"), self.mask_token.to(tokens.dtype), tokens)
        prefix = self.beit.cls_token
        if self.beit.pos_embed is not None:
            tokens = tokens + resize_positions(self.beit.pos_embed[:, 1:], self.grid, grid)
            prefix = prefix + self.beit.pos_embed[:, :1]
        units = None
        if dropped is not None:
            units = dropped.visible_ids()
            tokens = tokens.gather(1, repeat(units, "b n -> b n d", d=self.dim))
        states = torch.cat([prefix.expand(images.shape[0], -1, -1), tokens], dim=1)
        shared = None if self.beit.rel_pos_bias is None else self.beit.rel_pos_bias(grid, units)
        wanted = {index % self.depth for index in layers}
        kept = {}
        paths = drop_path.paths_of(self.beit.blocks, images.shape[0], images.device)
        for index, (block, path) in enumerate(zip(self.beit.blocks, paths, strict=True)):
            states = block(states, grid, units, shared, path)
            if index in wanted:
                kept[index] = states
        earlier = tuple(self._features(kept[index % self.depth], grid, units) for index in layers)
        return self._features(states, grid, units)._replace(layers=earlier)

    def _features(self, states: Tensor, grid: tuple[int, int], units: Tensor | None) -> Features:
        normed = self.beit.norm(states)
        prefix, tokens = normed[:, :1], normed[:, 1:]
        return Features(
            tokens=tokens,
            prefix_tokens=prefix,
            grid=grid if units is None else None,
            ids_keep=None if units is None else rearrange(units, "b n -> b n 1"),
            pooled=self.beit.fc_norm(prefix[:, 0] if self.config.pool == "class" else tokens.mean(dim=1)),
            states=states,
        )

    def inner(self) -> nn.Module:
        return self.beit

    def position_grid(self, key: str) -> tuple[int, int]:
        return self.grid

    def final_norm(self, states: Tensor) -> Tensor:
        return self.beit.norm(states)

    def blocks(self) -> list[nn.Module]:
        return list(self.beit.blocks)

    def further_blocks(self, count: int, after: int) -> nn.Module:
        return FurtherBeitBlocks(self, count, after)

    def layer_of(self, parameter_name: str) -> int:
        parts = parameter_name.split(".")
        if "blocks" in parts:
            return int(parts[parts.index("blocks") + 1]) + 1
        return self.depth + 1 if {"norm", "fc_norm", "rel_pos_bias"} & set(parts) else 0


class FurtherBeitBlocks(nn.Module):
    """Blocks that go on from a BeitEncoder's states, with its shared relative positions or tables of their own.

    Drop path and the division of proj and fc2 are those of blocks that follow the first `after`. What is divided is
    PyTorch's own start: BEiT v2's code builds these blocks after it has initialised the encoder.
    """

    def __init__(self, encoder: BeitEncoder, count: int, after: int) -> None:
        super().__init__()
        dim, depth, heads = encoder.config.shape
        window = None if encoder.beit.rel_pos_bias is not None else encoder.grid
        self._shared = (encoder.beit.rel_pos_bias,)  # in a tuple: the encoder's own, not a second copy of it
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                qkv_bias=True,
                init_values=encoder.config.layer_scale,
                window_size=window,
                drop_path=rate,
                norm_layer=partial(nn.LayerNorm, eps=encoder.config.norm_eps),
            )
            for rate in drop_path_rates(encoder.config.drop_path, depth, after, count)
        )
        for position, block in enumerate(self.blocks):
            _teach(block)
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.data.div_((2.0 * (after + position + 1)) ** 0.5)

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """States (b, 1 + h * w, d) of a map of `grid` to states."""
        shared = None if self._shared[0] is None else self._shared[0](grid, None)
        paths = drop_path.paths_of(self.blocks, states.shape[0], states.device, drop_path.FURTHER)
        for block, path in zip(self.blocks, paths, strict=True):
            states = block(states, grid, None, shared, path)
        return states


def relative_bias(table: Tensor, built: tuple[int, int], grid: tuple[int, int], units: Tensor | None) -> Tensor:
    """The bias (1 or b, heads, 1 + n, 1 + n) between class token and tokens of a `grid`, or of its `units` (b, n)."""
    table = resize_relative_table(table, built, grid, num_extra=3)
    index = relative_index(grid, table.device)
    if units is None:
        return rearrange(table[index], "i j heads -> 1 heads i j")
    tokens = F.pad(units + 1, (1, 0))
    chosen = index[rearrange(tokens, "b i -> b i 1"), rearrange(tokens, "b j -> b 1 j")]
    return rearrange(table[chosen], "b i j heads -> b heads i j")


@built_once
def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(1 + n, 1 + n) the row of the table of relative positions for each pair of class token and tokens of a `grid`."""
    return gen_relative_position_index(grid, class_token=True, device=device)


class SharedBias(RelativePositionBias):
    """timm's shared table, for any grid and for visible tokens alone."""

    def forward(self, grid: tuple[int, int], units: Tensor | None) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.window_size, grid, units)


class AnyGridAttention(Attention):
    """timm's attention, whose own table serves any grid and visible tokens alone."""

    def forward(self, x: Tensor, grid: tuple[int, int], units: Tensor | None, shared: Tensor | None) -> Tensor:
        bias = shared
        if self.relative_position_bias_table is not None:
            bias = relative_bias(self.relative_position_bias_table, self.window_size, grid, units)
        qkv = F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj(rearrange(attend(query, key, value, bias), "b h n d -> b n (h d)"))


class AnyGridBlock(Block):
    """timm's block, which hands the grid on to its attention and computes the paths that are kept."""

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        units: Tensor | None,
        shared: Tensor | None,
        paths: drop_path.Paths | None = None,
    ) -> Tensor:
        def attend_to(part: Tensor, rows: Tensor | None) -> Tensor:
            chosen, bias = units, shared
            if rows is not None:
                chosen = None if units is None else units.index_select(0, rows)
                bias = shared if shared is None or len(shared) == 1 else shared.index_select(0, rows)
            attended = self.attn(self.norm1(part), grid, chosen, bias)
            return attended if self.gamma_1 is None else self.gamma_1 * attended

        def mix(part: Tensor, _: Tensor | None) -> Tensor:
            mixed = self.mlp(self.norm2(part))
            return mixed if self.gamma_2 is None else self.gamma_2 * mixed

        attention, mlp = paths or (None, None)
        x = drop_path.add_branch(x, attend_to, self.drop_path1, attention)
        return drop_path.add_branch(x, mix, self.drop_path2, mlp)


def _teach(block: Block) -> None:
    """Make a block that timm built one of ours: they differ in `forward`, not in state."""
    block.__class__ = AnyGridBlock
    block.attn.__class__ = AnyGridAttention
