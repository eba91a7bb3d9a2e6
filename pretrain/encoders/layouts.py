"""What readers of official checkpoints share: the tensors, taken key by key, and what was made of them.

A reader is a function of a family (`EncoderSpec.layouts`) from `CheckpointState` to `Imported`. What it does not take
it says why, and what it can't know it says that it guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from pretrain.config.load import override_section
from pretrain.encoders.registry import FAMILIES, EncoderConfig
from pretrain.encoders.shapes import VIT_SIZES
from pretrain.encoders.unwrapped import State, unwrapped

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
#: Buffers that the modules compute themselves.
COMPUTED = r"relative_position_index|attn_mask|relative_coords_table"
#: First words of names that tell whose weights they are.
SIDES = {"teacher": ("teacher.", "ema.", "model_ema."), "student": ("student.",)}
#: Tokens along a window or map with relative positions: their pairs, computed from it, take its fourth power in memory.
LARGEST_WINDOW = 128


@dataclass
class Imported:
    """What a checkpoint holds, under our names.

    encoder: the encoder it is for, and `image_size` the images (h, w px) its positions were made for.
    weights: of the encoder's inner module. mask_token: of replaced units, where there is one.
    method: what belongs to the method around the encoder (decoder, head), by the method's own names.
    left: keys that were not taken, each with the reason. resized: those that were interpolated, with both shapes.
    normalisation: mean and std of its pixels in 0 .. 1. notes: for people, what was guessed or changed on the way.
    """

    encoder: EncoderConfig
    image_size: tuple[int, int]
    weights: State
    method_name: str
    mask_token: Tensor | None = None
    method: State = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    notes: list[str] = field(default_factory=list)


class CheckpointState:
    """A checkpoint's tensors, taken key by key."""

    def __init__(
        self,
        checkpoint: Any,
        which: str,
        overrides: Sequence[str] = (),
        image_size: int | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """told: what a configuration beside the file tells (`hub.told_by`)."""
        self.which, self.image_size, self.told = which, image_size, dict(told or {})
        self.told_by = "the config.json beside it tells"
        self.notes: list[str] = []
        self.grid, self._grid_is_used = _grid_of(overrides), False
        self.overrides = tuple(override for override in overrides if not override.startswith("grid="))
        self.tensors, self.left = unwrapped(checkpoint, which)
        #: Of the coarsest type there was, at 1: what an equality of stored numbers can be asked for.
        self.rounding = 0.0
        types = {value.dtype for value in self.tensors.values() if value.is_floating_point()}
        if types:
            self.rounding = max(torch.finfo(dtype).eps for dtype in types)
        if other := types - {torch.float32}:
            named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in other))
            self.notes.append(f"weights in {named} were brought to float32")
        self.tensors = {
            key: value.float() if value.is_floating_point() else value for key, value in self.tensors.items()
        }
        self.file_tensors = dict(self.tensors)  # by the file's own names

    def side(self) -> None:
        """Keep the teacher or the student, as asked for, where the first word of names tells which it is."""
        other = "student" if self.which == "teacher" else "teacher"
        own = next((word for word in SIDES[self.which] if any(key.startswith(word) for key in self.tensors)), None)
        if own is None and all(key.startswith(SIDES[other]) for key in self.tensors):
            raise ValueError(f"the checkpoint holds the {other} alone; import it with --which {other}")
        if own is not None:
            self.keep(own, f"not of the {self.which}")
        self.leave(rf"^({'|'.join(map(re.escape, SIDES[other]))})", f"the {other}'s")

    def backbone(self) -> State:
        """Keep the backbone of the side that is asked for; returns what else there is of that side: its heads."""
        self.side()
        if not any(key.startswith("backbone.") for key in self.tensors):
            return {}
        rest = {key: value for key, value in self.tensors.items() if not key.startswith("backbone.")}
        self.tensors = {key: value for key, value in self.tensors.items() if key.startswith("backbone.")}
        self.drop_prefix("backbone.")
        return rest

    def drop_prefix(self, prefix: str) -> None:
        """Take a prefix off every key that has it."""
        self.tensors = {key.removeprefix(prefix): value for key, value in self.tensors.items()}

    def keep(self, prefix: str, why_not: str) -> None:
        """Keep only the keys with `prefix`, and take it off; ValueError where there are none."""
        if not any(key.startswith(prefix) for key in self.tensors):
            near = ", ".join(list(self.tensors)[:6])
            raise ValueError(f"no key begins with {prefix} as in this layout, but with {near}: is it another (--as)?")
        for key in self.tensors:
            if not key.startswith(prefix):
                self.left[key] = why_not
        self.tensors = {
            key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)
        }

    def leave(self, pattern: str, why: str) -> None:
        """Leave out the keys that match."""
        for key in [key for key in self.tensors if re.search(pattern, key)]:
            self.left[key] = why
            del self.tensors[key]

    def take(self, *prefixes: str) -> State:
        """Remove and return the keys that begin so, with their values."""
        return {key: self.tensors.pop(key) for key in list(self.tensors) if key.startswith(prefixes)}

    def rename(self, pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> None:
        """Rename keys by a regular expression."""
        self.tensors = {re.sub(pattern, replacement, key): value for key, value in self.tensors.items()}

    def config(self, inferred: EncoderConfig) -> EncoderConfig:
        """What the weights tell of the encoder, with the user's overrides."""
        try:
            return override_section(inferred, self.overrides)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(f"{inferred.family}: {reason}") from None

    def known(self, name: str, otherwise: Any) -> Any:
        """What a configuration beside the file tells of a setting, which is said; else `otherwise`."""
        if name not in self.told:
            return otherwise
        note = f"{name}={self.told[name]}, as {self.told_by}"
        if note not in self.notes:
            self.notes.append(note)
        return self.told[name]

    def guess(self, name: str, value: Any, why: str) -> Any:
        """A setting that the weights do not tell; said, unless a configuration or the user tells it (`name=VALUE`)."""
        if name in self.told:
            return self.known(name, value)
        if not any(override.startswith(f"{name}=") for override in self.overrides):
            shown = str(list(value)).replace(" ", "") if isinstance(value, tuple) else value
            self.notes.append(f"{name}={shown} is guessed ({why}); give {name}=N if wrong")
        return value

    def patches(self, count: int, what: str, patch: int = 0) -> tuple[int, int]:
        """Rows and columns of the map whose `count` positions are in the table `what`: a square unless told.

        patch: the side in px of one, with which a configuration beside the file tells them.
        """
        if self.grid is not None:
            self._grid_is_used = True
            if self.grid[0] * self.grid[1] != count:
                raise ValueError(f"grid is {self.grid[0]}x{self.grid[1]}, and {what} has {count} positions")
            return self.grid
        if patch and "image_size" in self.told:
            rows, columns = (px // patch for px in self.told["image_size"])
            if rows * columns == count:
                return rows, columns
        side = math.isqrt(max(count, 0))
        if side * side != count or not side:
            raise ValueError(f"{what} has {count} positions, which is no square; tell its rows and columns: grid=2x8")
        self.notes.append(f"{what}'s {count} positions are guessed to be {side} rows of {side}; give grid=HxW if wrong")
        return side, side

    def window(self, table: Tensor, what: str, patch: int) -> tuple[int, int]:
        """Rows and columns of the map that a table of relative positions is for, three of them the class token's."""
        grid = self.grid
        if grid is None and "image_size" in self.told:
            grid = (self.told["image_size"][0] // patch, self.told["image_size"][1] // patch)
        if grid is None:
            side = window_of(table, extra=3)
            return side, side
        self._grid_is_used = True
        if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 != len(table):
            raise ValueError(f"grid is {grid[0]}x{grid[1]}, and {what} has {len(table)} entries")
        return grid

    def pixels(self, px: int, why: str) -> int:
        """The side in px of the images, which the weights do not tell; said, unless it is told."""
        if "image_size" in self.told and len(set(self.told["image_size"])) == 1:
            return self.known("image_size", None)[0]
        if self.image_size is None:
            self.notes.append(f"images of {px} px are guessed ({why}); give --image-size if wrong")
        return px

    def imported(self, config: EncoderConfig, grid: tuple[int, int], px: int, method: str) -> Imported:
        """What is left of the tensors as the weights of an encoder `config`, made for a `grid` of tokens of `px`."""
        if self.grid is not None and not self._grid_is_used:
            raise ValueError(
                f"grid={self.grid[0]}x{self.grid[1]}: this encoder has no positions whose grid is to be told"
            )
        size = (grid[0] * px, grid[1] * px)
        return Imported(self.config(config), size, dict(self.tensors), method, left=self.left, notes=self.notes)

    def get(self, key: str) -> Tensor:
        """A tensor that must be there."""
        if key not in self.tensors:
            near = ", ".join(list(self.tensors)[:6])
            raise ValueError(f"the checkpoint has no {key}; it begins with {near}: is it another layout (--as)?")
        return self.tensors[key]


def count(state: State, pattern: str, first: int = 0) -> int:
    """How many numbers, from `first` on, `pattern` finds in the keys."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    if not found:
        raise ValueError(f"the checkpoint has no keys like {pattern}; it begins with {', '.join(list(state)[:6])}")
    if found != set(range(first, first + len(found))):
        raise ValueError(f"the checkpoint's keys like {pattern} are numbered with gaps, up to {max(found)}")
    return len(found)


def is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def window_of(table: Tensor, extra: int = 0) -> int:
    """Side of the window that a table of relative positions ((2 w - 1)^2 + extra, heads) is for."""
    count = len(table) - extra
    if not is_square(count):
        raise ValueError(
            f"relative_position_bias_table has {count} entries, which is no square; only square windows can be imported"
        )
    window = (math.isqrt(count) + 1) // 2
    if window > LARGEST_WINDOW:
        raise ValueError(f"relative_position_bias_table is for windows of {window} tokens; at most {LARGEST_WINDOW}")
    return window


def usual_heads(dim: int) -> int:
    """Qkv weights do not tell the number of heads: that of the published size, or a head is 64 wide (ViT and PVT)."""
    published = {width: heads for width, _, heads in VIT_SIZES.values()}
    return published.get(dim) or max(1, dim // 64)


def simmim_encoder(state: CheckpointState) -> State:
    """Keep SimMIM's `encoder.`; returns its head (`decoder.0`)."""
    state.drop_prefix("module.")
    head = {
        f"head.{key.rpartition('.')[2]}": (rearrange(value, "o i 1 1 -> o i") if value.ndim == 4 else value)
        for key, value in state.take("decoder.0.").items()
    }
    state.keep("encoder.", "outside of the encoder")
    return head


def recognised(state: CheckpointState) -> list[str]:
    """The layouts whose signs `state` bears, that is, those of which it is with certainty one."""
    words = [*state.tensors, f"model_type={state.told.get('model_type')}"]

    def borne(signs: tuple[str, ...]) -> bool:
        return all(any(re.search(sign, word) for word in words) for sign in signs)

    named = [(name, layout) for spec in FAMILIES.values() for name, layout in spec.layouts.items()]
    return list(dict.fromkeys(name for name, layout in named if any(borne(signs) for signs in layout.signs)))


def _grid_of(overrides: Sequence[str]) -> tuple[int, int] | None:
    given = [override for override in overrides if override.startswith("grid=")]
    if not given:
        return None
    found = re.fullmatch(r"grid=([1-9]\d{0,4})x([1-9]\d{0,4})", given[-1])
    if found is None:
        raise ValueError(f"{given[-1]!r} is no grid; write its rows and columns of patches, such as grid=2x8")
    return int(found[1]), int(found[2])
