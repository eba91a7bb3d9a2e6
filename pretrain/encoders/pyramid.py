"""What all pyramids share: a map of tokens that is halved from stage to stage, whole or compact."""

from __future__ import annotations

from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders.base import Encoder, Features, Mask, refine, zero_hidden_pixels
from pretrain.encoders.compact import Compact


class Pyramid(Encoder):
    """An encoder whose tokens are a map (b, h, w, d) at every stage. Subclasses implement `embed` and `run`.

    With one visible unit in every 2x2, the visible units are moved together and the encoder runs densely on an image
    of half the side (`compact.py`).

    overlapping: whether the patch embedding reads beyond its patch; hidden pixels are then zeroed before it.
    depths: blocks of each stage.
    """

    has_class_token = False
    overlapping = False
    depths: tuple[int, ...]
    mask_token: nn.Parameter | None

    def make_mask_token(self, dim: int, wanted: bool) -> None:
        """The learned token of replaced units, `dim` wide; none unless `wanted`."""
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, dim)) if wanted else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def replacement(self) -> Tensor:
        """What stands in the place of a replaced unit's tokens, (1, 1, 1, d)."""
        assert self.mask_token is not None, "built without mask_token, so no unit can be replaced"
        return self.mask_token

    def stage_ends(self) -> tuple[int, ...]:
        return tuple(end - 1 for end in accumulate(self.depths))

    def embed(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) to the first stage's tokens (b, h, w, d), before any positions."""
        raise TypeError(f"{type(self).__name__} does not implement embed")

    def run(self, tokens: Tensor, compact: Compact | None, wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """From the embedded tokens to the last map (b, h, w, d) before the final norm, and the outputs of the blocks
        `wanted`, as maps."""
        raise TypeError(f"{type(self).__name__} does not implement run")

    def forward(self, images: Tensor, mask: Mask | None = None, layers: tuple[int, ...] = ()) -> Features:
        compact = units = replaced = None
        if mask is not None:
            replaced = mask.token
            if mask.drop is not None:
                compact = Compact(mask, (images.shape[2], images.shape[3]))
                images, units, replaced = compact.images(images), compact.units(self.stride), compact.replaced
        if self.overlapping and replaced is not None:
            images = zero_hidden_pixels(images, replaced)
        tokens = self.embed(images)
        if replaced is not None:
            hidden = rearrange(refine(replaced, (tokens.shape[1], tokens.shape[2])), "b h w -> b h w 1")
            tokens = torch.where(hidden, self.replacement().to(tokens.dtype), tokens)
        tokens, kept = self.run(tokens, compact, {index % self.depth for index in layers})
        earlier = tuple(self._features(kept[index % self.depth], None) for index in layers)
        return self._features(tokens, units)._replace(layers=earlier)

    def _features(self, tokens: Tensor, units: Tensor | None) -> Features:
        grid = (tokens.shape[1], tokens.shape[2])
        if tokens.shape[-1] == self.dim:
            tokens = self.final_norm(tokens)
        tokens = rearrange(tokens, "b h w d -> b (h w) d")
        return Features(tokens, None, grid if units is None else None, units, tokens.mean(dim=1))
