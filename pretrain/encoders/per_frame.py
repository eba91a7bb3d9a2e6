"""Any encoder of images on stacks: each frame goes through it by itself, and what it says of them is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from einops import rearrange, reduce, repeat
from torch import Tensor

from pretrain.encoders.base import Encoder, Features, Mask


def per_frame(encoder: Encoder, channels: int) -> Encoder:
    """The same encoder, which takes stacks (b, t * c, h, w) of any number of frames of `channels` each: an image is a
    stack of one frame, and gives what it gave before.

    All of its Features are means over the frames, those of a token too, and masks are of tubes: a unit that is hidden
    is hidden in every frame. Its weights keep their names, so that what is saved of it is an encoder of images.
    """
    encoder.__class__ = _over_frames(type(encoder))
    encoder.channels_of_frame = channels
    return encoder


if TYPE_CHECKING:
    _Base = Encoder
else:
    _Base = object


class OverFrames(_Base):
    """What is put before a class of encoders."""

    channels_of_frame: int

    def forward(self, images: Any, mask: Any = None, layers: tuple[int, ...] = ()) -> Any:
        if isinstance(images, Tensor):
            frames, tubes, count = self._frames(images, mask)
            return pooled(super().forward(frames, tubes, layers), count)
        given = [self._frames(*one) for one in zip(images, mask or [None] * len(images), strict=True)]
        found: Sequence[Features] = super().forward([one[0] for one in given], [one[1] for one in given])
        return tuple(pooled(features, count) for features, (_, _, count) in zip(found, given, strict=True))

    def _frames(self, images: Tensor, mask: Mask | None) -> tuple[Tensor, Mask | None, int]:
        """All first frames (b, c, h, w), then all second ones and so on, as crops of the same rows; their masks; t."""
        count = images.shape[1] // self.channels_of_frame
        assert count * self.channels_of_frame == images.shape[1], (images.shape, self.channels_of_frame)
        if mask is not None and count > 1:
            drop, token = (_of_every_frame(part, count) for part in (mask.drop, mask.token))
            mask = Mask(drop, token, mask.num_visible)
        return rearrange(images, "b (t c) h w -> (t b) c h w", t=count), mask, count


def pooled(features: Features, count: int) -> Features:
    """Features of `count` frames (t b) of each stack as the stacks' own (b)."""
    if count == 1:
        return features

    def mean(part: Tensor | None) -> Tensor | None:
        return None if part is None else reduce(part, "(t b) ... -> b ...", "mean", t=count)

    tokens, image = mean(features.tokens), mean(features.pooled)
    assert tokens is not None
    assert image is not None
    return Features(
        tokens=tokens,
        prefix_tokens=mean(features.prefix_tokens),
        grid=features.grid,
        ids_keep=None if features.ids_keep is None else features.ids_keep[: len(tokens)],
        pooled=image,
        layers=tuple(pooled(layer, count) for layer in features.layers),
        states=mean(features.states),
    )


def _of_every_frame(part: Tensor | None, count: int) -> Tensor | None:
    return None if part is None else repeat(part, "b gh gw -> (t b) gh gw", t=count)


@cache
def _over_frames(kind: type[Encoder]) -> type[Encoder]:
    return type(kind.__name__, (OverFrames, kind), {"__doc__": kind.__doc__})
