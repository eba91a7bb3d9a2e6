"""Which columns of a row of features are what: of any encoder, read off one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pretrain.encoders import Features


class Piece(NamedTuple):
    """Columns `start` .. `stop` of a row that are one vector of the encoder, such as the class token of a block."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """What a row of features holds.

    pieces: from left to right, they cover the row once.
    inputs: what probes may read, as (start, stop) of neighbouring pieces; see `eval.base.FeatureSet`.
    pooled_as: the input that is the model's own pooled feature.
    grid: (rows, columns) of the patch tokens, where they form a map. token_dim: of one.
    """

    pieces: tuple[Piece, ...]
    inputs: dict[str, tuple[int, int]]
    pooled_as: str
    grid: tuple[int, int] | None
    token_dim: int

    @property
    def dim(self) -> int:
        """Columns of a row."""
        return self.pieces[-1].stop

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, which `from_json` takes."""
        return {
            "pieces": [list(piece) for piece in self.pieces],
            "inputs": {name: list(columns) for name, columns in self.inputs.items()},
            "pooled_as": self.pooled_as,
            "grid": None if self.grid is None else list(self.grid),
            "token_dim": self.token_dim,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Layout:
        """What `as_json` gave."""
        return cls(
            tuple(Piece(str(name), int(start), int(stop)) for name, start, stop in found["pieces"]),
            {name: (int(start), int(stop)) for name, (start, stop) in found["inputs"].items()},
            str(found["pooled_as"]),
            None if found["grid"] is None else (int(found["grid"][0]), int(found["grid"][1])),
            int(found["token_dim"]),
        )

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inputs (n, d), each with its d, as views of rows (n, dim)."""
        return {name: matrix[:, start:stop] for name, (start, stop) in self.inputs.items()}


def layout(features: Features) -> Layout:
    """Of what `rows_of` makes of features that were asked for with their last blocks; in fp32."""
    width, count = features.tokens.shape[-1], len(_last_blocks(features))
    summary = "mean" if features.prefix_tokens is None else "class"
    pieces = [
        Piece(
            summary if back == 1 else f"{summary} of block -{back}", (count - back) * width, (count - back + 1) * width
        )
        for back in range(count, 0, -1)
    ]
    end, last = count * width, (count - 1) * width
    if features.prefix_tokens is None:
        names, blocks = {"mean": (last, end)}, {f"mean of last {count}": (0, end)}
    else:
        pieces.append(Piece("mean", end, end + width))
        names = {"class": (last, end), "mean": (end, end + width), "class + mean": (last, end + width)}
        blocks = {f"class of last {count}": (0, end), f"class of last {count} + mean": (0, end + width)}
        end += width
    names |= blocks if count > 1 else {}
    grid, pooled_as = features.grid, ""
    for name, tokens in (("class", features.prefix_tokens), ("mean", features.tokens)):
        if name in names and tokens is not None:
            value = tokens[:, 0] if name == "class" else tokens.mean(dim=1)
            if value.shape == features.pooled.shape and torch.allclose(value, features.pooled, rtol=1e-3, atol=1e-4):
                pooled_as = name
                break
    if not pooled_as:
        pooled_as, stop = "pooled", end + features.pooled.shape[1]
        names["pooled"] = (end, stop)
        pieces.append(Piece("pooled", end, stop))
    return Layout(tuple(pieces), names, pooled_as, None if grid is None else (int(grid[0]), int(grid[1])), width)


def rows_of(features: Features, found: Layout) -> Tensor:
    """(b, dim) float32, on the features' device."""
    parts = [_summary(block) for block in _last_blocks(features)]
    if features.prefix_tokens is not None:
        parts.append(features.tokens.float().mean(dim=1))
    if found.pooled_as == "pooled":
        parts.append(features.pooled.float())
    return torch.cat(parts, dim=1)


def _last_blocks(features: Features) -> list[Features]:
    """The blocks asked for that are as wide as the output, then the output itself."""
    width = features.tokens.shape[-1]
    return [block for block in features.layers if block.tokens.shape[-1] == width] + [features]


def _summary(features: Features) -> Tensor:
    """(b, d) the class token, or the mean of the patch tokens where there is none."""
    if features.prefix_tokens is None:
        return features.tokens.float().mean(dim=1)
    return features.prefix_tokens[:, 0].float()
