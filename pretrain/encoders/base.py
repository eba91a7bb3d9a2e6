"""The seam between methods and encoders: an image and perhaps a mask go in, features come out.

Methods never ask which encoder they hold; encoders never ask which method calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


@dataclass(frozen=True)
class Mask:
    """What an encoder must not see, over a grid of mask units (a unit's side in px is image size / grid).

    drop: (b, gh, gw) bool, units removed before the encoder, equally many in every image.
    token: (b, gh, gw) bool, units substituted by the learned mask token; their number may vary.
    num_visible: units of an image that are not dropped, or not unseen, when the caller knows it (spares a wait for the
        device).
    unseen: (b, gh, gw) bool, units that attend and are not attended to, equally many in every image.
    placeless: (b, gh, gw) bool, beside `unseen`: units whose position is not added.
    keys: beside `unseen`, whether blocks attend to tokens as the blocks before left them, or as they were embedded.
        These three only where `EncoderSpec.why_not_placeless` says nothing.
    """

    drop: Tensor | None = None
    token: Tensor | None = None
    num_visible: int | None = None
    unseen: Tensor | None = None
    placeless: Tensor | None = None
    keys: Literal["updated", "embedded"] = "updated"

    def visible_ids(self) -> Tensor:
        """(b, n) raster indices of the units that are not dropped, ascending."""
        assert self.drop is not None
        flat = rearrange(self.drop, "b gh gw -> b (gh gw)")
        num_visible = self.num_visible if self.num_visible is not None else int((~flat[0]).sum())
        return torch.argsort(flat.to(torch.uint8), dim=1, stable=True)[:, :num_visible]


class Features(NamedTuple):
    """What an encoder makes of a batch of images.

    A tuple, not a dataclass: ZeRO 3 hangs its backward hooks on the tensors it finds in a module's output, and it
    looks into tuples only.

    tokens: (b, n, d) patch tokens after the final norm.
    prefix_tokens: (b, p, d) class (first) and register tokens after the final norm.
    grid: (h, w) with h * w = n, when the tokens form a map of the whole image.
    ids_keep: (b, n, k) raster indices of the k mask units each token stands for, when units were dropped. They index
        the mask's grid, or the token grid where the mask's units are larger than a token.
    pooled: (b, d) what the DINO head and the headline probe read.
    layers: features of the blocks asked for, in the order asked, each through the final norm where widths allow.
    states: (b, p + n, d) prefix and patch tokens before the final norm, where the encoder has them in one sequence.
    """

    tokens: Tensor
    prefix_tokens: Tensor | None
    grid: tuple[int, int] | None
    ids_keep: Tensor | None
    pooled: Tensor
    layers: tuple = ()  # of Features
    states: Tensor | None = None


class Windows(NamedTuple):
    """How blocks attend on large maps, for `Encoder.windowed` (Li et al. 2022, ViTDet, section 3).

    side: of a window in tokens; 0: every block attends everywhere.
    everywhere: numbers of the blocks that attend to the whole map all the same.
    relative_positions: whether each block gets decomposed relative positions, which start at zero.
    grid: patches (h, w) of the map that those of whole maps are made for; None: of the encoder's own.
    filler_seen: whether tokens that fill up the last windows are attended to, as in ViTDet and SAM; else masked out.
    prefix: whether class and register tokens stay. Each window then sees them, and their outcome is its mean over
        the windows; ViTDet and SAM leave them out.
    """

    side: int
    everywhere: tuple[int, ...] = ()
    relative_positions: bool = True
    grid: tuple[int, int] | None = None
    filler_seen: bool = False
    prefix: bool = True


class Encoder(nn.Module):
    """An image encoder. Subclasses set the attributes and implement `forward`.

    dim: width of the output tokens. stride: pixels per output token. patch: pixels per input token.
    depth: number of blocks. has_class_token: whether `Features.prefix_tokens` starts with a class token.
    pixel_weights: keys of `inner`'s state that read pixels, whose channels and patch another image may change.
    line_tables: keys of `inner`'s state (1, n, d) with a row for each place along a line, such as time, which another
        length takes by its nearest neighbours.
    has_square_grid: whether its positions' grid is told by their number, not by the size of image and patch.
    decayed: ends of names of its tokens and tables that weight decay reaches all the same, as in its authors' code.
    packs: whether several batches of images go through it in one pass, see `forward`.
    native: whether it takes images at their own shape, see `native.PackedImages`.
    takes_windows: whether it has a form of `windowed`.
    norm_in_head: whether timm's model has its final norm in its head, so that timm's map is one before the norm.
    mean, std: of the pixels (in 0 .. 1) that its weights were trained on, where it comes with weights; else None.
    """

    dim: int
    stride: int
    patch: int
    depth: int
    has_class_token: bool
    pixel_weights: tuple[str, ...] = ("patch_embed.proj.weight",)
    line_tables: tuple[str, ...] = ()
    has_square_grid: bool = False
    decayed: tuple[str, ...] = ()
    packs: bool = False
    native: bool = False
    takes_windows: bool = False
    norm_in_head: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        """Encode `images` (b, c, h, w), normalised; h and w are multiples of `stride`.

        `layers` asks for the outputs of these blocks too (0 is the first, -1 the last).

        An encoder that `packs` also takes a tuple of batches, of any sizes, and one of masks (each may be None), and
        gives the Features of each: those of a pass for each, in one (`packed.py`). One that is `native` takes
        `PackedImages` with a `PackedMask` and gives `PackedFeatures` (`native.py`).
        """
        raise TypeError(f"{type(self).__name__} does not implement forward")

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order, for activation checkpointing, compilation and layer decay."""
        raise TypeError(f"{type(self).__name__} does not implement blocks")

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter for layer decay: 0 for the embedding, 1 .. depth for the blocks, depth + 1 after."""
        raise TypeError(f"{type(self).__name__} does not implement layer_of")

    def no_decay(self, parameter_name: str) -> bool:
        """Whether a parameter, beside biases, norms and tokens, is exempt from weight decay."""
        return False

    def inner(self) -> nn.Module:
        """The module whose state dict is saved: timm's own model where timm has it."""
        raise TypeError(f"{type(self).__name__} does not implement inner")

    def position_grid(self, key: str) -> tuple[int, int]:
        """Rows and columns of tokens that the inner module's table of positions `key` was made for."""
        raise TypeError(f"{type(self).__name__} has no table of positions {key}")

    @classmethod
    def channels_of(cls, weights: Mapping[str, Tensor]) -> int:
        """Channels of the images that the inner module's `weights` read; ValueError where none of them reads pixels."""
        for key in cls.pixel_weights:
            if key in weights:
                return weights[key].shape[1]
        raise ValueError("the checkpoint has no patch embedding")

    def resized(self, key: str, value: Tensor, wanted: Tensor) -> Tensor | None:
        """A tensor `key` of another encoder of the family, in the shape of the inner module's own `wanted`, where the
        family knows better than `transfer.fit` what that means; else None."""
        return None

    def final_norm(self, states: Tensor) -> Tensor:
        """The norm after the last block, on `Features.states` or what was made of them."""
        raise TypeError(f"{type(self).__name__} does not implement final_norm")

    def further_blocks(self, count: int, after: int) -> nn.Module:
        """`count` fresh blocks like those that follow its first `after`, for a head that goes on from its states.

        They start, and drop their paths, as blocks of that depth do. The module maps (states (b, p + n, d), grid
        (h, w)) to states. ValueError where there is no such sequence.
        """
        raise ValueError(f"{type(self).__name__} keeps no sequence of class and patch tokens to go on from")

    def merged(self) -> Encoder:
        """An encoder that computes the same in evaluation, with what training alone keeps apart merged: itself where
        there is nothing of that kind."""
        return self

    def stage_ends(self) -> tuple[int, ...]:
        """Numbers of the blocks after which there is a map of a size of its own: the last block of each stage."""
        return (self.depth - 1,)

    def windowed(self, windows: Windows) -> nn.Module:
        """A module from images to Features that holds this encoder and runs its blocks as `windows` says.

        ValueError where its blocks have no such form.
        """
        raise ValueError(f"the blocks of {type(self).__name__} attend as they were built to, not within other windows")


def depth_of(encoder: Encoder, parameter_name: str) -> int:
    """`Encoder.layer_of`, and 0 for a spatial transformer in front of it, of which the family knows nothing."""
    return 0 if "spatial_transformer" in parameter_name.split(".") else encoder.layer_of(parameter_name)


def several_passes(encoder: Encoder, passes: Sequence[tuple[Tensor, Mask | None]]) -> Sequence[Features]:
    """An encoder's Features of several batches of images with their masks: in one pass, where it packs."""
    if encoder.packs and len(passes) > 1:
        images, masks = zip(*passes, strict=True)
        return encoder(images, masks)
    return [encoder(*given) for given in passes]


def drop_path_rates(rate: float, depth: int, first: int, count: int) -> list[float]:
    """Of `count` blocks from number `first` on, where the rate rises linearly over all blocks up to `rate`."""
    total = max(depth, first + count)
    return [rate * number / max(total - 1, 1) for number in range(first, first + count)]


def refine(grid_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat a map over mask units (b, gh, gw) to a finer `grid` that it divides, as (b, h, w)."""
    height, width = grid[0] // grid_map.shape[1], grid[1] // grid_map.shape[2]
    assert (grid_map.shape[1] * height, grid_map.shape[2] * width) == grid, (grid_map.shape, grid)
    return repeat(grid_map, "b gh gw -> b (gh h) (gw w)", h=height, w=width)


def on_token_grid(mask: Mask | None, grid: tuple[int, int]) -> tuple[Mask | None, Tensor | None]:
    """A mask brought to a finer `grid` of tokens: what is dropped, and the map (b, h, w) of what is replaced."""
    dropped = replaced = None
    if mask is not None and mask.drop is not None:
        num_visible = mask.num_visible
        if num_visible is not None:
            num_visible = num_visible * grid[0] * grid[1] // mask.drop[0].numel()
        dropped = Mask(refine(mask.drop, grid), num_visible=num_visible)
    if mask is not None and mask.token is not None:
        replaced = refine(mask.token, grid)
    return dropped, replaced


def zero_hidden_pixels(images: Tensor, *hidden_maps: Tensor | None) -> Tensor:
    """Images (b, c, h, w) with the pixels of hidden units set to zero, so that no overlapping kernel reads them."""
    for hidden in hidden_maps:
        if hidden is not None:
            pixels = refine(hidden, (images.shape[2], images.shape[3]))
            images = images.masked_fill(rearrange(pixels, "b h w -> b 1 h w"), 0.0)
    return images


@torch.no_grad()
def trunc_normal_at_std_(weight: Tensor, std: float = 0.02) -> None:
    """Fill with a normal cut at one deviation, as BEiT's and SimMIM's code does: what is left deviates by .54 `std`.

    PyTorch's and timm's own default cuts at 2, which for a `std` of .02 is nowhere.
    """
    nn.init.trunc_normal_(weight, std=std, a=-std, b=std)


def xavier_initialise(module: nn.Module) -> None:
    """MAE's initialisation, on any encoder: every linear layer xavier-uniform with zero bias, and non-overlapping
    patch projections as the flat linear layers they are (He et al. 2022, appendix A)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d) and part.kernel_size == part.stride:
            nn.init.xavier_uniform_(rearrange(part.weight.data, "o i h w -> o (i h w)"))
