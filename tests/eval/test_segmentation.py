"""Segmentation from frozen patches: against slow forms, on what can be known, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patchwork import Given, InMemory, blocks, features, store
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import NearestNeighbors

from eval.base import IGNORED
from eval.outcomes import Outcome
from eval.patch_heads import Standard, fit_linear, knn_heads, linear_head
from eval.patches import Drawn, Levels
from eval.probes.segmentation import SPEC, SegmentationSettings, draw, judge, run

FEW = SegmentationSettings(patches=1500, bank=400, strengths=(1e-2, 1e-4), ks=(3, 10))


def hard(num: int = 300, dim: int = 5, classes: int = 4) -> Drawn:
    tokens, masks = blocks(num, 1, 2, classes, dim, 1.5, seed=3)
    targets = torch.nn.functional.one_hot(masks[:, 0, 0], classes).float()
    return Drawn(tokens.values[:, 0], targets, torch.arange(num))


def test_the_linear_layer_is_logistic_regression() -> None:
    train = hard()
    weights = fit_linear(train, 1e-2, "cpu", iterations=500)
    slow = LogisticRegression(C=1 / (1e-2 * len(train.features)), tol=1e-8, max_iter=2000)
    slow.fit(train.features.double().numpy(), train.targets.argmax(dim=1).numpy())
    mean = weights[:-1].T.mean(dim=0)
    np.testing.assert_allclose((weights[:-1].T - mean).numpy(), slow.coef_, atol=3e-3)


def test_shares_of_classes_are_learnt_like_repeated_patches() -> None:
    """Half of a patch is one class and half another: as two patches of half the weight; what is not judged has none."""
    train = hard(60)
    mixed = train.targets.clone()
    mixed[::3] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    mixed[1::3] *= 0.25
    weights = fit_linear(Drawn(train.features, mixed, train.images), 1e-2, "cpu", iterations=500)
    parts = [(place, label) for place in range(60) for label in range(4) if mixed[place, label] > 0]
    slow = LogisticRegression(C=1 / (1e-2 * float(mixed.sum())), tol=1e-9, max_iter=5000)
    slow.fit(
        train.features[[place for place, _ in parts]].double().numpy(),
        [label for _, label in parts],
        sample_weight=[float(mixed[part]) for part in parts],
    )
    np.testing.assert_allclose((weights[:-1] - weights[:-1].mean(dim=1, keepdim=True)).T.numpy(), slow.coef_, atol=3e-3)


def test_standardised_features_go_into_the_head_as_they_are() -> None:
    train = hard(100)
    train.features[:, 2] = 4.0
    standard = Standard.of(train.features)
    weights = torch.randn(6, 4)
    tokens = train.features.view(10, 10, 5)
    expected = standard(tokens) @ weights[:-1] + weights[-1]
    torch.testing.assert_close(linear_head(weights, standard, "cpu")(tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_nearest_patches_vote_by_their_shares() -> None:
    bank = hard(40)
    bank = Drawn(bank.features, torch.rand(40, 4), bank.images)
    queries = torch.randn(3, 4, 5)
    found = knn_heads(bank, (3, 7), 0.1, "cpu")[7](queries)
    nearest = NearestNeighbors(n_neighbors=7, metric="cosine").fit(bank.features.numpy())
    distances, places = nearest.kneighbors(queries.flatten(0, 1).numpy())
    for query, (far, near) in enumerate(zip(distances, places, strict=True)):
        votes = (np.exp((1 - far) / 0.1)[:, None] * bank.targets.numpy()[near]).sum(axis=0)
        np.testing.assert_allclose(found.flatten(0, 1)[query].numpy(), votes / votes.sum(), rtol=1e-3)


def test_mean_iou_is_scikit_learns_over_all_pixels() -> None:
    tokens, masks = blocks(6, 3, 4, 4, 8, 2.0, seed=0)
    masks[0, :5] = IGNORED
    head = lambda values: values[..., :4]  # noqa: E731
    levels = Levels()
    counts = judge({"any": head}, tokens, Given(masks), torch.arange(6), levels)["any"]
    predicted = torch.nn.functional.interpolate(
        head(tokens.values).mT.unflatten(2, (3, 3)), (12, 12), mode="bilinear"
    ).argmax(dim=1)
    judged = masks != IGNORED
    order = torch.tensor(levels.levels)
    expected = jaccard_score(masks[judged], order[predicted[judged]], average="macro", labels=sorted(levels.levels))
    assert Outcome("mean_iou", counts).number() == pytest.approx(expected, abs=1e-6)


def test_what_patches_tell_is_found_and_noise_is_not() -> None:
    told, noise = {}, {}
    for found, level in ((told, 0.3), (noise, 300.0)):
        train, val = (features(*blocks(40, 4, 4, 3, 8, level, seed)) for seed in (1, 2))
        found |= run(store(train, val), FEW)
    for name in ("linear", "knn"):
        assert told[name]["pixels"]["value"] > 0.8  # between patches of different classes the border is interpolated
        assert told[name]["iou"]["value"] > 0.65
        assert noise[name]["iou"]["value"] < 0.4
        assert told[name]["iou"]["standard_error"] > 0
        assert told[name]["of_class"].keys() == {"0", "1", "2"}
    assert told["chance"]["iou"] == pytest.approx(1 / 9, abs=0.02)
    again = run(store(*(features(*blocks(40, 4, 4, 3, 8, 0.3, seed)) for seed in (1, 2))), FEW)
    assert again["linear"]["iou"]["value"] == told["linear"]["iou"]["value"]
    columns = SPEC.columns(told, "")
    assert [column.name for column in columns if column.headline] == [
        "segmentation_linear_iou",
        "segmentation_knn_iou",
    ]
    assert "3 classes at 16x16 px from 4x4 patches, 40 val images" in SPEC.notes(told, FEW)[0]


def test_images_are_drawn_and_their_rows_told() -> None:
    train, val = (features(*blocks(60, 4, 4, 3, 8, 0.3, seed)) for seed in (1, 2))
    found = run(store(train, val), SegmentationSettings(patches=400, bank=100, train_images=30, val_images=20))
    assert (found["num_train"], found["num_val"]) == (30, 20)
    rows = found["linear"]["iou"]["outcome"].rows
    assert len(rows) == 20
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert run(store(train, val), SegmentationSettings(patches=400, val_images=20, full=True))["num_val"] == 60


def test_images_without_a_mask_are_left_out_and_told() -> None:
    (tokens, masks), val = blocks(40, 4, 4, 3, 8, 0.3, 1), features(*blocks(20, 4, 4, 3, 8, 0.3, 2))
    found = run(store(features(tokens, Given(masks, torch.arange(5, 40, 2))), val), FEW)
    assert (found["num_train"], found["without_mask"]) == (18, 22)
    assert any("22 images have no mask" in note for note in SPEC.notes(found, FEW))


def test_sparse_levels_and_classes_that_only_val_has() -> None:
    (tokens, masks), (val_tokens, val_masks) = (blocks(30, 4, 4, 3, 8, 0.3, seed) for seed in (1, 2))
    names = torch.tensor([7, 60_000, 900, 5])
    val_masks = names[val_masks]
    val_masks[0] = 5
    found = run(store(features(tokens, names[masks]), features(val_tokens, val_masks)), FEW)
    assert found["classes"] == [5, 7, 900, 60_000]
    assert found["unknown"] == [5]
    assert found["linear"]["of_class"]["5"] == 0
    assert any("classes that train's have not: 5" in note for note in SPEC.notes(found, FEW))


def test_no_group_is_learnt_from_and_chosen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    train, val = (features(*blocks(40, 4, 4, 3, 8, 0.3, s), groups=torch.arange(40) // 4) for s in (1, 2))
    seen: list[set[int]] = []

    def split(labels: torch.Tensor, share: float, seed: int, groups: torch.Tensor | None):
        from eval.stratified import stratified_split

        kept, rest = stratified_split(labels, share, seed, groups)
        seen.append(set(groups[kept].tolist()) & set(groups[rest].tolist()))
        return kept, rest

    monkeypatch.setattr("eval.probes.segmentation.stratified_split", split)
    run(store(train, val), FEW)
    assert seen == [set()]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (lambda t, m: features(t), "train has no masks"),
        (lambda t, m: features(t, torch.full_like(m, 3)), r"hold one class only \(3\)"),
        (lambda t, m: features(t, torch.full_like(m, IGNORED)), "hold one class only"),
        (lambda t, m: features(t, torch.arange(m.numel()).view_as(m)), "more than 1000 classes.*--depths"),
        (lambda t, m: features(t, m[:, :15, :15]), "do not divide into 4x4 patches"),
        (lambda t, m: features(InMemory(t.values[:1], t.grid), m[:1]), "one image with a mask"),
        (lambda t, m: features(InMemory(t.values[:0], t.grid), m[:0]), "no image of train has masks.*--masks"),
    ],
)
def test_what_cannot_be_probed_is_refused(train: object, words: str) -> None:
    tokens, masks = blocks(10, 4, 4, 3, 8, 0.3, 1)
    with pytest.raises(ValueError, match=words):
        run(store(train(tokens, masks), features(tokens, masks)), FEW)  # type: ignore[operator]


def test_patches_are_of_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.patches._BATCH", 3)
    tokens, masks = blocks(10, 4, 4, 3, 8, 0.0, 1)
    masks[4] = IGNORED
    levels = Levels()
    drawn = draw(tokens, Given(masks), torch.tensor([0, 2, 3, 4, 9]), levels, 30, torch.Generator().manual_seed(0))
    assert set(drawn.images.tolist()) == {0, 2, 3, 9}
    assert (drawn.targets.sum(dim=1) == 1).all()
    for feature, target in zip(drawn.features, drawn.targets, strict=True):
        number = levels.levels[int(target.argmax())]
        same = (tokens.values == feature).all(dim=2).nonzero()[0].tolist()
        assert masks[same[0], same[1] // 4 * 4, same[1] % 4 * 4] == number
