"""The val split that pack holds back: images of every class, or whole groups, and whether they say anything."""

from __future__ import annotations

import math

import numpy as np

from data_pipelines.rng import Purpose, random_bits, stream_key
from data_pipelines.shards.index import NO_LABEL
from data_pipelines.wording import counted

_FEW = 30  # labelled images in val, below which a probe says little
_ROUNDING = 1e-9  # images


def check_held(before: np.ndarray, held: np.ndarray, share: float, advice: str) -> list[str]:
    """What to say of the labels (n,) held back out of `before`; ValueError where a probe could tell nothing by them."""
    classes = np.unique(before[before != NO_LABEL])
    of_val = np.unique(held[held != NO_LABEL])
    if len(classes) < 2:
        return []
    if len(of_val) < 2:
        raise ValueError(
            f"val_share is {share:g}, which holds back {len(held):,} images of {len(of_val)} of {len(classes):,} "
            f"classes: a probe of one class is right whatever it says; {advice}"
        )
    notes = []
    if len(of_val) < len(classes):
        notes.append(f"val has images of {len(of_val):,} of {len(classes):,} classes; {advice}")
    num_labelled = int((held != NO_LABEL).sum())
    if num_labelled < _FEW:
        notes.append(
            f"val has {num_labelled} labelled images, so that one of them is {1 / num_labelled:.1%} of a probe's "
            "accuracy; a larger --val-share measures more finely"
        )
    return notes


def advice_on_images(labels: np.ndarray) -> str:
    """Which share has an image of every class, of images with these labels (n,)."""
    counts = np.unique(labels[labels != NO_LABEL], return_counts=True)[1]
    enough = 1 / int(counts[counts > 1].min()) if (counts > 1).any() else 1.0
    return f"at --val-share {enough:.2g} there is one of each class that has two images"


def advice_on_groups(labels: np.ndarray, groups: np.ndarray) -> str:
    """The same of whole groups: (n,) each."""
    numbers, own = np.unique(groups, return_inverse=True)
    classes, of_class = np.unique(labels, return_inverse=True)
    brought = np.zeros((len(numbers), len(classes)), dtype=np.int64)
    np.add.at(brought, (own, of_class), 1)
    kinds, of_kind = np.unique(brought, axis=0, return_inverse=True)  # few, however many groups are of one image
    least = np.array([_least_share(kind, brought.sum(axis=0)) for kind in kinds])[of_kind.reshape(-1)]
    several = [row for row, known in zip(brought.T, classes != NO_LABEL, strict=True) if known and (row > 0).sum() > 1]
    if not several:
        return "each class has images of one group only, and groups are not divided: a class needs two groups"
    enough = max(float(least[row > 0].min()) for row in several)
    return f"from --val-share {_rounded_up(enough):g} on there can be one group of each class that has two groups"


def _least_share(brought: np.ndarray, of_all: np.ndarray) -> float:
    """From which share on `hold_back_groups` takes a group that brings (classes,) of the images (classes,)."""
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        if np.abs(share * of_all - brought).sum() <= share * of_all.sum():
            high = share
        else:
            low = share
    return high


def _rounded_up(share: float) -> float:
    """To two digits behind the point, so that what is advised is enough."""
    return math.ceil(round(share * 100, 6)) / 100


def hold_back(members: np.ndarray, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the entries into those that stay and a share of every class; at least one of a class stays."""
    own = labels[members]
    by_class = own.argsort(kind="stable")
    held = np.zeros(len(members), dtype=bool)
    first = 0
    for label, count in zip(*np.unique(own, return_counts=True), strict=True):
        places = by_class[first : first + count]
        key = stream_key(seed, Purpose.HOLD_BACK, int(label) + 1)
        num_held = min(round(share * int(count)), int(count) - 1)
        held[places[random_bits(key, int(count)).argsort(kind="stable")[:num_held]]] = True
        first += count
    if not held.any():
        largest = int(np.unique(own, return_counts=True)[1].max())
        enough = f" {1 / largest:.2g} or" if largest > 1 else ""
        raise ValueError(
            f"val_share is {share:g}, which is not one image of any class: the largest has {largest:,}, of which one "
            f"stays; give{enough} 0 for no val, or pack without labels (--no-labels)"
        )
    return members[~held], members[held]


def hold_back_groups(
    members: np.ndarray, labels: np.ndarray, groups: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `hold_back`, but of whole groups: in an order by the seed, each that brings classes nearer to their share.

    One that brings them no nearer and no farther is taken for a class that has none held back yet.
    """
    classes, own = np.unique(labels[members], return_inverse=True)
    missing = share * np.bincount(own, minlength=len(classes))  # of val, by class
    of_members = groups[members]
    by_group = of_members.argsort(kind="stable")
    numbers, firsts, counts = np.unique(of_members[by_group], return_index=True, return_counts=True)
    held = np.zeros(len(members), dtype=bool)
    num_held, num_of_class = 0, np.zeros(len(classes), dtype=np.int64)
    order = random_bits(stream_key(seed, Purpose.HOLD_BACK, 0, 1), len(numbers)).argsort(kind="stable")
    for place in order.tolist():
        places = by_group[firsts[place] : firsts[place] + counts[place]]
        brought = np.bincount(own[places], minlength=len(classes))
        nearer = np.abs(missing).sum() - np.abs(missing - brought).sum()
        is_new = bool((brought[num_of_class == 0] > 0).any())
        if num_held + 1 < len(numbers) and (nearer > _ROUNDING or (is_new and nearer > -_ROUNDING)):
            missing = missing - brought
            num_of_class += brought
            held[places] = True
            num_held += 1
    if not num_held:
        told = f"val_share is {share:g}, and the images are of {counted(len(numbers), 'group')}: "
        if len(numbers) < 2:
            raise ValueError(
                f"{told}groups are not divided, so there must be two at least (frames of one file are a group, where "
                "none is named)"
            )
        of_all = np.bincount(own, minlength=len(classes))
        least = min(
            _least_share(np.bincount(own[by_group[first : first + count]], minlength=len(classes)), of_all)
            for first, count in zip(firsts, counts, strict=True)
        )
        raise ValueError(
            f"{told}none fits, and groups are not divided. Give --val-share {_rounded_up(least):g} or more"
        )
    return members[~held], members[held]
