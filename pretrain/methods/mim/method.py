"""Masked image modelling with a mask token (BEiT, Bao et al. 2022; SimMIM, Xie et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import trunc_normal_at_std_, zero_hidden_pixels
from pretrain.encoders.native import PackedMask
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation, mask_of
from pretrain.methods.mim.codes import Codes
from pretrain.methods.mim.config import MimConfig
from pretrain.methods.mim.hog import Hog
from pretrain.methods.mim.normalised_pixels import NormalisedPixels
from pretrain.methods.mim.pixels import Pixels
from pretrain.methods.mim.target import Target
from pretrain.stream.hidden import hidden_index


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> MaskedImageModelling:
    """Masked image modelling around the configuration's encoder."""
    assert config.encoder is not None
    data = config.data
    encoder = build_encoder(
        config.encoder, config.views.global_size, data.channels, mask_token=True, frames=data.frames
    )
    target = build_target(config.method, encoder.stride, data.planes)
    return MaskedImageModelling(config.method, encoder, target, normalisation, timeline)


def build_target(config: MimConfig, stride: int, channels: int) -> Target:
    """The target that `config` names, for an encoder with tokens of `stride` px."""
    if config.target == "pixels":
        return Pixels(stride, channels)
    if config.target == "normalised_pixels":
        return NormalisedPixels(config.mask.unit, channels)
    if config.target == "hog":
        return Hog(config.mask.unit, channels)
    assert config.tokenizer is not None
    return Codes(config.tokenizer, config.mask.unit)


class MaskedImageModelling(Method):
    """Replace units by a learned token, encode the whole image, and predict a target at the hidden ones.

    The target is predicted at cells. Where they are smaller than the encoder's tokens, each token is brought to those
    within it by a linear layer and a pixel shuffle; where they are larger, the tokens of a cell are averaged.

    With aggregation (BEiT v2, Peng et al. 2022, section 2.3) the same head predicts a second time, from an earlier
    block's patch tokens that a few blocks have joined with the last block's class token.
    """

    def __init__(
        self, config: MimConfig, encoder: Encoder, target: Target, normalisation: Normalisation, timeline: Timeline
    ) -> None:
        super().__init__(normalisation, timeline)
        self.encoder = encoder
        self.target = target
        self.per_token = max(encoder.stride // target.cell, 1)  # cells along a token's side
        self.finer = nn.Linear(encoder.dim, self.per_token**2 * encoder.dim) if self.per_token > 1 else None
        self.head = nn.Linear(encoder.dim, target.num_outputs)
        if config.target == "codes":
            trunc_normal_at_std_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.layer = None if config.aggregation is None else config.aggregation.layer - 1
        self.aggregation = None
        if config.aggregation is not None:
            self.aggregation = encoder.further_blocks(config.aggregation.depth, after=config.aggregation.layer)

    def blocks(self) -> list[nn.Module]:
        further = [] if self.aggregation is None else [*self.aggregation.blocks]
        return [*super().blocks(), *further, *self.target.blocks()]

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        reduce_mask_counts(micro_batches)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        mean_hidden = batch.get("mean_hidden")
        if mean_hidden is None:  # one rank, one micro-batch: the local count is the global one
            mean_hidden = torch.full((), float(len(hidden_index(batch))), device=batch["token_mask"].device)
        if "global_patches" in batch:
            return {"loss": self._packed_loss(batch, mean_hidden)}
        images = self.normalise(batch["global_crops"][:, 0])
        wanted = self.target.wanted(images, batch)
        main, *further = (
            self.target.loss(self.head, cells, wanted, batch, mean_hidden) for cells in self.cells(images, batch)
        )
        for values in further:
            main["aggregation_loss"] = values["loss"].detach()
            main["loss"] = main["loss"] + values["loss"]
        return main

    def _packed_loss(self, batch: Batch, mean_hidden: Tensor) -> Tensor:
        """Of images at their own shape."""
        images, hidden = self.packed(batch), hidden_index(batch)
        features = self.encoder(images, PackedMask(token=batch["token_mask"]))
        predicted = self.head(features.tokens.index_select(0, hidden))
        wanted = self.target.packed_wanted(images, batch["global_patches"], hidden)
        return self.target.packed_loss(predicted, wanted, mean_hidden)

    def cells(self, images: Tensor, batch: Batch) -> list[Tensor]:
        """Features (b, h, w, d) of the target's cells: of the last block, then those of the aggregation."""
        layers = () if self.layer is None else (self.layer,)
        features = self.encoder(images, mask_of(batch), layers)
        assert features.grid is not None
        tokens = [features.tokens]
        if self.aggregation is not None:
            states = torch.cat([features.states[:, :1], features.layers[0].states[:, 1:]], dim=1)
            states = self.encoder.final_norm(self.aggregation(states, features.grid))
            tokens.append(states[:, -features.tokens.shape[1] :])
        return [self._at_cells(rearrange(each, "b (h w) d -> b h w d", h=features.grid[0])) for each in tokens]

    def _at_cells(self, tokens: Tensor) -> Tensor:
        if self.finer is not None:
            n = self.per_token
            return rearrange(self.finer(tokens), "b h w (p q d) -> b (h p) (w q) d", p=n, q=n)
        n = self.target.cell // self.encoder.stride
        return reduce(tokens, "b (h p) (w q) d -> b h w d", "mean", p=n, q=n) if n > 1 else tokens

    def predict(self, images: Tensor, batch: Batch) -> Tensor:
        """(b, h, w, outputs) at every cell, hidden or not."""
        return self.head(self.cells(images, batch)[0])

    def pinned(self) -> dict[str, str]:
        return self.target.pinned()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        if "global_patches" in batch:
            return {}
        crops = batch["global_crops"][:, 0]
        images = self.normalise(crops)
        pasted = self.target.pictures(self.predict(images, batch), images, batch)
        if pasted is None:  # codes
            return super().pictures(batch)
        masked = zero_hidden_pixels(images, batch["token_mask"])
        rows = torch.stack([self.show(crops), *(self.to_pictures(part, crops) for part in (masked, pasted))], dim=1)
        return {"reconstructions (image, input, output)": rearrange(rows, "b v c h w -> b c h (v w)")}


def reduce_mask_counts(micro_batches: list[Batch]) -> None:
    """Write into each micro-batch how many units are replaced per micro-batch, averaged over the global batch.

    Blockwise masks differ in size; a loss divided by this number averages to the loss of the global batch.
    """
    own = sum(len(hidden_index(batch)) for batch in micro_batches)  # known on the host
    count = torch.full((), own, dtype=torch.float64, device=micro_batches[0]["token_mask"].device)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size > 1:
        dist.all_reduce(count)
    for batch in micro_batches:
        batch["mean_hidden"] = (count / (world_size * len(micro_batches))).float()
