"""Images and maps straightened by an affine map that a small network reads off them (Jaderberg et al. 2015)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.base import Encoder, Mask, zero_hidden_pixels
from pretrain.encoders.shapes import SpatialTransformerConfig

#: Side of the map that theta is read off, whatever the size of what is transformed.
_SIDE = 8


class SpatialTransformer(nn.Module):
    """Maps (b, c, h, w) to maps of the same size, sampled where an affine map of their own sends each place.

    A network of two convolutions on the map brought to 8x8 gives theta (2, 3) for each image, of which `limit` bounds
    how far each number may be from the identity's; it starts at the identity. A place (x, y) in -1 .. 1, from edge to
    edge of the image (align_corners=False), shows what is at theta (x, y, 1), bilinearly; beyond the edges there are
    zeros. `rate` is what its last layer is multiplied by, so that with Adam, whose steps have one length, theta learns
    `rate` times as fast.
    """

    def __init__(self, channels: int, config: SpatialTransformerConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.rate, self.limit = config.rate, config.limit
        self.localise = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.offset = nn.Linear(hidden * (_SIDE // 2) ** 2, 6)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def theta(self, cells: Tensor) -> Tensor:
        """(b, 2, 3) of maps (b, c, h, w)."""
        seen = self.localise(F.adaptive_avg_pool2d(cells, _SIDE))
        offset = self.rate * self.offset(rearrange(seen, "b d h w -> b (d h w)"))
        if self.limit is not None:
            offset = self.limit * torch.tanh(offset / self.limit)
        identity = torch.eye(2, 3, device=cells.device)
        return identity + rearrange(offset.float(), "b (two three) -> b two three", two=2)

    def forward(self, cells: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, h, w)."""
        grid = F.affine_grid(self.theta(cells), list(cells.shape), align_corners=False)
        moved = F.grid_sample(cells.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return moved.to(cells.dtype)


def put_in_front(encoder: Encoder, config: Any, channels: int) -> None:
    """Have an encoder see its images through the spatial transformer of its `config`, saved with its inner module.

    Pixels of hidden units are zeroed before it, since theta is read off the whole image and moves what it shows.
    """
    encoder.inner().add_module("spatial_transformer", SpatialTransformer(channels, config.spatial_transformer))
    encoder.register_forward_pre_hook(_straighten, with_kwargs=True)
    encoder.takes_windows = False  # detectors need maps of the image as it is


def _straighten(encoder: Encoder, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments of `Encoder.forward`, with images straightened."""
    images, *rest = given
    if not isinstance(images, (Tensor, tuple, list)):
        raise ValueError(
            f"a spatial transformer takes whole images, not {type(images).__name__}; set "
            "encoder.spatial_transformer=null"
        )
    mask = rest[0] if rest else named.get("mask")
    transform = encoder.inner().spatial_transformer

    def straight(part: Tensor, hidden: Mask | None) -> Tensor:
        if hidden is not None:
            part = zero_hidden_pixels(part, hidden.drop, hidden.token)
        return transform(part)

    if isinstance(images, Tensor):
        return (straight(images, mask), *rest), named
    masks = mask or [None] * len(images)
    return (tuple(straight(*pair) for pair in zip(images, masks, strict=True)), *rest), named
