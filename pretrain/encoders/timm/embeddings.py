"""Where a timm model turns an image into its first tokens, and those tokens replaced by a mask token."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

#: Modules that timm calls by these names turn the image into the first tokens.
EMBEDDINGS = ("patch_embed", "stem", "embeds.proj")

#: Where the tokens are in a module's output, and what a map (b, h, w) over them becomes beside it.
PATTERNS = {
    "sequence": "b (h w) 1",
    "rows columns channels": "b h w 1",
    "channels rows columns": "b 1 h w",
}


class Embedded(NamedTuple):
    """The output of the module `name`: one map of `grid` (h, w) tokens of `width`, laid out as `order` says."""

    name: str
    order: str
    grid: tuple[int, int]
    width: int


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a model that may embed the image, by name; of a list of branches, each."""
    found: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name in EMBEDDINGS:
        module = modules.get(name)
        if isinstance(module, nn.ModuleList):
            found |= {f"{name}.{index}": branch for index, branch in enumerate(module)}
        elif module is not None:
            found[name] = module
    return found


def embeddings_of(calls: dict[str, list[tuple[Any, Any]]], size: tuple[int, int]) -> tuple[Embedded, ...]:
    """The first module that was called once and gave one map of square tokens; or all branches, the finest first.

    calls: of each candidate, its inputs and output at every call, for images of `size` px.
    """
    found: list[Embedded] = []
    for name, seen in calls.items():
        embedded = _embedded(name, seen, size)
        if embedded is None:
            continue
        found.append(embedded)
        if not name.rpartition(".")[2].isdigit():
            break
    if not found or size[0] % found[0].grid[0] or size[1] % found[0].grid[1]:
        return ()
    rows, columns = found[0].grid
    return tuple(found) if size[0] // rows == size[1] // columns else ()


def _embedded(name: str, seen: list[tuple[Any, Any]], size: tuple[int, int]) -> Embedded | None:
    inputs, output = seen[0]
    output = output[0] if isinstance(output, tuple) else output
    if len(seen) != 1 or not isinstance(output, Tensor):
        return None
    own = image_size_of(inputs, size)
    for order in PATTERNS:
        if output.ndim == (3 if order == "sequence" else 4):
            grid = grid_of(order, output, own)
            if grid is not None and own[0] * grid[1] == own[1] * grid[0] and own[0] % grid[0] == 0:
                width = output.shape[1] if order == "channels rows columns" else output.shape[-1]
                return Embedded(name, order, grid, width)
    return None


def image_size_of(inputs: Any, size: tuple[int, int]) -> tuple[int, int]:
    """h, w in px of the images that a module was given; `size`, where it was given patches."""
    first = inputs[0] if inputs else None
    if isinstance(first, Tensor) and first.ndim == 4:
        return first.shape[2], first.shape[3]
    return size


def grid_of(order: str, output: Tensor, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the tokens that a module gave for images of `size` px."""
    if order == "sequence":
        return map_of(output.shape[1], size)
    first = 2 if order == "channels rows columns" else 1
    return output.shape[first], output.shape[first + 1]


def map_of(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of `count` square tokens that tile an image of `size` (h, w) px; None if none do."""
    if count < 1:
        return None
    side = math.isqrt(size[0] * size[1] // count)
    if side < 1 or side * side * count != size[0] * size[1] or size[0] % side or size[1] % side:
        return None
    return size[0] // side, size[1] // side


def at_centres(units: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map over mask units (b, gh, gw) read at the centres of a `grid` of tokens, as (b, h, w).

    Where units hold whole tokens this is `base.refine`. Branches that cut an image into patches of two sizes are so
    masked alike: what a token sees of a hidden unit beyond its centre has been set to zero.
    """
    for axis, count in zip((1, 2), grid, strict=True):
        own = units.shape[axis]
        repeats = Counter((2 * token + 1) * own // (2 * count) for token in range(count))
        parts = enumerate(units.split(1, dim=axis))  # by views alone: an index would be copied to the device
        units = torch.cat([part.repeat_interleave(repeats[index], dim=axis) for index, part in parts], dim=axis)
    return units


@contextmanager
def replaced(
    model: nn.Module, embeddings: Sequence[Embedded], hidden: Tensor | None, token: Tensor, size: tuple[int, int]
) -> Iterator[None]:
    """While it lasts, embedded tokens at `hidden` units (b, gh, gw) of images of `size` px are the mask token.

    token: (w,), the widths of all `embeddings` one behind the other.
    """
    if hidden is None:
        yield
        return

    def substitute(own: Embedded, part: Tensor, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (substitute(own, part, inputs, output[0]), *output[1:])
        grid = grid_of(own.order, output, image_size_of(inputs, size))
        assert grid is not None, (own, output.shape, size)
        where = rearrange(at_centres(hidden, grid), f"b h w -> {PATTERNS[own.order]}")
        if own.order == "channels rows columns":
            part = rearrange(part, "c -> c 1 1")
        return torch.where(where, part.to(output.dtype), output)

    def hook(own: Embedded, part: Tensor) -> Any:
        return lambda module, inputs, output: substitute(own, part, inputs, output)

    parts = token.split([own.width for own in embeddings])
    handles = [
        model.get_submodule(own.name).register_forward_hook(hook(own, part))
        for own, part in zip(embeddings, parts, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_of(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, list[tuple[Any, Any]]]]:
    """Collects, while it lasts, the inputs and the output of each of the modules at every call, by its key."""
    calls: dict[Any, list[tuple[Any, Any]]] = defaultdict(list)

    def keeper(key: Any) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[key].append((inputs, output))

        return keep

    handles = [module.register_forward_hook(keeper(key)) for key, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
