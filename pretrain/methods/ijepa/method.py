"""I-JEPA: a joint-embedding predictive architecture of images (Assran et al. 2023)."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, Mask, build_encoder
from pretrain.encoders.attention_maps import attention_pictures
from pretrain.encoders.patches import sincos_positions
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation, rows_at
from pretrain.methods.ijepa.config import IjepaConfig, unit_of
from pretrain.methods.ijepa.masks import plan


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Ijepa:
    """I-JEPA around two encoders of the configuration: one learns, one follows."""
    size, channels = config.views.global_size, config.data.channels
    assert config.encoder is not None
    encoder = build_encoder(config.encoder, size, channels)
    teacher = build_encoder(dataclasses.replace(config.encoder, drop_path=0.0), size, channels)
    unit = unit_of(config.method, encoder.stride)
    assert unit is not None
    grid = (size[0] // unit, size[1] // unit)
    return Ijepa(config.method, encoder, teacher, grid, (config.train.batch_size, config.seed), normalisation, timeline)


class Ijepa(Method):
    """From the features of what is seen of an image, a predictor tells those that a slow average has of other blocks.

    `grid` (gh, gw) of units, one a token. `drawn`: the images of a step and the run's seed, of which the sizes of a
    step's blocks are a function.
    """

    def __init__(
        self,
        config: IjepaConfig,
        encoder: Encoder,
        teacher: Encoder,
        grid: tuple[int, int],
        drawn: tuple[int, int],
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.config, self.grid, self.drawn = config, grid, drawn
        self.encoder = encoder
        self.predictor = Predictor(encoder.dim, config, grid)
        self.teacher = teacher
        self.encoder_loaded()
        self.teacher.requires_grad_(False)

    def encoder_loaded(self) -> None:
        assert self.encoder is not None
        self.teacher.load_state_dict(self.encoder.state_dict())

    def train(self, mode: bool = True) -> Ijepa:
        super().train(mode)
        self.teacher.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.teacher.blocks(), *self.predictor.blocks]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = self.normalise(batch["global_crops"][:, 0])
        rows, seed = self.drawn
        sizes = plan(self.config, self.grid, rows, seed, step)
        wanted = block_units(batch["target_corners"], sizes.target, self.grid[1])
        with torch.no_grad():
            features = self.teacher(images)
            whole = self.targets(features.tokens)
            targets = rows_at(whole, rearrange(wanted, "b n m -> b (n m)"))
        predicted = self.predict(images, Mask(drop=batch["drop_mask"], num_visible=sizes.count), wanted)
        loss = F.smooth_l1_loss(predicted.float(), targets)
        with torch.no_grad():
            directions = F.normalize(features.pooled.float(), dim=-1)
            deviation = directions.std(dim=0, unbiased=False).mean() * directions.shape[-1] ** 0.5
            spread = targets.std(dim=0, unbiased=False).mean()
        # feature_std, 1: the images' directions spread evenly; 0: collapsed
        return {"loss": loss, "target_std": spread, "feature_std": deviation}

    @staticmethod
    def targets(tokens: Tensor) -> Tensor:
        """The teacher's tokens (b, n, d), each standardised over its features, in fp32."""
        return F.layer_norm(tokens.float(), tokens.shape[-1:])

    def predict(self, images: Tensor, mask: Mask, wanted: Tensor) -> Tensor:
        """(b, n * m, d) features of the units `wanted` (b, n, m), block by block, from what `mask` leaves of images."""
        assert self.encoder is not None
        features = self.encoder(images, mask)
        assert features.ids_keep is not None
        return self.predictor(features.tokens, rearrange(features.ids_keep, "b n 1 -> b n"), wanted)

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        assert self.encoder is not None
        return [(self.teacher, self.encoder)]

    def ema_momentum(self, step: int) -> float:
        start = self.config.teacher_momentum
        return start + (1 - start) * min(1.0, step / max(1, self.timeline.total_steps))

    def frozen_encoder(self) -> Encoder | None:
        return self.teacher

    def schedules(self, step: int) -> dict[str, float]:
        return {"momentum": self.ema_momentum(step)}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        crops = batch["global_crops"][:, 0]
        return attention_pictures(self.teacher, self.normalise(crops), crops, self.show, of="teacher")


class Predictor(nn.Module):
    """A narrow transformer that is shown the context, and of one target block at a time where it lies."""

    def __init__(self, dim: int, config: IjepaConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        width = config.predictor_dim
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)
        self.blocks = nn.ModuleList(
            Block(width, config.predictor_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
            for _ in range(config.predictor_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, units: Tensor, wanted: Tensor) -> Tensor:
        """Tokens (b, k, d) of the units (b, k) and the units `wanted` (b, n, m), to their features (b, n * m, d)."""
        blocks, size = wanted.shape[1:]
        seen = self.embed(tokens) + self.positions[units]
        asked = self.mask_token + rearrange(self.positions[wanted], "b n m d -> (b n) m d")
        seen = repeat(seen, "b k d -> (b n) k d", n=blocks)
        states = torch.cat([seen, asked.to(seen.dtype)], dim=1)
        for block in self.blocks:
            states = block(states)
        told = self.proj(self.norm(states[:, -size:]))
        return rearrange(told, "(b n) m d -> b (n m) d", n=blocks)


def block_units(corners: Tensor, size: tuple[int, int], width: int) -> Tensor:
    """(b, n, h * w) raster numbers, on a grid `width` wide, of the units of blocks with these corners (b, n, 2)."""
    rows, columns = (torch.arange(side, device=corners.device) for side in size)
    inside = rearrange(rearrange(rows, "h -> h 1") * width + columns, "h w -> (h w)")
    return rearrange(corners[..., 0] * width + corners[..., 1], "b n -> b n 1") + inside
