"""The seam between masked image modelling and what it predicts for the hidden units."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders.native import PackedImages
from pretrain.stream.hidden import hidden_index


class Target(nn.Module):
    """What is predicted at each cell of an image, from the features that the encoder has there.

    cell: side in px of what one prediction is for. num_outputs: predicted values per cell.
    """

    cell: int
    num_outputs: int

    def wanted(self, images: Tensor, batch: Batch) -> Tensor:
        """What is to be predicted for normalised `images` (b, c, H, W), in the form that `loss` takes."""
        raise TypeError(f"{type(self).__name__} does not implement wanted")

    def loss(
        self, head: nn.Module, cells: Tensor, wanted: Tensor, batch: Batch, mean_hidden: Tensor
    ) -> dict[str, Tensor]:
        """The "loss" () of what `head` (d -> num_outputs) predicts from the features of the cells (b, h, w, d), and
        further scalars to log.

        `mean_hidden` () is the number of hidden mask units per micro-batch, averaged over the global batch: dividing
        by it, not by this micro-batch's count, makes the mean over ranks and micro-batches the global loss.
        """
        raise TypeError(f"{type(self).__name__} does not implement loss")

    def packed_wanted(self, images: PackedImages, pixels: Tensor, hidden: Tensor) -> Tensor:
        """What is to be predicted for the hidden patches `hidden` (n,) of images at their own shape, in the form that
        `packed_loss` takes; by default these patches (n, p * p * c), normalised. pixels: of all patches (t, p * p * c),
        as they were decoded."""
        return images.patches.index_select(0, hidden)

    def packed_loss(self, predicted: Tensor, wanted: Tensor, mean_hidden: Tensor) -> Tensor:
        """The loss () of predictions (n, num_outputs) for the hidden patches of images at their own shape."""
        raise TypeError(f"{type(self).__name__} does not implement packed_loss")

    def pictures(self, predicted: Tensor, images: Tensor, batch: Batch) -> Tensor | None:
        """Normalised pictures (b, c, H, W) of predictions (b, h, w, num_outputs) pasted into the image, where they can
        be drawn."""
        return None

    def blocks(self) -> list[nn.Module]:
        """What of it is compiled; see `Method.blocks`."""
        return []

    def pinned(self) -> dict[str, str]:
        """Checksums of the files that it reads."""
        return {}


def at_hidden(cells: Tensor, batch: Batch) -> Tensor:
    """Of values (b, h, w, d) at every mask unit those (n, d) of the hidden ones, those of the first image first."""
    return rearrange(cells, "b h w d -> (b h w) d").index_select(0, hidden_index(batch))
