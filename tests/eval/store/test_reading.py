"""What probes get of a store: the same features as in memory, mapped, whichever samples they ask for."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from data_pipelines.datasets.dataset import open_dataset
from eval.features import extract
from eval.probes.knn import knn_accuracy
from eval.probes.linear import LinearRecipe, linear_probe
from eval.store import matrix
from eval.store.description import is_store
from eval.store.mapped import GrowingArray, GrowingTexts, MappedTexts, mapped
from eval.store.reading import open_store
from eval.target import open_target

QUICK = LinearRecipe(learning_rates=(1e-2, 1e-1), epochs=10)


def in_memory(target, dataset):
    subject = open_target(str(target))
    return extract(subject.encoder, dataset, size=16, mean=subject.mean, std=subject.std, progress=False)


def test_the_same_features_as_in_memory(make, data, target):
    stored = open_store(make())["train"]
    dataset = open_dataset(data)
    known = in_memory(target, dataset)
    found = stored.feature_set(known.ids.numpy())
    assert found.pooled_as == known.pooled_as
    assert list(found.inputs) == list(known.inputs)
    for name, values in known.inputs.items():
        torch.testing.assert_close(found.inputs[name], values, rtol=1e-5, atol=1e-6)  # batches of another size
    for name in ("labels", "ids", "digests"):
        assert torch.equal(getattr(found, name), getattr(known, name)), name
    assert list(found.keys) == [dataset.key(sample)[0] for sample in known.ids.tolist()]
    assert stored.metadata(7) == {"patient": "p0", "age": 7}
    assert len(stored.feature_set().ids) == 150


def test_probes_of_what_is_kept_as_float16_say_nearly_the_same(make, data, target):
    """Kept as float16, a value changes by 2^-11 of itself at most: neighbours by 1 in 100, the linear choice not."""
    dataset = open_dataset(data)
    known = in_memory(target, dataset)
    train, val = torch.arange(0, 90), torch.arange(90, len(known.ids))

    def accuracies(features):
        inputs = features.inputs["class of last 4 + mean"]
        knn = knn_accuracy(
            inputs[train], known.labels[train], inputs[val], known.labels[val], num_classes=3, ks=(10, 20)
        )
        linear = linear_probe(
            {"all": inputs[train]}, known.labels[train], {"all": inputs[val]}, known.labels[val],
            num_classes=3, recipe=QUICK, seeds=(0,),
        )  # fmt: skip
        return [knn[10]["top1"], knn[20]["top1"], linear.top1[0]], linear.chosen

    whole, chosen = accuracies(known)
    assert max(whole) > 0.5
    exact, _ = accuracies(open_store(make())["train"].feature_set(known.ids.numpy()))
    assert exact == pytest.approx(whole, abs=0.02)
    halves = open_store(make("bf16", precision="bf16"))["train"].feature_set(known.ids.numpy())
    assert halves.inputs["class"].dtype == torch.float16
    half, chosen_of_half = accuracies(
        type(known)(
            {name: v.half() for name, v in known.inputs.items()}, "class", known.labels, known.ids, known.digests
        )
    )
    assert half == pytest.approx(whole, abs=0.02)
    assert (chosen_of_half.input, chosen_of_half.learning_rate) == (chosen.input, chosen.learning_rate)
    for name, values in known.inputs.items():  # bf16 arithmetic: 8 bits
        torch.testing.assert_close(halves.inputs[name].float(), values, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("most", [1 << 30, 0])
def test_a_choice_of_samples(make, monkeypatch, most):
    monkeypatch.setattr(matrix, "_MOST_COPIED", most)
    stored = open_store(make(tokens=True))["train"]
    everything = stored.feature_set()
    for samples in (np.array([3, 4, 5]), np.array([0, 7, 149]), np.array([5, 1000])):
        some = stored.feature_set(samples)
        rows = torch.from_numpy(samples[samples < 150])
        assert torch.equal(some.ids, rows)
        for name in ("class", "class of last 4 + mean"):
            assert torch.equal(some.inputs[name], everything.inputs[name][rows])
        assert list(some.keys) == [everything.keys[row] for row in rows.tolist()]
        every = torch.arange(len(rows))
        assert torch.equal(some.tokens[every], everything.tokens[rows])


def test_decoded_once_and_again_where_it_was_deleted_or_damaged(make):
    folder = make()
    assert not (folder / "train" / "npy").exists()
    told: list[str] = []
    first = open_store(folder, told.append)["train"].feature_set().inputs["class"].clone()
    assert len(told) == 2
    open_store(folder, told.append)
    assert len(told) == 2
    features = folder / "train" / "npy" / "features.npy"
    features.write_bytes(features.read_bytes()[:-100])
    shutil.rmtree(folder / "val" / "npy")
    again = open_store(folder, told.append)
    assert len(told) == 4
    assert torch.equal(again["train"].feature_set().inputs["class"], first)
    assert list(again) == ["train", "val"]
    assert list(open_store(folder / "val")) == ["val"]


def test_npy_is_decoded_at_once_and_read_by_numpy(make):
    folder = make(npy=True) / "train" / "npy"
    features = np.load(folder / "features.npy")
    assert (features.shape, features.dtype) == ((150, 60), np.float32)
    assert np.load(folder / "labels.npy").shape == (150,)
    told: list[str] = []
    open_store(folder.parent, told.append)
    assert not told


def test_what_is_no_store(tmp_path, make):
    with pytest.raises(FileNotFoundError, match="holds no store of features; `selfsight embed"):
        open_store(tmp_path)
    folder = make()
    assert is_store(folder)
    assert is_store(folder / "train")
    assert not is_store(tmp_path)
    (folder / "train" / "store.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="no store of features that this version reads"):
        open_store(folder)


def test_growing_arrays_are_npy_files_at_any_time(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", (2, 3), np.float16)
    array.append(np.ones((4, 2, 3)))
    array.keep()
    array.append(np.zeros((1000, 2, 3)))
    assert np.load(tmp_path / "a.npy").shape == (4, 2, 3)
    array.close()
    array = GrowingArray(tmp_path / "a.npy", (2, 3), np.float16, rows=2)
    array.append(np.full((1, 2, 3), 7))
    array.keep()
    array.close()
    assert np.load(tmp_path / "a.npy")[:, 0, 0].tolist() == [1, 1, 7]
    view = mapped(tmp_path / "a.npy")
    view[0] = 9  # whoever writes to it writes to his own copy
    assert mapped(tmp_path / "a.npy")[0, 0, 0] == 1
    with pytest.raises(ValueError, match="shorter than its 5 rows"):
        GrowingArray(tmp_path / "a.npy", (2, 3), np.float16, rows=5)


def test_texts(tmp_path):
    texts = GrowingTexts(tmp_path, "keys")
    texts.append(["a", "", "äöü"])
    texts.append([])
    texts.append(["last"])
    texts.keep()
    texts.close()
    found = MappedTexts(tmp_path, "keys")
    assert list(found) == ["a", "", "äöü", "last"]
    assert list(found[1:3]) == ["", "äöü"]
    assert list(found.of(np.array([3, 0]))) == ["last", "a"]
    assert found[-1] == "last"
