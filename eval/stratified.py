"""The part of train that a probe chooses on, so that val is looked at once."""

from __future__ import annotations

import torch
from torch import Tensor

_TRIES = 16  # random orders of groups, while there are classes that are not held out and might be


def stratified_split(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row indices (kept, held out) of `labels` (n,), ascending; the same `share` of every class is held out.

    A class with a single sample is kept. With `groups` (n,) every group is kept or held out as a whole, the shares are
    as near to `share` as that allows, and of several random orders of the groups the one counts that has most classes
    in both parts. Raises ValueError where nothing can be held out, and where of several classes one alone can be: on it
    any head looks right.
    """
    labels = labels.cpu()
    if groups is None:
        generator = torch.Generator().manual_seed(seed)
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        for label in labels.unique().tolist():
            rows = (labels == label).nonzero()[:, 0]
            count = min(_wanted(share, len(rows)), len(rows) - 1)
            held_out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    else:
        held_out = _most_classes(labels, groups.cpu(), share, seed)
    unit = "sample" if groups is None else "group"
    if not held_out.any():
        raise ValueError(
            f"every class of the {len(labels)} train samples has one {unit}, so none can be held out to choose a head; "
            "pack more labelled samples"
        )
    num_classes = len(labels.unique())
    if num_classes > 1 and len(labels[held_out].unique()) < 2:
        raise ValueError(
            f"of the {num_classes} classes of the {len(labels)} train samples one alone can be held out to choose a "
            f"head, as no other can spare a {unit}, and on one class any head looks right; pack more labelled samples"
            + ("" if groups is None else ", of more groups, or leave the groups out")
        )
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def classes_not_held_out(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> Tensor:
    """The classes of `labels` (n,) that the part which `stratified_split` holds out lacks, ascending."""
    _, held_out = stratified_split(labels, share, seed, groups)
    classes = labels.cpu().unique()
    return classes[~torch.isin(classes, labels.cpu()[held_out])]


def _most_classes(labels: Tensor, groups: Tensor, share: float, seed: int) -> Tensor:
    """(n,) which rows are held out, of several tries the first with most classes; the first try is of `seed` itself."""
    classes, of_class = labels.unique(return_inverse=True)
    met = (groups.unique(return_inverse=True)[1] * len(classes) + of_class).unique() % len(classes)
    possible = int((torch.bincount(met) > 1).sum())  # classes of several groups
    best, most = torch.zeros(len(labels), dtype=torch.bool), -1
    for number in range(_TRIES):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * number)
        found = _whole_groups(labels, groups, share, generator)
        if (count := len(of_class[found].unique())) > most:
            best, most = found, count
        if most >= possible:
            break
    return best


def _wanted(share: float, num: int) -> int:
    return max(1, round(share * num))


def _whole_groups(labels: Tensor, groups: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """(n,) which rows are held out: for each class, the rarest first, groups in random order while they fit."""
    classes, of_class = labels.unique(return_inverse=True)
    names, of_group = groups.unique(return_inverse=True)
    pairs, num = (of_group * len(classes) + of_class).unique(return_counts=True)  # a row a group and class that meet
    of_pair = torch.stack([pairs // len(classes), pairs % len(classes), num], dim=1)
    members: list[list[tuple[int, int]]] = [[] for _ in names]  # (class, samples) of each group
    meet: list[list[int]] = [[] for _ in classes]  # groups of each class
    for group, label, count in of_pair.tolist():
        members[group].append((label, count))
        meet[label].append(group)
    kept = torch.bincount(of_class, minlength=len(classes)).tolist()
    wanted = [_wanted(share, total) for total in kept]
    held = [0] * len(classes)
    out = torch.zeros(len(names), dtype=torch.bool)

    def hold_out(group: int) -> None:
        out[group] = True
        for label, count in members[group]:
            held[label] += count
            kept[label] -= count

    def may_go(group: int) -> bool:
        """Whether every class of the group goes on having samples to learn from."""
        return not out[group] and all(kept[label] > count for label, count in members[group])

    def excess(group: int) -> int:
        """Samples that would be held out beyond what is wanted of their classes."""
        return sum(max(0, held[label] + count - wanted[label]) for label, count in members[group])

    for label in sorted(range(len(classes)), key=lambda label: (len(meet[label]), label)):
        order = [meet[label][place] for place in torch.randperm(len(meet[label]), generator=generator).tolist()]
        for group in order:
            if not excess(group) and may_go(group):
                hold_out(group)
        if not held[label] and (free := [group for group in order if may_go(group)]):
            hold_out(min(free, key=excess))  # each is more than the share
    return out[of_group]
