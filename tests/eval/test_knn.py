"""k-NN against the paper's formula as slow loops, and its edges."""

import math

import pytest
import torch

from eval.probes import knn
from eval.probes.knn import knn_accuracy


def slow_votes(train, train_labels, query, k, temperature, num_classes):
    cosines = [float(query @ t / (query.norm() * t.norm())) for t in train]
    nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
    votes = [0.0] * num_classes
    for i in nearest:
        votes[int(train_labels[i])] += math.exp(cosines[i] / temperature)
    return votes


@pytest.fixture
def blobs():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 12, generator=generator)
    train_labels = torch.randint(7, (90,), generator=generator)
    val_labels = torch.randint(7, (40,), generator=generator)
    train = centres[train_labels] + 1.5 * torch.randn(90, 12, generator=generator)
    val = centres[val_labels] + 1.5 * torch.randn(40, 12, generator=generator)
    return train, train_labels, val, val_labels


@pytest.mark.parametrize("chunk_elements", [1, 90 * 7, 2**20])
def test_equals_the_formula(blobs, monkeypatch, chunk_elements):
    monkeypatch.setattr(knn, "CHUNK_ELEMENTS", chunk_elements)
    train, train_labels, val, val_labels = blobs
    scores = knn_accuracy(*blobs, num_classes=7, ks=(1, 5, 20), temperature=0.1)
    for k in (1, 5, 20):
        top1 = top5 = 0
        for query, label in zip(val, val_labels.tolist(), strict=True):
            votes = slow_votes(train, train_labels, query, k, 0.1, 7)
            order = sorted((c for c in range(7) if votes[c] > 0), key=lambda c: (-votes[c], c))
            top1 += order[0] == label
            top5 += label in order[:5]
        assert scores[k] == pytest.approx({"top1": top1 / 40, "top5": top5 / 40})


def test_top5_needs_more_than_five_classes(blobs):
    train, train_labels, val, val_labels = blobs
    assert set(knn_accuracy(train, train_labels % 5, val, val_labels % 5, num_classes=5, ks=(10,))[10]) == {"top1"}


def test_k_beyond_train_uses_all_and_says_so(blobs):
    with pytest.warns(UserWarning, match=r"\[200\] is more than the 90 train samples"):
        scores = knn_accuracy(*blobs, num_classes=7, ks=(90, 200))
    assert scores[200] == scores[90]


def test_feature_scale_and_tiny_temperature_change_nothing_finite(blobs):
    train, train_labels, val, val_labels = blobs
    scores = knn_accuracy(train, train_labels, val, val_labels, num_classes=7, ks=(1, 10), temperature=1e-4)
    assert scores[10]["top1"] == scores[1]["top1"]  # only the nearest counts
    scaled = knn_accuracy(train * 1e3, train_labels, val * 1e-3, val_labels, num_classes=7, ks=(10,))
    assert scaled == knn_accuracy(*blobs, num_classes=7, ks=(10,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, tl, v, vl: (t, tl, v, vl - 1), "lie in -1 .. 5"),
        (lambda t, tl, v, vl: (t, tl[:3], v, vl), r"train labels are \(3,\) for 90"),
        (lambda t, tl, v, vl: (t, tl, v[:, :5], vl), r"\(40, 5\)"),
        (lambda t, tl, v, vl: (t, tl, v[:0], vl[:0]), "0 val features"),
    ],
)
def test_errors_name_the_value(blobs, change, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*change(*blobs), num_classes=7)
