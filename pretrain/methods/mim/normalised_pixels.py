"""The pixels of each mask unit, standardised by themselves, as the target (He et al. 2022, section 3)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders.patches import patch_statistics, patchify, unpatchify
from pretrain.methods.mim.target import Target, at_hidden
from pretrain.stream.hidden import hidden_index


class NormalisedPixels(Target):
    """Each hidden unit's pixels, of mean 0 and deviation 1 within the unit, with a squared error (MAE's target)."""

    def __init__(self, unit: int, channels: int) -> None:
        super().__init__()
        self.cell, self.num_outputs = unit, unit**2 * channels

    def wanted(self, images: Tensor, batch: Batch) -> Tensor:
        """(n, unit * unit * c) of the hidden units."""
        patches = patchify(images, self.cell)
        mean, deviation = patch_statistics(patches)
        return rearrange((patches - mean) / deviation, "b n d -> (b n) d").index_select(0, hidden_index(batch))

    def loss(
        self, head: nn.Module, cells: Tensor, wanted: Tensor, batch: Batch, mean_hidden: Tensor
    ) -> dict[str, Tensor]:
        predicted = head(at_hidden(cells, batch)).float()
        return {"loss": (predicted - wanted).square().mean(dim=-1).sum() / mean_hidden}

    def packed_loss(self, predicted: Tensor, wanted: Tensor, mean_hidden: Tensor) -> Tensor:
        mean, deviation = patch_statistics(wanted)
        return (predicted.float() - (wanted - mean) / deviation).square().mean(dim=-1).sum() / mean_hidden

    def pictures(self, predicted: Tensor, images: Tensor, batch: Batch) -> Tensor | None:
        patches = patchify(images, self.cell)
        mean, deviation = patch_statistics(patches)  # the true ones: the network does not predict them
        guessed = rearrange(predicted.float(), "b h w o -> b (h w) o") * deviation + mean
        pasted = torch.where(_flat(batch["token_mask"])[..., None], guessed, patches)
        return unpatchify(pasted, (predicted.shape[1], predicted.shape[2]), self.cell)


def _flat(hidden: Tensor) -> Tensor:
    return rearrange(hidden, "b h w -> b (h w)")
