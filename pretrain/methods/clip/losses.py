"""The losses of image-text contrast over the global batch, exact however that is divided.

InfoNCE compares every image with every caption of the global batch, so a micro-batch on a rank can't know its share of
the loss by itself. What it needs of the others are their embeddings and, of each of their rows, the logarithm of the
sum over its logits: both are gathered without a graph (`gathered`, `log_sums`). From them the gradient of the loss of
the whole batch by the micro-batch's own embeddings is known in closed form, and it is what flows back. This is gradient
caching (Gao et al. 2021) whose second pass needs no graph over the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

#: Logits that are held at once: 128 MiB of fp32.
_AT_ONCE = 2**25


class Whole(NamedTuple):
    """Of the global batch, without gradients: embeddings (n, d) of images and texts, of length 1, in one order.

    of_images, of_texts: (n,) for InfoNCE, of each row the logarithm of the sum of the exponentials of its logits.
    """

    images: Tensor
    texts: Tensor
    of_images: Tensor | None = None
    of_texts: Tensor | None = None


class Contrast(NamedTuple):
    """What a micro-batch adds: the mean over ranks and micro-batches of `loss`, and of its gradient, is that of the
    global batch. `right`: share of its images to which their own text is nearest."""

    loss: Tensor
    right: Tensor


class _Side(NamedTuple):
    """Of some rows against all columns: the sum of their losses, the gradients of it by rows (b, d), the scale and the
    bias, and how many rows are nearest to their own column."""

    value: Tensor
    by_rows: Tensor
    by_scale: Tensor
    by_bias: Tensor
    right: Tensor


def gathered(rows: Tensor) -> Tensor:
    """(ranks * b, ...) the rows of all ranks, equally many on each, in their order; without a gradient. Collective."""
    rows = rows.detach().contiguous()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    everywhere = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everywhere, rows)
    return everywhere


@torch.no_grad()
def log_sums(own: Tensor, others: Tensor, scale: Tensor) -> Tensor:
    """(b,) of own rows (b, d) the logarithm of the sum of exponentials of their logits with the others (n, d)."""
    with torch.autocast(own.device.type, enabled=False):
        parts = own.float().split(max(1, _AT_ONCE // len(others)))
        return torch.cat([(scale * part @ others.T).logsumexp(dim=1) for part in parts])


def infonce(images: Tensor, texts: Tensor, first: int, whole: Whole, scale: Tensor) -> Contrast:
    """The symmetric cross-entropy of scaled cosines (Radford et al. 2021, figure 3).

    Args:
        images, texts: (b, d) of this micro-batch, of length 1: rows first .. first + b - 1 of the whole.
        first: See there.
        whole: Of the global batch, with its `log_sums`.
        scale: () what cosines are multiplied by.
    """
    assert whole.of_images is not None
    assert whole.of_texts is not None
    of_images = _softmax_side(images, whole.texts, whole.of_images, whole.of_texts, first, scale)
    of_texts = _softmax_side(texts, whole.images, whole.of_texts, whole.of_images, first, scale)
    count = 2 * len(images)
    loss = _with_gradient((of_images.value + of_texts.value) / count, (
        (images, of_images.by_rows / count),
        (texts, of_texts.by_rows / count),
        (scale, (of_images.by_scale + of_texts.by_scale) / count),
    ))  # fmt: skip
    return Contrast(loss, of_images.right / len(images))


def siglip(images: Tensor, texts: Tensor, first: int, whole: Whole, scale: Tensor, bias: Tensor) -> Contrast:
    """Every pair judged by itself: the sum over the texts of an image, the mean over images (Zhai et al. 2023, section
    3.1). Arguments as of `infonce`; `bias`: () is added to the logits."""
    of_images = _sigmoid_side(images, whole.texts, first, scale, bias)
    of_texts = _sigmoid_side(texts, whole.images, first, scale, bias)
    count = len(images)
    loss = _with_gradient(of_images.value / count, (
        (images, of_images.by_rows / count),
        (texts, of_texts.by_rows / count),
        (scale, of_images.by_scale / count),
        (bias, of_images.by_bias / count),
    ))  # fmt: skip
    return Contrast(loss, of_images.right / count)


def _with_gradient(value: Tensor, parts: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """The value, whose gradient by each tensor is the one beside it."""
    for tensor, gradient in parts:
        tensor = tensor.float()
        value = value + (gradient.detach() * (tensor - tensor.detach())).sum()
    return value


@torch.no_grad()
def _softmax_side(own: Tensor, others: Tensor, sums: Tensor, of_others: Tensor, first: int, scale: Tensor) -> _Side:
    """Cross-entropies of own rows (b, d) over all columns, whose gradient also has what is left of the columns' own.

    sums, of_others: (n,) `log_sums` of all rows of this side, and of the other.
    """
    sides = []
    with torch.autocast(own.device.type, enabled=False):
        step = max(1, _AT_ONCE // len(others))
        for start in range(0, len(own), step):
            rows = own[start : start + step].float()
            place = first + start + torch.arange(len(rows), device=rows.device)
            logits = scale * rows @ others.T
            mine = sums[first + start : first + start + len(rows)]
            matched = logits.gather(1, place[:, None]).squeeze(1)
            shares = (logits - rearrange(mine, "b -> b 1")).exp()
            by_scale = ((shares * logits).sum() - matched.sum()) / scale
            right = (logits.argmax(dim=1) == place).sum()
            shares += (logits - of_others).exp()
            by_rows = scale * (shares @ others - 2 * others.index_select(0, place))
            sides.append(_Side((mine - matched).sum(), by_rows, by_scale, torch.zeros_like(scale), right.float()))
    return _together(sides)


@torch.no_grad()
def _sigmoid_side(own: Tensor, others: Tensor, first: int, scale: Tensor, bias: Tensor) -> _Side:
    sides = []
    with torch.autocast(own.device.type, enabled=False):
        step = max(1, _AT_ONCE // len(others))
        for start in range(0, len(own), step):
            rows = own[start : start + step].float()
            place = first + start + torch.arange(len(rows), device=rows.device)
            cosines = rows @ others.T
            logits = scale * cosines + bias
            sign = torch.full_like(logits, -1.0).scatter_(1, place[:, None], 1.0)
            by_logits = -sign * torch.sigmoid(-sign * logits)
            sides.append(
                _Side(
                    F.softplus(-sign * logits).sum(),
                    scale * (by_logits @ others),
                    (by_logits * cosines).sum(),
                    by_logits.sum(),
                    (logits.argmax(dim=1) == place).sum().float(),
                )
            )
    return _together(sides)


def _together(sides: list[_Side]) -> _Side:
    value, by_rows, by_scale, by_bias, right = zip(*sides, strict=True)
    return _Side(
        torch.stack(value).sum(),
        torch.cat(by_rows),
        torch.stack(by_scale).sum(),
        torch.stack(by_bias).sum(),
        torch.stack(right).sum(),
    )
