"""The tokenizer of vector-quantised knowledge distillation (Peng et al. 2022, section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.encoders import Encoder, build_encoder
from pretrain.engines.precision import exactly
from pretrain.methods.vqkd.codebook import nearest
from pretrain.stream.pixels import normalised
from pretrain.tokenizers.card import TokenizerCard


class TaskHead(nn.Sequential):
    """Linear, tanh, linear: between the width of a transformer and that of codes or of a teacher."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim_out))
        for layer in (self[0], self[2]):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class VqkdTokenizer(nn.Module):
    """An encoder, a head and a codebook (k, d) of unit vectors: the code of a token is the nearest one's number."""

    def __init__(
        self, encoder: Encoder, head: TaskHead, codebook: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.vocab_size, self.stride = len(codebook), encoder.stride
        self.register_buffer("codebook", codebook)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        """Crops (b, c, h, w) uint8 or uint16 to codes (b, h / stride, w / stride) int64."""
        features = self.encoder(normalised(crops, self.mean, self.std))
        vectors = code_vectors(self.head, features.tokens)
        codes = nearest(rearrange(vectors, "b n d -> (b n) d"), self.codebook)
        return rearrange(codes, "(b h w) -> b h w", b=len(crops), h=features.grid[0])

    def blocks(self) -> list[nn.Module]:
        """What is compiled."""
        return self.encoder.blocks()


def code_vectors(head: TaskHead, tokens: Tensor) -> Tensor:
    """Tokens (..., d) to unit vectors (..., code_dim), in fp32: the nearest code is a matter of small differences."""
    with exactly(tokens.device):
        return F.normalize(head(tokens.float()), dim=-1)


def empty_tokenizer(card: TokenizerCard) -> VqkdTokenizer:
    """What takes the weights of the tokenizer that `card` describes."""
    assert card.encoder is not None
    assert card.mean is not None
    assert card.std is not None
    encoder = build_encoder(card.encoder, card.image_size, card.channels)
    codebook = torch.zeros(card.method.vocab_size, card.method.code_dim)
    return VqkdTokenizer(encoder, TaskHead(encoder.dim, card.method.code_dim), codebook, card.mean, card.std)
