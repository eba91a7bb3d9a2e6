from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eval.neighbours import least_typical, nearest


def test_the_nearest_are_those_of_all_pairs_without_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.neighbours._AT_ONCE", 70)
    features = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    own = torch.tensor([3, -1, 7, 0, 19])
    queries = features[own.clamp_min(0)]
    near = nearest(features, queries, 4, own)
    similarity = F.cosine_similarity(queries[:, None], features[None], dim=2)
    similarity[own >= 0, own[own >= 0]] = -2
    expected = similarity.sort(dim=1, descending=True)
    assert torch.equal(near.rows, expected.indices[:, :4])
    torch.testing.assert_close(near.similarity, expected.values[:, :4])
    assert near.rows[1, 0] == 0  # which is in it, and is no query by itself
    assert nearest(features, queries, 99, own).rows.shape == (5, 19)
    with pytest.raises(ValueError, match="two are needed"):
        nearest(features[:1], features[:1], 3, torch.tensor([0]))


def test_what_lies_alone_is_least_typical() -> None:
    features = F.one_hot(torch.tensor([0] * 6 + [1] * 6 + [2]), 3).float()
    features += 0.01 * torch.randn(13, 3, generator=torch.Generator().manual_seed(0))
    rows, similarity = least_typical(features, 3, 2)
    assert rows[0] == 12
    assert similarity[0] < 0.1 < 0.9 < similarity[1]
