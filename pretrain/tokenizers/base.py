"""The seam between masked image modelling and what it predicts for the hidden units."""

from __future__ import annotations

from torch import Tensor, nn

from data_pipelines.loader import Batch


class Target(nn.Module):
    """What is predicted at each output token of the encoder. Its parameters, if any, are frozen.

    num_outputs: predicted values per output token.
    """

    num_outputs: int

    def loss(self, predicted: Tensor, images: Tensor, batch: Batch, mean_hidden: Tensor) -> Tensor:
        """The loss () of predictions (b, h, w, num_outputs) for normalised `images` (b, c, H, W).

        `mean_hidden` () is the number of hidden mask units per micro-batch, averaged over the global batch: dividing
        by it, not by this micro-batch's count, makes the mean over ranks and micro-batches the global loss.
        """
        raise TypeError(f"{type(self).__name__} does not implement loss")

    def pictures(self, predicted: Tensor, images: Tensor, batch: Batch) -> Tensor | None:
        """Normalised pictures (b, c, H, W) of the predictions pasted into the image, where they can be drawn."""
        return None
