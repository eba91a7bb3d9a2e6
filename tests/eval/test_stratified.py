"""The part of train that chooses: of every class, and never half a group."""

import pytest
import torch

from eval.stratified import classes_not_held_out, stratified_split


def test_split_is_stratified_and_spares_single_samples():
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 2 + [3])
    kept, held_out = stratified_split(labels, 0.1, seed=0)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(133))
    assert labels[held_out].bincount(minlength=4).tolist() == [10, 3, 1, 0]
    assert not torch.equal(held_out, stratified_split(labels, 0.1, seed=1)[1])
    with pytest.raises(ValueError, match="every class of the 3"):
        stratified_split(torch.arange(3), 0.1, seed=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_group_is_in_both_parts_and_the_share_stays(seed):
    groups = torch.arange(400) // 4  # of four images each, of one class or of two
    labels = (torch.arange(400) // 4 + (torch.arange(400) % 4 == 3)) % 5
    kept, held_out = stratified_split(labels, 0.1, seed, groups)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(400))
    assert not set(groups[kept].tolist()) & set(groups[held_out].tolist())
    of_class = labels[held_out].bincount(minlength=5)
    assert (of_class >= 5).all(), of_class  # of 80 each, 8 are wanted
    assert (of_class <= 8).all(), of_class
    again = stratified_split(labels, 0.1, seed, groups)
    assert torch.equal(held_out, again[1])


def test_groups_larger_than_the_share_give_their_smallest_and_a_class_of_one_group_stays():
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 5)
    groups = torch.tensor([7] * 6 + [-3] * 4 + [50] * 3 + [60] * 7 + [8] * 5)
    kept, held_out = stratified_split(labels, 0.1, 0, groups)
    assert set(groups[held_out].tolist()) == {-3, 50}
    assert set(labels[kept].tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="every class of the 25 train samples has one group"):
        stratified_split(labels, 0.1, 0, labels)
    with pytest.raises(ValueError, match="has one group"):  # all of one patient
        stratified_split(labels, 0.1, 0, torch.zeros(25))


def test_each_sample_a_group_of_its_own_is_no_group():
    labels = torch.tensor([0] * 100 + [1] * 30)
    _, held_out = stratified_split(labels, 0.1, 0, torch.arange(130))
    assert labels[held_out].bincount().tolist() == [10, 3]


def test_one_class_alone_chooses_nothing():
    labels = torch.tensor([0] * 60 + [1] * 15 + [2] * 15)
    groups = torch.cat([torch.arange(60) // 30, torch.full((15,), 2), torch.full((15,), 3)])
    with pytest.raises(ValueError, match="of the 3 classes of the 90 train samples one alone can be held out"):
        stratified_split(labels, 0.1, 0, groups)
    with pytest.raises(ValueError, match="no other can spare a sample"):
        stratified_split(torch.tensor([0] * 5 + [1]), 0.1, 0)
    assert len(stratified_split(torch.zeros(9, dtype=torch.int64), 0.1, 0)[1]) == 1  # there is one stratum only


def test_as_many_classes_as_the_groups_allow_are_in_both_parts():
    of_group = {1: (0, 2, 4), 2: (0, 3), 3: (1, 2), 4: (1, 3, 4)}  # held out, 1 takes three and bars two
    labels = torch.tensor([label for classes in of_group.values() for label in classes])
    groups = torch.tensor([group for group, classes in of_group.items() for _ in classes])
    for seed in range(20):
        kept, held_out = stratified_split(labels, 0.1, seed, groups)
        assert len(labels[held_out].unique()) == 4, seed
        assert len(labels[kept].unique()) == 5
        (absent,) = classes_not_held_out(labels, 0.1, seed, groups).tolist()
        assert absent not in labels[held_out].tolist()
