"""Numbers that need no label: how many dimensions features fill (RankMe, effective rank), how their spectrum falls
(alpha-ReQ), how evenly they lie on the sphere (uniformity); of patch tokens, where a probe beside needs them.

They compare checkpoints of one run. Between models they say little: a rank grows with the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from eval import label_free
from eval.base import Column, FeatureSet, NativeTokens, ProbeSpec, Scores, Store

_BATCH = 64  # images whose tokens are read at once


@dataclass(frozen=True)
class LabelFreeSettings:
    """Of how many images the numbers are. RankMe's authors take 25,600."""

    images: int = 25_600
    token_images: int = 256  # whose patch tokens are looked at

    def __post_init__(self) -> None:
        if self.images < 2 or self.token_images < 2:
            raise ValueError(f"images is {self.images}, token_images {self.token_images}; both must be two at least")


def run(store: Store, settings: LabelFreeSettings) -> Scores:
    """Of train's headline feature; nothing for raw pixels, whose number of dimensions has nothing to do with it."""
    train, name = store.train, store.headline
    if train.pooled_as == "pixels":
        return {}
    num = len(train.inputs[name])
    rows = _drawn(num, settings.images, store.seeds[0])
    features = train.inputs[name][rows].to(store.device)
    groups = None if train.groups is None else train.groups[rows]
    store.progress(f"label-free: the spectrum of {len(rows):,} images")
    found: Scores = {
        "input": name,
        "images": len(rows),
        "dim": features.shape[1],
        "rankme": label_free.rankme(features, groups),
        "alpha_req": label_free.alpha_req(features, groups),
        "effective_rank": label_free.centred_rank(features, groups),
        "uniformity": label_free.uniformity(features, groups, seed=store.seeds[0]),
    }
    if train.tokens is not None:
        store.progress("label-free: the spectrum of patch tokens")
        found |= _of_tokens(train, _drawn(num, settings.token_images, store.seeds[0]), store.device)
    return found


def _drawn(num: int, most: int, seed: int) -> Tensor:
    if num <= most:
        return torch.arange(num)
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _of_tokens(train: FeatureSet, rows: Tensor, device: str) -> Scores:
    """The effective rank of all patch tokens together, and that of an image's own, the mean of the images."""
    assert train.tokens is not None
    images = rows if train.groups is None else train.groups[rows]  # tokens of an image are no independent witnesses
    if isinstance(train.tokens, NativeTokens):
        apart = [image.to(device) for image in train.tokens.images(rows)]
        within = torch.cat([label_free.ranks_within(image[None]) for image in apart])
        flat, lengths = torch.cat(apart), torch.tensor([len(image) for image in apart])
    else:
        tokens = torch.cat([train.tokens[part] for part in rows.split(_BATCH)]).to(device)
        within = torch.cat([label_free.ranks_within(part) for part in tokens.split(_BATCH)])
        flat, lengths = rearrange(tokens, "n t d -> (n t) d"), torch.full((len(tokens),), tokens.shape[1])
    return {
        "patch_rank": label_free.centred_rank(flat, images.repeat_interleave(lengths)),
        "patch_rank_within": label_free.of_mean(within, images),
    }


_TITLES = {
    "rankme": "RankMe",
    "alpha_req": "alpha-ReQ",
    "effective_rank": "effective rank",
    "uniformity": "uniformity",
    "patch_rank": "effective rank of patches",
    "patch_rank_within": "effective rank within an image",
}


def columns(result: Scores, headline: str) -> list[Column]:
    """RankMe in the table, the others below it."""
    return [
        Column(
            name, title, ((name,),), headline=name == "rankme", key="value", unit="number", chance=None,
            lower_is_better=name == "uniformity", more=name != "rankme",
        )
        for name, title in _TITLES.items() if result.get(name)
    ]  # fmt: skip


def notes(result: Scores, settings: LabelFreeSettings) -> list[str]:
    """What the numbers are of."""
    if not result:
        return []
    return [
        f"label-free: of {result['images']:,} train images, {result['input']} of {result['dim']} dimensions; RankMe of "
        "features as they are, effective rank less their mean; alpha-ReQ of ranks "
        f"{label_free.RANKS[0]} to {label_free.RANKS[1]}, near 1 is best; uniformity of up to "
        f"{label_free.MOST_PAIRED:,}, lower is more even; compare checkpoints by them, not models"
    ]


SPEC = ProbeSpec("label_free", run, columns, LabelFreeSettings, labels="none", notes=notes)
