"""Classifiers of tokens against the slow forms that project every token, in torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.pooling import FORMS, CrossAttention, EfficientProbing, MeanOfTokens, ProjectedAttention, heads_of

DIM, CLASSES, HEADS = 24, 5, 4


@pytest.fixture
def tokens():
    return torch.randn(7, 10, DIM, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def scrambled(pooling):
    """Every parameter moved away from its first value, and each of the classifiers another way."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return pooling


def slow_attention(query, tokens, k_weight, k_bias, v_weight, v_bias, heads):
    """Keys and values of every token."""
    split = lambda each: each.unflatten(-1, (heads, -1)).transpose(-3, -2)  # noqa: E731
    keys, values = F.linear(tokens, k_weight, k_bias), F.linear(tokens, v_weight, v_bias)
    asked = query.expand(len(tokens), 1, -1)
    return F.scaled_dot_product_attention(split(asked), split(keys), split(values)).transpose(1, 2).flatten(2)[:, 0]


@pytest.mark.parametrize("place", [0, 2])
def test_cross_attention(tokens, place):
    ours = scrambled(CrossAttention(DIM, CLASSES, num=3, heads=HEADS))
    p = {name: value[place] for name, value in ours.named_parameters()}
    normed = F.layer_norm(tokens, (DIM,), p["norm1_weight"], p["norm1_bias"], 1e-5)
    query = F.linear(p["query"], p["q_weight"], p["q_bias"])
    bias = torch.randn(DIM)  # of keys: it cancels
    x = p["query"] + slow_attention(query, normed, p["k_weight"], bias, p["v_weight"], p["v_bias"], HEADS)
    hidden = F.linear(F.layer_norm(x, (DIM,), p["norm2_weight"], p["norm2_bias"], 1e-5), p["fc1_weight"], p["fc1_bias"])
    x = x + F.linear(F.gelu(hidden), p["fc2_weight"], p["fc2_bias"])
    torch.testing.assert_close(
        ours(tokens)[place], F.linear(x, p["linear_weight"], p["linear_bias"]), rtol=1e-4, atol=1e-4
    )


def test_projected_attention(tokens):
    ours = scrambled(ProjectedAttention(DIM, CLASSES, num=2, width=16, heads=HEADS))
    p = {name: value[1] for name, value in ours.named_parameters()}
    kept = F.layer_norm(
        F.linear(tokens, p["input_weight"], p["input_bias"]), (16,), p["norm_weight"], p["norm_bias"], 1e-5
    )
    x = slow_attention(p["query"], kept, p["k_weight"], torch.randn(16), p["v_weight"], p["v_bias"], HEADS)
    torch.testing.assert_close(ours(tokens)[1], F.linear(x, p["linear_weight"], p["linear_bias"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [EfficientProbing, MeanOfTokens])
def test_batch_norm_is_torchs(tokens, form):
    ours = scrambled(form(DIM, CLASSES, num=2))
    norm = nn.BatchNorm1d(DIM, affine=False, eps=1e-6)
    p = {name: value[1] for name, value in ours.named_parameters()}

    def slow(tokens):
        if form is MeanOfTokens:
            pooled = tokens.mean(dim=1)
        else:
            weights = (tokens @ p["queries"].T * DIM**-0.5).softmax(dim=1)  # (b, t, m)
            values = F.linear(tokens, p["v_weight"]).unflatten(2, (p["queries"].shape[0], -1))
            pooled = torch.einsum("b t m, b t m e -> b m e", weights, values).flatten(1)
        return F.linear(norm(pooled), p["linear_weight"], p["linear_bias"])

    for _ in range(3):
        torch.testing.assert_close(ours(tokens)[1], slow(tokens), rtol=1e-4, atol=1e-4)
    ours.eval()
    norm.eval()
    torch.testing.assert_close(ours(tokens)[1], slow(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_classifiers_side_by_side_do_not_meet(tokens, name):
    """The gradient of one is that of it alone."""
    alone, many = FORMS[name](DIM, CLASSES, num=1, seed=3), FORMS[name](DIM, CLASSES, num=3, seed=3)
    alone(tokens).square().mean().backward()
    many(tokens)[1].square().mean().backward()
    for (label, one), three in zip(alone.named_parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(three[1], one[0], rtol=0, atol=0)
        assert not three.grad[0].any(), label
        torch.testing.assert_close(three.grad[1], one.grad[0], rtol=1e-4, atol=1e-5)


def test_heads():
    assert [heads_of(dim) for dim in (64, 192, 384, 1024, 48, 100)] == [1, 3, 6, 16, 1, 2]
    with pytest.raises(ValueError, match="5 heads do not divide 24"):
        CrossAttention(DIM, CLASSES, heads=5)
