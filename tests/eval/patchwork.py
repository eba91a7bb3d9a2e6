"""Tokens in memory and small stores of them, for the tests of dense probes."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.base import FeatureSet, Store


class InMemory:
    """Tokens (n, t, d) of a grid."""

    def __init__(self, values: Tensor, grid: tuple[int, int]) -> None:
        self.values, self.grid, self.dim = values, grid, values.shape[2]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.values[rows]


class Given:
    """Masks or depths (n, h, w), of all images or of some `rows`."""

    def __init__(self, values: Tensor, rows: Tensor | None = None) -> None:
        self.values, self.rows = values, torch.arange(len(values)) if rows is None else rows

    def __getitem__(self, rows: Tensor) -> Tensor:
        assert torch.isin(rows, self.rows).all()
        return self.values[rows]


def features(
    tokens: InMemory, masks: Tensor | Given | None = None, depths: Tensor | None = None, **more: Tensor
) -> FeatureSet:
    ids = torch.arange(len(tokens))
    given = [Given(values) if isinstance(values, Tensor) else values for values in (masks, depths)]
    return FeatureSet({}, "", torch.empty(0), ids, ids, tokens=tokens, masks=given[0], depths=given[1], **more)


def store(train: FeatureSet, val: FeatureSet, seed: int = 0) -> Store:
    return Store(train, val, 0, "", seeds=(seed,))


def blocks(num: int, grid: int, patch: int, classes: int, dim: int, noise: float, seed: int) -> tuple[InMemory, Tensor]:
    """Images whose patches are each of one class, and tokens that tell it through noise: masks (n, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(classes, (num, grid, grid), generator=generator)
    means = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    values = means[cells.flatten(1)] + noise * torch.randn(num, grid * grid, dim, generator=generator)
    masks = cells.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return InMemory(values, (grid, grid)), masks
