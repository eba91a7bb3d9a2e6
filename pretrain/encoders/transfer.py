"""One encoder's weights brought into another of its family: other sizes of image and patch, registers, channels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from einops import repeat
from timm.layers import resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor

from pretrain.encoders.base import Encoder
from pretrain.encoders.positions import nearest_on_line, resize_positions, resize_relative_table

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


@dataclass
class Fitted:
    """What `fit` made of a state dict: the weights to load, and what happened to each key that did not fit as it was.

    resized: taken after interpolation, with both shapes. left: in the source and not taken. fresh: in the encoder and
    not in the source, so that it keeps the value it has. Each with a reason.
    """

    weights: dict[str, Tensor]
    resized: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: how much was taken, and every key of which something is to be said."""
        taken = len(self.weights) - len(self.fresh) - len(self.resized)
        parts = [f"{taken} tensors taken as they are"]
        parts += [f"resized: {key} ({shapes})" for key, shapes in self.resized.items()]
        for what, reasons in (("not taken", self.left), ("fresh", self.fresh)):
            by_reason: dict[str, list[str]] = {}
            for key, why in reasons.items():
                by_reason.setdefault(why, []).append(key)
            for why, keys in by_reason.items():
                more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
                parts.append(f"{what}: {', '.join(keys[:6])}{more} ({why})")
        return parts


def fit(source: dict[str, Tensor], encoder: Encoder, old_grid: tuple[int, int] | None = None) -> Fitted:
    """Bring a `source` state dict to the inner module of `encoder`.

    Positions and tables of relative positions are interpolated, a patch embedding of another patch size is resampled
    (FlexiViT, Beyer et al. 2023). One of other channels gets the mean over them, scaled so that a grey image in all
    channels is embedded as before. `old_grid`: the patches (h, w) the
    source's positions were made for; default: a square.
    """
    own = encoder.inner().state_dict()
    fitted = Fitted(dict(own))
    for key, value in source.items():
        if key not in own:
            fitted.left[key] = "the encoder has no such tensor"
            continue
        wanted = own[key]
        if value.shape == wanted.shape:
            fitted.weights[key] = value.to(wanted.dtype)
            continue
        changed = _resized(key, source, own, encoder, old_grid)
        if changed is None:
            fitted.left[key] = f"shape {tuple(value.shape)}, the encoder's is {tuple(wanted.shape)}"
        else:
            fitted.weights[key] = changed.to(wanted.dtype)
            fitted.resized[key] = f"{tuple(value.shape)} to {tuple(wanted.shape)}"
    for key in own:
        if key not in source:
            fitted.fresh[key] = "not in the source"
        elif key in fitted.left:
            fitted.fresh[key] = "its shape differs"
    return fitted


def _resized(
    key: str, source: dict[str, Tensor], own: dict[str, Tensor], encoder: Encoder, old_grid: tuple[int, int] | None
) -> Tensor | None:
    """The source's tensor `key` in the shape of the encoder's own; None where there is no meaning to that."""
    value, wanted = source[key], own[key]
    if (changed := encoder.resized(key, value, wanted)) is not None:
        return changed
    if key.startswith("pos_embed") and value.ndim == wanted.ndim == 3 and value.shape[-1] == wanted.shape[-1]:
        return _positions(key, source, own, encoder, old_grid)
    if key in encoder.line_tables and value.ndim == 3 and value.shape[-1] == wanted.shape[-1]:
        return nearest_on_line(value, wanted.shape[1])
    if key.endswith("relative_position_bias_table") and value.shape[1] == wanted.shape[1]:
        extra = 3 if encoder.has_class_token else 0
        old, new = (_window(len(table) - extra) for table in (value, wanted))
        if old is None or new is None:
            return None
        if extra:  # BEiT's code keeps near offsets as they are and stretches the far ones (a geometric progression)
            return resize_rel_pos_bias_table(value, new, tuple(wanted.shape), old)
        return resize_relative_table(value, old, new)
    if key in encoder.pixel_weights and value.ndim == 4 and value.shape[0] == wanted.shape[0]:
        if value.shape[1] != wanted.shape[1]:
            old, new = value.shape[1], wanted.shape[1]
            value = repeat(value.mean(dim=1) * (old / new), "d h w -> d c h w", c=new)
        if value.shape[2:] != wanted.shape[2:]:
            value = resample_patch_embed(value, list(wanted.shape[2:]))
        return value
    return None


def _positions(
    key: str, source: dict[str, Tensor], own: dict[str, Tensor], encoder: Encoder, old_grid: tuple[int, int] | None
) -> Tensor | None:
    """Positions of prefix tokens by token, those of patches by interpolation; a new register's is zero."""
    value, wanted = source[key], own[key]
    at_first_stage = key in ("pos_embed", "pos_embed1")
    new_grid = encoder.position_grid(key)
    theirs = _prefix_rows(key, source, value.shape[1], old_grid if at_first_stage else None)
    ours = _prefix_rows(key, own, wanted.shape[1], new_grid)
    num_old = value.shape[1] - sum(theirs.values())
    if old_grid is None or not at_first_stage:
        scale = 1 if old_grid is None else (old_grid[0] * old_grid[1] / num_old) ** 0.5
        grid = _sides(num_old) if old_grid is None else (round(old_grid[0] / scale), round(old_grid[1] / scale))
    else:
        grid = old_grid
    if (
        grid is None
        or grid[0] * grid[1] != num_old
        or new_grid[0] * new_grid[1] != wanted.shape[1] - sum(ours.values())
    ):
        return None
    rows = dict(zip(theirs, value.split([*theirs.values(), num_old], dim=1), strict=False))
    prefix = []
    for name, count in ours.items():
        kept = rows.get(name, value[:, :0])[:, :count]
        prefix += [kept, kept.new_zeros(1, count - kept.shape[1], kept.shape[2])]
    how = getattr(getattr(encoder, "config", None), "interpolation", "offset")
    patches = resize_positions(value[:, value.shape[1] - num_old :], grid, new_grid, how)
    return torch.cat([*prefix, patches.to(value.dtype)], dim=1)


def _prefix_rows(key: str, state: dict[str, Tensor], num_rows: int, grid: tuple[int, int] | None) -> dict[str, int]:
    """Prefix tokens with rows of their own before those of the `grid` (else: a square) in the table `key`, in order.

    There are none in tables of patches alone, such as DeiT III's, whose class token has no position.
    """
    if key == "pos_embed":
        named = {name: state[name].shape[1] for name in PREFIX_TOKENS if name in state}
    else:
        last = max(name for name in state if name.startswith("pos_embed"))
        named = {"cls_token": 1} if key == last and "cls_token" in state else {}
    if grid is not None:
        return {} if num_rows == grid[0] * grid[1] else named
    return {} if _sides(num_rows) and not _sides(num_rows - sum(named.values())) else named


def _window(count: int) -> tuple[int, int] | None:
    sides = _sides(count)
    return None if sides is None else ((sides[0] + 1) // 2, (sides[1] + 1) // 2)


def _sides(count: int) -> tuple[int, int] | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None
