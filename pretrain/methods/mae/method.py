"""Masked autoencoder (He et al. 2022), on pyramids with one visible unit in 2x2 (UM-MAE, Li et al. 2022)."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, Features, build_encoder
from pretrain.encoders.base import refine, xavier_initialise
from pretrain.encoders.patches import patch_statistics, patchify, sincos_axis, sincos_positions, unpatchify
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation, mask_of, rows_at
from pretrain.methods.mae import native
from pretrain.methods.mae.config import MaeConfig
from pretrain.methods.mask_counts import mask_grid, num_hidden


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> MaskedAutoencoder:
    """MAE around the configuration's encoder."""
    method, size, channels = config.method, config.views.global_size, config.data.channels
    assert config.encoder is not None
    frames = config.data.frames
    encoder = build_encoder(config.encoder, size, channels, mask_token=method.mask.secondary > 0, frames=frames)
    made = MaskedAutoencoder(method, encoder, size, config.data.planes, normalisation, timeline)
    if config.views.native:
        sides = config.views.global_crops[0].max_tokens
        assert sides is not None
        made.register_buffer("axis_positions", sincos_axis(method.decoder_dim // 2, sides), persistent=False)
    return made


class MaskedAutoencoder(Method):
    """Hide most of an image, encode the rest, and reconstruct what is hidden with a small decoder.

    The decoder works on a grid of the smaller of mask unit and token. Each token carries the indices of the units it
    stands for, so its decoded vectors land at their own positions whatever order the encoder keeps (the UM-MAE code
    reads positions in another order than its tokens).
    """

    def __init__(
        self,
        config: MaeConfig,
        encoder: Encoder,
        image_size: tuple[int, int],
        channels: int,
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.encoder = encoder
        self.norm_pix_loss, self.position_order = config.norm_pix_loss, config.position_order
        self.unit = min(config.mask.unit, encoder.stride)  # px of a decoded position
        self.grid = (image_size[0] // self.unit, image_size[1] // self.unit)
        units = mask_grid(config.mask, image_size)
        hidden, total = num_hidden(config.mask, units), units[0] * units[1]
        self.num_visible = total - hidden  # mask units
        self.num_hidden = hidden * self.grid[0] * self.grid[1] // total  # decoded positions
        self.per_token = (encoder.stride // self.unit) ** 2

        dim = config.decoder_dim
        self.decoder_embed = nn.Linear(encoder.dim, self.per_token * dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("decoder_positions", sincos_positions(dim, self.grid)[None], persistent=False)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, config.decoder_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, self.unit**2 * channels)
        xavier_initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def blocks(self) -> list[nn.Module]:
        *earlier, last = self.decoder_blocks
        return [*super().blocks(), *earlier, last.attn, last.mlp]  # of the last, `decode` calls the parts

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        if "global_patches" in batch:
            return native.loss(self, batch)
        images = self.normalise(batch["global_crops"][:, 0])
        features, hidden = self._encode(images, batch)
        return {"loss": self.loss(self.decode(features, self._where(hidden)), images, hidden)}

    def reconstruct(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted patches (b, n, p) over the decoder's grid, and which of them were hidden (b, n) bool."""
        features, hidden = self._encode(images, batch)
        return self.decode(features), hidden

    def _encode(self, images: Tensor, batch: Batch) -> tuple[Features, Tensor]:
        """Features of the visible units, and which patches of the decoder's grid were hidden (b, n) bool."""
        features = self.encoder(images, mask_of(batch, self.num_visible))
        return features, rearrange(refine(batch["drop_mask"], self.grid), "b h w -> b (h w)")

    def _where(self, hidden: Tensor) -> Tensor:
        """Raster indices (b, m) of the hidden patches (b, n) bool, ascending."""
        return torch.argsort((~hidden).to(torch.uint8), dim=1, stable=True)[:, : self.num_hidden]

    def decode(self, features: Features, wanted: Tensor | None = None) -> Tensor:
        """From the features of the visible tokens to the patches of the whole image (b, n, p), or only to those of the
        raster indices `wanted` (b, m): what the last block makes of the others, nobody reads."""
        assert features.ids_keep is not None
        tokens = rearrange(self.decoder_embed(features.tokens), "b n (k d) -> b (n k) d", k=self.per_token)
        units = rearrange(features.ids_keep, "b n k -> b (n k)")
        if self.position_order == "um_mae":
            units = raster_order(units, self.grid[1])
        units = rearrange(units, "b n -> b n 1").expand(-1, -1, tokens.shape[-1])
        full = repeat(self.mask_token.to(tokens.dtype), "1 1 d -> b n d", b=len(tokens), n=self.grid[0] * self.grid[1])
        full = full.scatter(1, units, tokens) + self.decoder_positions
        num_prefix = 0
        if (
            features.prefix_tokens is not None and self.per_token == 1
        ):  # a pyramid's embedding makes 2x2 positions of a token
            num_prefix = features.prefix_tokens.shape[1]
            full = torch.cat([self.decoder_embed(features.prefix_tokens), full], dim=1)
        *earlier, last = self.decoder_blocks
        for block in earlier:
            full = block(full)
        if wanted is None:
            full = last(full)[:, num_prefix:]
        else:
            full = full + last.attn(last.norm1(full))
            full = rows_at(full[:, num_prefix:], wanted)
            full = full + last.mlp(last.norm2(full))
        return self.decoder_pred(self.decoder_norm(full))

    def loss(self, predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared error over the hidden patches. Every image hides equally many, so the mean is global.

        `predicted` is (b, n, p) of all patches, or (b, m, p) of the hidden ones in raster order.
        """
        where = self._where(hidden)
        target = rows_at(patchify(images, self.unit), where)
        if self.norm_pix_loss:
            mean, deviation = patch_statistics(target)
            target = (target - mean) / deviation
        if predicted.shape[1] == hidden.shape[1]:
            predicted = rows_at(predicted, where)
        return (predicted.float() - target).square().mean()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        if "global_patches" in batch:
            return {}
        crops = batch["global_crops"][:, 0]
        images = self.normalise(crops)
        predicted, hidden = self.reconstruct(images, batch)
        patches = patchify(images, self.unit)
        if self.norm_pix_loss:  # the network predicts standardised patches; the true statistics bring them back
            mean, deviation = patch_statistics(patches)
            predicted = predicted.float() * deviation + mean
        hidden = rearrange(hidden, "b n -> b n 1")
        pasted = unpatchify(torch.where(hidden, predicted.float(), patches), self.grid, self.unit)
        masked = unpatchify(patches.masked_fill(hidden, 0.0), self.grid, self.unit)
        rows = torch.stack([self.show(crops), *(self.to_pictures(part, crops) for part in (masked, pasted))], dim=1)
        label = "reconstructions (image, input, output"
        label += "; patches de-normalised with the true mean and deviation)" if self.norm_pix_loss else ")"
        return {label: rearrange(rows, "b v c h w -> b c h (v w)")}


def raster_order(units: Tensor, width: int) -> Tensor:
    """The units (b, n) that UM-MAE's code takes its tokens for: the i-th quad's for the i-th visible unit.

    Tokens leave its encoder in raster order of their 2x2 quads, while the positions are read in raster order of the
    units, on a grid `width` wide. The two differ wherever neighbouring quads show different rows.
    """
    quads = units // width // 2 * (width // 2) + units % width // 2
    return units.sort(dim=1).values.gather(1, quads)
