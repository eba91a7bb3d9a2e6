"""The attentive probe: what it is worth where the mean hides the answer, that it streams, and its optimiser."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from eval.base import FeatureSet, Store
from eval.pooling import FORMS, build
from eval.probes.attentive import SPEC, AttentiveSettings, _AdamW, _beyond, choose, score, train

SETTINGS = AttentiveSettings(rates=(3e-3, 1e-2), passes=8, batch_size=32, least_steps=1)


class Kept:
    """Tokens in memory, which count the rows asked of them at once."""

    def __init__(self, values):
        self.values, self.asked = values, []
        self.grid, self.dim = (3, 3), values.shape[2]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, rows):
        self.asked.append(len(rows))
        return self.values[rows]


def hidden(num, seed):
    """One of nine tokens, marked by its first value, says the class; the others say another class each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    said = torch.randint(3, (num, 9), generator=generator)
    marked = torch.randint(9, (num,), generator=generator)
    said[torch.arange(num), marked] = labels
    tokens = torch.cat([torch.zeros(num, 9, 1), F.one_hot(said, 3), torch.zeros(num, 9, 8)], dim=2)
    tokens[torch.arange(num), marked, 0] = 3
    tokens += 0.2 * torch.randn(tokens.shape, generator=generator)
    number = torch.arange(num)
    return FeatureSet({"mean": tokens.mean(dim=1)}, "mean", labels, number, number, tokens=Kept(tokens))


@pytest.fixture(scope="module")
def store():
    return Store(hidden(400, 0), hidden(100, 1), 3, "mean", seeds=(0, 1))


@pytest.fixture(scope="module")
def result(store):
    return SPEC.run(store, SETTINGS)


def test_it_finds_what_the_mean_hides(store, result):
    assert list(result) == ["cross", "efficient", "mean"]
    assert result["mean"]["top1"] < 0.75
    for form in ("cross", "efficient"):
        assert result[form]["top1"] > 0.9
        assert result[form]["top1"] > result["mean"]["top1"] + 3 * result["mean"]["standard_error"]
        assert set(result[form]["top1_of_seed"]) == {"0", "1"}
    assert result["efficient"]["parameters"] < result["cross"]["parameters"] / 3
    assert max(store.train.tokens.asked) <= 40  # streamed: a batch, or what is held out
    shown = SPEC.columns(result, "mean")
    assert [(c.name, c.more) for c in shown] == [
        ("attentive", False), ("attentive_efficient", True), ("attentive_mean", True),
    ]  # fmt: skip
    assert not [line for line in SPEC.notes(result, SETTINGS) if "no better" in line]


def test_no_gain_is_explained(result):
    plain = {form: {**found, "top1": 0.5, "on_train": 0.5} for form, found in result.items()}
    assert any("say of the image what their mean says" in line for line in SPEC.notes(plain, SETTINGS))
    behind = {form: {**found, "on_train": 0.4 + 0.2 * (form == "mean")} for form, found in plain.items()}
    assert any("not even learned train" in line for line in SPEC.notes(behind, SETTINGS))
    plain["cross"]["held_out"], plain["cross"]["on_train"] = 1.0, 0.99
    assert any("cross is no better" in line and "by heart" in line for line in SPEC.notes(plain, SETTINGS))


def test_raw_pixels_have_no_tokens(store):
    pixels = dataclasses.replace(store.train, tokens=None, pooled_as="pixels")
    assert SPEC.run(dataclasses.replace(store, train=pixels, val=pixels), SETTINGS) == {}
    assert SPEC.columns({}, "pixels") == []
    bare = dataclasses.replace(store.train, tokens=None)
    with pytest.raises(ValueError, match="--tokens"):
        SPEC.run(dataclasses.replace(store, train=bare), SETTINGS)


def test_the_rate_is_chosen_on_train_and_groups_stay_whole(store, monkeypatch):
    groups = torch.arange(400) // 20
    parts = []

    def spy(form, tokens, labels, rows, *rest):
        parts.append(rows)
        return train(form, tokens, labels, rows, *rest)

    monkeypatch.setattr("eval.probes.attentive.train", spy)
    one = dataclasses.replace(SETTINGS, passes=1)
    choose("mean", store.train.tokens, store.train.labels, groups, 3, one, 0, "cpu")
    kept = groups[parts[0]].unique()
    assert 0 < len(kept) < 20
    assert (groups[parts[0]].bincount()[kept] == 20).all()


def test_rates_side_by_side_train_as_alone(store):
    one = dataclasses.replace(SETTINGS, passes=1)
    tokens, labels, rows = store.train.tokens, store.train.labels, torch.arange(400)
    both, _ = train("cross", tokens, labels, rows, 3, (1e-3, 1e-2), one, (0, 0), "cpu")
    alone, _ = train("cross", tokens, labels, rows, 3, (1e-2,), one, (0,), "cpu")
    for many, single in zip(both.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(many[1], single[0], rtol=1e-3, atol=1e-4)


def test_seeds_side_by_side_have_first_weights_of_their_own():
    heads = build("efficient", 12, 3, (5, 6, 5))
    alone = FORMS["efficient"](12, 3, seed=6)
    for many, single in zip(heads.parameters(), alone.parameters(), strict=True):
        assert torch.equal(many[1], single[0])
        assert torch.equal(many[0], many[2])
    assert not torch.equal(heads.queries[0], heads.queries[1])


def test_more_rates_are_tried_beyond_the_edge(store):
    small = dataclasses.replace(SETTINGS, rates=(3e-4, 1e-3), choosing=1)
    found = choose("efficient", store.train.tokens, store.train.labels, None, 3, small, 0, "cpu")
    assert found.rate > 1e-3
    tried = {1e-3: (0.5, -1.0), 1e-2: (0.6, -1.0)}
    assert _beyond(1e-2, tried, (1e-5, 0.1)) == [3e-2, 1e-1]
    assert _beyond(1e-2, tried, (1e-5, 0.05)) == [3e-2]
    assert _beyond(1e-3, tried, (1e-5, 0.1)) == [3e-4, 1e-4]
    assert _beyond(1e-2, {**tried, 3e-2: (0.5, -1.0)}, (1e-5, 0.1)) == []
    assert _beyond(1e-2, {**tried, 1e-2: (1.0, -0.1)}, (1e-5, 0.1)) == []


def test_the_mean_is_read_once(store):
    before = len(store.train.tokens.asked)
    SPEC.run(store, dataclasses.replace(SETTINGS, forms=("efficient",), rates=(1e-2,), passes=1))
    read = sum(store.train.tokens.asked[before:])
    assert read < 400 * 3.2  # once for the mean, and a pass each to choose and to train


def test_adamw_is_torchs():
    heads = FORMS["cross"](8, 3, num=2, seed=1)
    twins = [FORMS["cross"](8, 3, num=1, seed=1) for _ in range(2)]
    ours = _AdamW(heads, torch.tensor([1e-3, 1e-2]), 0.05)
    theirs = [
        torch.optim.AdamW(
            [{"params": [p], "weight_decay": 0.05 if p.ndim > 2 else 0.0} for p in twin.parameters()], lr=rate
        )
        for twin, rate in zip(twins, (1e-3, 1e-2), strict=True)
    ]
    tokens = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    for batch in tokens:
        ours.step(torch.autograd.grad(heads(batch).square().sum(), list(heads.parameters())), 1.0)
        for twin, descent in zip(twins, theirs, strict=True):
            descent.zero_grad()
            twin(batch).square().sum().backward()
            descent.step()
    for place, twin in enumerate(twins):
        for mine, single in zip(heads.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine[place], single[0], rtol=1e-4, atol=1e-5)


def test_diverged_ones_are_never_right(store):
    heads = FORMS["mean"](12, 3, num=2)
    with torch.no_grad():
        heads.linear_weight[0] = float("nan")
    right, loss = score(heads.eval(), store.val.tokens, store.val.labels, torch.arange(100), "cpu")
    assert not right[0].any()
    assert loss[0] == float("inf")
    assert loss[1].isfinite()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="forms has 'mean'"):
        AttentiveSettings(forms=("mean",))
    assert all(a < b for a, b in pairwise(AttentiveSettings().rates))
