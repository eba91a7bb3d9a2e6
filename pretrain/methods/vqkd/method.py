"""Vector-quantised knowledge distillation (Peng et al. 2022, section 2.1): the tokenizer of BEiT v2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.config import Config
from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.load import LoadedEncoder, load_any
from pretrain.encoders.patches import sincos_positions
from pretrain.engines.schedules import Timeline
from pretrain.methods.base import Method, Normalisation
from pretrain.methods.frozen import Frozen, checksum
from pretrain.methods.gram import on_grid
from pretrain.methods.vqkd.codebook import Codebook
from pretrain.methods.vqkd.config import VqkdConfig
from pretrain.methods.vqkd.network import TaskHead, VqkdTokenizer, code_vectors
from pretrain.stream.pixels import normalised


def build(config: Config, normalisation: Normalisation, timeline: Timeline) -> Vqkd:
    """VQ-KD around the configuration's encoder, with the teacher that it names."""
    method, size = config.method, config.views.global_size
    assert config.encoder is not None
    encoder = build_encoder(config.encoder, size, config.data.channels)
    return Vqkd(method, encoder, load_any(method.teacher, size), size, normalisation, timeline)


class Vqkd(Method):
    """Write each token of an image as one code, from which a small decoder must tell what a frozen teacher says there.

    The teacher sees the same crop in its own normalisation. Where its map has another size than the tokenizer's, it is
    interpolated bilinearly.
    """

    def __init__(
        self,
        config: VqkdConfig,
        encoder: Encoder,
        teacher: LoadedEncoder,
        image_size: tuple[int, int],
        normalisation: Normalisation,
        timeline: Timeline,
    ) -> None:
        super().__init__(normalisation, timeline)
        self.normalisation = normalisation
        self.grid = (image_size[0] // encoder.stride, image_size[1] // encoder.stride)
        self.encoder = encoder
        self.head = TaskHead(encoder.dim, config.code_dim)
        self.codebook = Codebook(config)
        self.decoder = Decoder(config, encoder.dim, teacher.encoder.dim, self.grid)
        self.teacher = Frozen(teacher.encoder)
        self._checksum = checksum(teacher.encoder)
        self.register_buffer("teacher_mean", torch.tensor(teacher.mean), persistent=False)
        self.register_buffer("teacher_std", torch.tensor(teacher.std), persistent=False)
        self.commitment = config.commitment

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *self.decoder.blocks, *self.teacher.blocks()]

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        crops = batch["global_crops"][:, 0]
        vectors = self.vectors(crops)
        _, codes = self.codebook(rearrange(vectors, "b n d -> (b n) d"))
        codes = rearrange(codes, "(b n) d -> b n d", b=len(crops))
        predicted = self.decoder(vectors + (codes - vectors).detach()).float()  # the gradient goes straight through
        distillation = (1 - F.cosine_similarity(predicted, self.wanted(crops), dim=-1)).mean()
        commitment = F.mse_loss(vectors, codes)
        return {
            "loss": distillation + self.commitment * commitment,
            "distillation": distillation.detach(),
            "commitment": commitment.detach(),
        }

    def vectors(self, crops: Tensor) -> Tensor:
        """Crops (b, c, h, w) to unit vectors (b, n, code_dim) fp32."""
        tokens = self.encoder(self.normalise(crops)).tokens
        return code_vectors(self.head, tokens)

    def wanted(self, crops: Tensor) -> Tensor:
        """The teacher's tokens (b, n, d) fp32 on the tokenizer's grid."""
        features = self.teacher(normalised(crops, self.teacher_mean, self.teacher_std))
        if features.grid is None:
            raise ValueError("method.teacher gives no map of tokens, which VQ-KD needs; name an encoder that does")
        return on_grid(features.tokens.float(), features.grid, self.grid, "bilinear")

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        if step:
            return
        self.eval()
        self.codebook.train()  # it remembers the tokens that it is shown
        for batch in micro_batches:
            look(batch)
        self.codebook.start()
        self.train()

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        with self.codebook.forgetting():
            yield

    def after_step(self, step: int, took: Tensor | None = None) -> None:
        super().after_step(step, took)
        self.codebook.update(step)

    def pinned(self) -> dict[str, str]:
        """The teacher's weights: a run that is named as the teacher may have gone on meanwhile."""
        return {"method.teacher": self._checksum}

    def frozen_encoder(self) -> None:
        return None

    def tokenizer(self) -> VqkdTokenizer:
        return VqkdTokenizer(
            self.encoder, self.head, self.codebook.vectors, self.normalisation.mean, self.normalisation.std
        )

    def schedules(self, step: int) -> dict[str, float]:
        return self.codebook.values()


class Decoder(nn.Module):
    """A small transformer from codes to a teacher's tokens, on a map of `grid` tokens with fixed positions."""

    def __init__(self, config: VqkdConfig, dim: int, dim_out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        dim = config.decoder_dim or dim
        heads = config.decoder_heads or max(dim // 64, 1)
        self.embed = nn.Linear(config.code_dim, dim)
        self.register_buffer("positions", sincos_positions(dim, grid)[None], persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = TaskHead(dim, dim_out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.eps = 1e-6

    def forward(self, codes: Tensor) -> Tensor:
        """(b, n, code_dim) -> (b, n, dim_out)."""
        tokens = self.embed(codes) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens))
