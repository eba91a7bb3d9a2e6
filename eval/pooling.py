"""Classifiers that look at patch tokens: a learned query asks them, and its answer is classified.

Every parameter has a leading axis r: so many classifiers of one form stand side by side, with weights of their own, and
read the same batch of tokens. The tokens are frozen and the query is the same for every image, so nothing is ever
projected token by token where that can be helped: a key's projection moves into the query, and values are projected
after they are pooled. In d dimensions a token then costs 4 d products a head in place of 4 d^2, and the function stays
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

NUM_HEADS_DIM = 64  # dimensions of a head, where nothing else is asked for
_LEAST_READ = 24  # values that a query reads of its own


class Pooling(nn.Module):
    """r classifiers of tokens (b, t, d). `keep`: what tokens become before any parameter is needed."""

    num: int

    def keep(self, tokens: Tensor) -> Tensor:
        """(b, t, d) of tokens (b, t, d), once for all r."""
        return tokens

    def pooled(self, kept: Tensor, there: Tensor | None = None) -> Tensor:
        """(r, b, e) of what `keep` gave; there: (b, t) bool which of the tokens are an image's, all where None."""
        raise NotImplementedError

    def classify(self, pooled: Tensor) -> Tensor:
        """(r, b, classes) logits."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, there: Tensor | None = None) -> Tensor:
        """(r, b, classes) logits of tokens (b, t, d), of which those `there` (b, t) count; all where None."""
        return self.classify(self.pooled(self.keep(tokens), there))


def drawn(generator: torch.Generator, num: int, *shape: int, std: float = 0.02) -> nn.Parameter:
    """(num, *shape) of a normal distribution, the same in each of the `num`."""
    return nn.Parameter((torch.randn(*shape, generator=generator) * std).expand(num, *shape).clone())


def constant(value: float, num: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.full((num, *shape), float(value)))


def attend(tokens: Tensor, asked: Tensor, there: Tensor | None = None) -> Tensor:
    """(r, b, h, d) the tokens (b, t, d), or (r, b, t, d), weighted by the softmax of their products with `asked`
    (r, h, d); those that are not `there` (b, t) weigh nothing."""
    nowhere = None if there is None else rearrange(~there, "b t -> b 1 t")
    if tokens.ndim == 3:
        num = len(asked)
        scores = einsum(tokens, rearrange(asked, "r h d -> (r h) d"), "b t d, q d -> b q t")
        scores = scores if nowhere is None else scores.masked_fill(nowhere, -torch.inf)
        return rearrange(torch.bmm(scores.softmax(dim=2), tokens), "b (r h) d -> r b h d", r=num)
    scores = einsum(tokens, asked, "r b t d, r h d -> r b h t")
    scores = scores if nowhere is None else scores.masked_fill(nowhere, -torch.inf)
    return torch.matmul(scores.softmax(dim=3), tokens)


def layer_norm(values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Of the last axis of values (r, b, d), with weight and bias (r, d)."""
    return F.layer_norm(values, values.shape[-1:], eps=eps) * weight[:, None] + bias[:, None]


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(r, b, e) of values (r, b, d), weight (r, e, d), bias (r, e)."""
    return torch.baddbmm(bias[:, None], values, weight.mT)


class CrossAttention(Pooling):
    """V-JEPA's attentive probe (Bardes et al. 2024), one block: query + attention(query, norm(tokens)), then + an MLP
    of its norm, then a linear layer. The query is not normed before it asks, and nothing projects the answer.

    A bias of the keys would add the same to all tokens' scores and cancel, so there is none.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        num: int = 1,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        eps: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num, self.heads, self.eps = num, heads or heads_of(dim), eps
        _check_heads(dim, self.heads)
        hidden, generator = int(dim * mlp_ratio), torch.Generator().manual_seed(seed)
        self.query = drawn(generator, num, dim)
        self.norm1_weight, self.norm1_bias = constant(1, num, dim), constant(0, num, dim)
        self.q_weight, self.q_bias = drawn(generator, num, dim, dim), constant(0, num, dim)
        self.k_weight = drawn(generator, num, dim, dim)
        self.v_weight, self.v_bias = drawn(generator, num, dim, dim), constant(0, num, dim)
        self.norm2_weight, self.norm2_bias = constant(1, num, dim), constant(0, num, dim)
        self.fc1_weight, self.fc1_bias = drawn(generator, num, hidden, dim), constant(0, num, hidden)
        self.fc2_weight, self.fc2_bias = drawn(generator, num, dim, hidden), constant(0, num, dim)
        self.linear_weight, self.linear_bias = drawn(generator, num, num_classes, dim), constant(0, num, num_classes)

    def keep(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)

    def pooled(self, kept: Tensor, there: Tensor | None = None) -> Tensor:
        query = linear(self.query[:, None], self.q_weight, self.q_bias)[:, 0]
        attended = _answer(
            kept, there, query, self.k_weight, self.v_weight, self.v_bias, self.norm1_weight, self.norm1_bias,
            self.heads,
        )  # fmt: skip
        found = self.query[:, None] + attended
        normed = layer_norm(found, self.norm2_weight, self.norm2_bias, self.eps)
        hidden = F.gelu(linear(normed, self.fc1_weight, self.fc1_bias))
        return found + linear(hidden, self.fc2_weight, self.fc2_bias)

    def classify(self, pooled: Tensor) -> Tensor:
        return linear(pooled, self.linear_weight, self.linear_bias)


class ProjectedAttention(Pooling):
    """CAPI's (Darcet et al. 2025), as the authors of DINOv3's FINO keep it: tokens through a linear layer of `width`
    and a norm, asked by one raw query, then a linear layer. The first layer is paid for each token."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        num: int = 1,
        width: int = 512,
        heads: int = 8,
        eps: float = 1e-5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num, self.heads, self.eps = num, heads, eps
        _check_heads(width, heads)
        generator = torch.Generator().manual_seed(seed)
        self.input_weight, self.input_bias = drawn(generator, num, width, dim), constant(0, num, width)
        self.norm_weight, self.norm_bias = constant(1, num, width), constant(0, num, width)
        self.query = drawn(generator, num, width)
        self.k_weight = drawn(generator, num, width, width)
        self.v_weight, self.v_bias = drawn(generator, num, width, width), constant(0, num, width)
        self.linear_weight, self.linear_bias = drawn(generator, num, num_classes, width), constant(0, num, num_classes)

    def pooled(self, kept: Tensor, there: Tensor | None = None) -> Tensor:
        tokens = einsum(kept, self.input_weight, "b t d, r e d -> r b t e") + self.input_bias[:, None, None]
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)
        return _answer(
            tokens, there, self.query, self.k_weight, self.v_weight, self.v_bias, self.norm_weight, self.norm_bias,
            self.heads,
        )  # fmt: skip

    def classify(self, pooled: Tensor) -> Tensor:
        return linear(pooled, self.linear_weight, self.linear_bias)


class BatchNormed(Pooling):
    """What is pooled is standardised over the batch, without an affine part, and classified by a linear layer.

    Outside of training by running means of the batches' statistics, as of `torch.nn.BatchNorm1d`.
    """

    momentum: ClassVar[float] = 0.1
    eps: ClassVar[float] = 1e-6
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, num_classes: int, num: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num = num
        self.linear_weight = drawn(generator, num, num_classes, width, std=0.01)
        self.linear_bias = constant(0, num, num_classes)
        self.register_buffer("running_mean", torch.zeros(num, width))
        self.register_buffer("running_var", torch.ones(num, width))

    def classify(self, pooled: Tensor) -> Tensor:
        if self.training and pooled.shape[1] > 1:
            var, mean = torch.var_mean(pooled, dim=1, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (pooled.shape[1] / (pooled.shape[1] - 1)), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        normed = (pooled - mean[:, None]) * (var + self.eps).rsqrt()[:, None]
        return linear(normed, self.linear_weight, self.linear_bias)


class EfficientProbing(BatchNormed):
    """Psomas et al. 2026: m queries ask the tokens as they are, without a projection of keys; of one linear layer of
    values, each query reads a part of its own. BatchNorm and a linear layer follow."""

    def __init__(self, dim: int, num_classes: int, *, num: int = 1, queries: int | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(dim, num_classes, num, generator)
        queries = queries or queries_of(dim)
        _check_heads(dim, queries)
        self.queries = drawn(generator, num, queries, dim)
        self.v_weight = drawn(generator, num, dim, dim)

    def pooled(self, kept: Tensor, there: Tensor | None = None) -> Tensor:
        dim = kept.shape[2]
        found = attend(kept, self.queries * dim**-0.5, there)
        values = rearrange(self.v_weight, "r (m e) d -> r m e d", m=self.queries.shape[1])
        return rearrange(einsum(found, values, "r b m d, r m e d -> r b m e"), "r b m e -> r b (m e)")


class MeanOfTokens(BatchNormed):
    """No attention: the mean of the tokens, to tell what attention adds when all else is alike."""

    def __init__(self, dim: int, num_classes: int, *, num: int = 1, seed: int = 0) -> None:
        super().__init__(dim, num_classes, num, torch.Generator().manual_seed(seed))

    def pooled(self, kept: Tensor, there: Tensor | None = None) -> Tensor:
        if there is None:
            return reduce(kept, "b t d -> 1 b d", "mean").expand(self.num, -1, -1)
        weights = there / there.sum(dim=1, keepdim=True)
        return einsum(kept, weights.to(kept.dtype), "b t d, b t -> b d").expand(self.num, -1, -1)


FORMS: dict[str, type[Pooling]] = {
    "cross": CrossAttention,
    "capi": ProjectedAttention,
    "efficient": EfficientProbing,
    "mean": MeanOfTokens,
}


def build(form: str, dim: int, num_classes: int, seeds: Sequence[int]) -> Pooling:
    """Classifiers of one form side by side, the first weights of each drawn from its seed."""
    apart = {seed: FORMS[form](dim, num_classes, seed=seed).state_dict() for seed in set(seeds)}
    heads = FORMS[form](dim, num_classes, num=len(seeds))
    heads.load_state_dict({name: torch.cat([apart[seed][name] for seed in seeds]) for name in heads.state_dict()})
    return heads


def heads_of(dim: int) -> int:
    """Of 64 dimensions each, or of the width that divides `dim` and is nearest to that."""
    return min((heads for heads in range(1, dim + 1) if dim % heads == 0), key=lambda h: abs(dim / h - NUM_HEADS_DIM))


def queries_of(dim: int) -> int:
    """As many as each read 24 values of their own, as the paper's 32 of a ViT-B do; at least up to 4, at most 32."""
    return max(count for count in range(1, 33) if dim % count == 0 and (count <= 4 or dim // count >= _LEAST_READ))


def _answer(
    tokens: Tensor,
    there: Tensor | None,
    query: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    heads: int,
) -> Tensor:
    """(r, b, d) attention of the `query` (r, d) to tokens (.., t, d) x gain + shift, of which those `there` count; keys
    and values are linear."""
    query = rearrange(query, "r (h e) -> r h e", h=heads)
    keys = rearrange(k_weight, "r (h e) d -> r h e d", h=heads)
    values = rearrange(v_weight, "r (h e) d -> r h e d", h=heads)
    asked = einsum(query * query.shape[2] ** -0.5, keys, "r h e, r h e d -> r h d") * gain[:, None]
    found = (
        attend(tokens, asked, there) * gain[:, None, None] + shift[:, None, None]
    )  # the weights of a softmax add up to 1
    return rearrange(einsum(found, values, "r b h d, r h e d -> r b h e"), "r b h e -> r b (h e)") + v_bias[:, None]


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide {dim} dimensions; give a divisor of them")
