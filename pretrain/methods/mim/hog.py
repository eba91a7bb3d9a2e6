"""Histograms of oriented gradients as the target (MaskFeat, Wei et al. 2022, section 3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders.native import PackedImages
from pretrain.encoders.patches import unpatchify
from pretrain.methods.mim.target import Target, at_hidden

#: Orientations over half a turn: a gradient and its opposite are one.
BINS = 9
#: px of a cell, which has one histogram for each channel.
CELL = 8


class Hog(Target):
    """The histograms of the cells within each hidden unit, with a squared error."""

    def __init__(self, unit: int, channels: int) -> None:
        super().__init__()
        self.cell = unit
        self.num_outputs = (unit // CELL) ** 2 * channels * BINS

    def wanted(self, images: Tensor, batch: Batch) -> Tensor:
        """(n, (unit / 8)^2 * c * 9) of the hidden units."""
        histograms = oriented_gradients(batch["global_crops"][:, 0])
        per_unit = rearrange(
            histograms, "b c (h p) (w q) o -> b h w (p q c o)", p=self.cell // CELL, q=self.cell // CELL
        )
        return at_hidden(per_unit, batch)

    def loss(
        self, head: nn.Module, cells: Tensor, wanted: Tensor, batch: Batch, mean_hidden: Tensor
    ) -> dict[str, Tensor]:
        predicted = head(at_hidden(cells, batch)).float()
        return {"loss": (predicted - wanted).square().mean(dim=-1).sum() / mean_hidden}

    def packed_wanted(self, images: PackedImages, pixels: Tensor, hidden: Tensor) -> Tensor:
        found, side = [], self.cell // CELL
        for part, grid in zip(pixels.split(list(images.lengths)), images.grids, strict=True):
            histograms = oriented_gradients(unpatchify(part[None], grid, self.cell))
            found.append(rearrange(histograms, "1 c (h p) (w q) o -> (h w) (p q c o)", p=side, q=side))
        return torch.cat(found).index_select(0, hidden)

    def packed_loss(self, predicted: Tensor, wanted: Tensor, mean_hidden: Tensor) -> Tensor:
        return (predicted.float() - wanted).square().mean(dim=-1).sum() / mean_hidden


def oriented_gradients(pixels: Tensor) -> Tensor:
    """Histograms (b, c, h / 8, w / 8, 9) of the cells of `pixels` (b, c, h, w), each of length one.

    Gradients are central differences, none across the border; each adds its length to the bin of its orientation,
    0 .. 180 degrees.
    """
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    lengths = torch.hypot(across, down)
    # in place, for these are the largest of all; in double, so that no orientation falls into its neighbour's bin
    turn = torch.atan2(down.double(), across).remainder_(math.pi).div_(math.pi).mul_(BINS)
    bins = turn.to(torch.uint8).clamp_max_(BINS - 1)
    histograms = [  # one orientation at a time: together they are nine images of 64-bit integers and nine of lengths
        reduce(lengths * (bins == number), "b c (h p) (w q) -> b c h w", "sum", p=CELL, q=CELL)
        for number in range(BINS)
    ]
    return F.normalize(torch.stack(histograms, dim=-1), dim=-1)
