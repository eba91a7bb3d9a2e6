"""Batches of crops of their own shape on their way to an encoder, and to the eye."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from data_pipelines.loader import Batch
from pretrain.encoders.native import Grids, PackedImages
from pretrain.stream.pixels import normalised


def grids_of(batch: Batch, kind: str = "global") -> Grids:
    """Rows and columns of patches of each image, view by view, known on the host."""
    last = batch[f"{kind}_lengths"].numpy().cumsum() - 1
    return tuple((row + 1, column + 1) for row, column in batch[f"{kind}_positions"].numpy()[last].tolist())


def packed_images(batch: Batch, mean: Tensor, std: Tensor, kind: str = "global") -> PackedImages:
    """The `kind` crops of a batch, view by view, normalised by each channel's mean and deviation in 0 .. 1."""
    by_channel = rearrange(batch[f"{kind}_patches"], "t (n c) -> t c n 1", c=len(mean))
    pixels = rearrange(normalised(by_channel, mean, std), "t c n 1 -> t (n c)")
    return PackedImages(pixels, grids_of(batch, kind))


def first_of(images: PackedImages, count: int) -> PackedImages:
    """The first `count` images."""
    return PackedImages(images.patches[: sum(images.lengths[:count])], images.grids[:count])


def canvases(batch: Batch, channels: int, patch: int) -> Batch:
    """Of crops of their own shape `global_crops` (b, v, c, H, W), and `local_crops` where there are any: each in the
    upper left corner of a black canvas as large as the largest side of its kind. For the eye."""
    rows, shown = len(batch["rows"]), {}
    for kind in ("global", "local"):
        if f"{kind}_patches" not in batch:
            continue
        grids = grids_of(batch, kind)
        side = max(max(grid) for grid in grids) * patch
        parts = batch[f"{kind}_patches"].split([height * width for height, width in grids])
        canvas = parts[0].new_zeros(len(grids), channels, side, side)
        for number, (part, (height, width)) in enumerate(zip(parts, grids, strict=True)):
            image = rearrange(part, "(h w) (p q c) -> c (h p) (w q)", h=height, p=patch, q=patch)
            canvas[number, :, : height * patch, : width * patch] = image
        shown[f"{kind}_crops"] = rearrange(canvas, "(v b) c h w -> b v c h w", b=rows)
    return shown
