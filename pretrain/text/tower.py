"""The text tower of CLIP: a transformer over the tokens of a caption (Radford et al. 2021, section 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pretrain.text.settings import TextConfig


class TextTower(nn.Module):
    """Token ids (b, n) int64 to features (b, embed_dim), not normalised.

    Its parameters have the names of OpenAI's and OpenCLIP's own. `end`: the id that ends a caption, whose place
    `pool: end` reads; None: the highest id of each caption, as in OpenAI's code.
    """

    def __init__(self, config: TextConfig, vocab_size: int, embed_dim: int, end: int | None = None) -> None:
        super().__init__()
        self.config, self.end = config, end
        self.token_embedding = nn.Embedding(vocab_size, config.dim)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.dim))
        blocks = (TextBlock(config.dim, config.heads, config.causal, config.activation) for _ in range(config.depth))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(config.dim)
        self.text_projection = nn.Parameter(torch.empty(config.dim, embed_dim))
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.dim**-0.5)
        within = self.config.dim**-0.5
        for block in self.blocks():
            nn.init.normal_(block.attn.in_proj_weight, std=within)
            nn.init.normal_(block.attn.out_proj.weight, std=within * (2 * self.config.depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * self.config.dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=within * (2 * self.config.depth) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def blocks(self) -> list[TextBlock]:
        """In order, for compilation and activation checkpointing."""
        return list(self.transformer["resblocks"])

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for block in self.blocks():
            states = block(states)
        states = self.ln_final(states)
        return self._pooled(states, tokens) @ self.text_projection

    def _pooled(self, states: Tensor, tokens: Tensor) -> Tensor:
        if self.config.pool != "end":
            return states[:, 0 if self.config.pool == "first" else -1]
        place = (tokens if self.end is None else (tokens == self.end).to(torch.uint8)).argmax(dim=1)
        return states[torch.arange(len(tokens), device=tokens.device), place]


class TextBlock(nn.Module):
    """A block with its norms in front, on (b, n, d)."""

    def __init__(self, dim: int, heads: int, causal: bool, activation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = TextAttention(dim, heads, causal)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = TextMlp(dim, activation)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attn(self.ln_1(states))
        return states + self.mlp(self.ln_2(states))


class TextAttention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        projected = F.linear(states, self.in_proj_weight, self.in_proj_bias)
        query, key, value = rearrange(projected, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out_proj(rearrange(found, "b h n d -> b n (h d)"))


class TextMlp(nn.Module):
    """Two linear layers, the first four times as wide."""

    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        self.quick = activation == "quick_gelu"
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.c_fc(states)
        return self.c_proj(hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden))
