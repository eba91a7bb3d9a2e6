"""What a timm model does with images of one size, found by running it once without weights."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import DropPath
from torch import Tensor, nn

from pretrain.encoders.timm.config import TimmConfig
from pretrain.encoders.timm.convit import place
from pretrain.encoders.timm.dropping import why_not_dropped
from pretrain.encoders.timm.embeddings import Embedded, calls_of, candidates, embeddings_of, map_of

#: Asked of every model, and left out for those that have no such argument: they make it take images of other sizes.
WISHES = {"dynamic_img_size": True, "strict_img_size": False}
#: Px of which sides of images are multiples in one model or another, tried where a size does not do.
STEPS = (14, 16, 32, 120, 224)

#: By model, which of what is asked of every model it has no argument for: each is found by building it once in vain.
_NOT_TAKEN: dict[str, set[str]] = defaultdict(set)


@dataclass(frozen=True)
class Survey:
    """What a timm model does with images of one size; found by a run without weights.

    arguments: those of `timm.create_model` that make it, but for num_classes and drop path.
    dim: width of the pooled feature. layout: where the tokens are in what `forward_features` gives.
    grid: rows and columns of the map that the tokens form, None where they form none.
    embeddings: the modules whose output is one map of tokens, one, or one for each branch; `patch`: px of the first's.
    unmaskable: why tokens can't be replaced by a mask token, None where they can; undroppable: be left out.
    uniform: whether `model.blocks` all give what the last one gives. grouped: whether timm knows its layers.
    drop_calls: how often each DropPath is called in a pass, in the order of `model.modules()`.
    """

    arguments: dict[str, Any]
    image_size: tuple[int, int]
    channels: int
    dim: int
    layout: str  # of "rows columns channels", "channels rows columns", "sequence", "branches" and "none"
    num_prefix: int
    grid: tuple[int, int] | None
    embeddings: tuple[Embedded, ...]
    patch: int
    unmaskable: str | None
    undroppable: str | None
    uniform: bool
    grouped: bool
    drop_calls: tuple[int, ...]

    @property
    def stride(self) -> int:
        """Pixels per output token; 1 where the tokens form no map."""
        return self.image_size[0] // self.grid[0] if self.grid else 1


def check_name(name: str) -> None:
    """Raise ValueError for a name timm does not know."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"the nearest names: {', '.join(near)}" if near else "timm.list_models() gives its names"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")


def create(
    config: TimmConfig, image_size: tuple[int, int] | None, channels: int | None, pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The timm model without classifier, and the arguments besides num_classes and drop path that it was made with.

    ValueError for arguments of `config` that it does not take.
    """
    optional: dict[str, Any] = dict(WISHES)
    if image_size is not None:
        optional["img_size"] = tuple(image_size)
    not_taken = _NOT_TAKEN[config.model]
    optional = {name: value for name, value in optional.items() if name not in not_taken}
    given = dict(config.args)
    if channels is not None:
        given["in_chans"] = channels
    drop_path = {"drop_path_rate": config.drop_path}  # zero as well: some models have another default
    if "drop_path_rate" in not_taken and not config.drop_path:
        drop_path = {}
    while True:
        arguments = {**optional, **given}
        try:
            model = timm.create_model(config.model, pretrained=pretrained, num_classes=0, **arguments, **drop_path)
            place(model)
            return model, arguments
        except TypeError as error:
            fixed = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
            if fixed and fixed.group(1) in config.args:
                raise ValueError(f"timm:{config.model} sets {fixed.group(1)!r} itself, so encoder.args can't") from None
            _, refused, names = str(error).partition("unexpected keyword argument")
            unknown = re.findall(r"'(\w+)'", names) if refused else []
            for name in unknown:
                if name in config.args:
                    raise ValueError(f"timm:{config.model} takes no argument {name!r} (encoder.args)") from None
                if name in drop_path and config.drop_path:
                    raise ValueError(f"timm:{config.model} takes no drop path; set encoder.drop_path=0") from None
            if not set(unknown) & {*optional, *drop_path}:
                raise
            for name in unknown:
                optional.pop(name, None)
                drop_path.pop(name, None)
                not_taken.add(name)


def survey(config: TimmConfig, image_size: tuple[int, int] | None = None, channels: int | None = None) -> Survey:
    """What `config`'s model does with images of `image_size` px; ValueError where it does not take them."""
    check_name(config.model)
    return _survey(_Key.of(config, image_size, channels))


def timm_arguments(config: TimmConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """What `timm.create_model` makes this architecture of."""
    return {"model_name": config.model, "num_classes": 0, **survey(config, image_size, channels).arguments}


def why_not_size(config: TimmConfig, built_for: tuple[int, int], channels: int, size: tuple[int, int]) -> str | None:
    """Why a model built for images of one size does not take those of another; None where it does."""
    return _why_not_size(_Key.of(config, built_for, channels), size)


class _Key(NamedTuple):
    """A model built for images of one size, as the key of what is known of it."""

    model: str
    args: str
    drop_path: float
    image_size: tuple[int, int] | None
    channels: int | None

    @staticmethod
    def of(config: TimmConfig, image_size: tuple[int, int] | None, channels: int | None) -> _Key:
        size = None if image_size is None else (image_size[0], image_size[1])
        return _Key(config.model, json.dumps(config.args, sort_keys=True), config.drop_path, size, channels)

    def create(self) -> tuple[nn.Module, dict[str, Any]]:
        config = TimmConfig(model=self.model, args=json.loads(self.args), drop_path=self.drop_path)
        return create(config, self.image_size, self.channels)


@lru_cache(maxsize=64)
def _survey(key: _Key) -> Survey:
    try:
        return _run(key, _look_at, None)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("timm:"):
            raise
        size = "its own size" if key.image_size is None else f"{key.image_size[0]}x{key.image_size[1]} px"
        raise ValueError(
            f"timm:{key.model} does not run on images of {size}: {_in_words(error)}{_sizes_that_do(key)}"
        ) from error


@lru_cache(maxsize=64)
def _why_not_size(key: _Key, size: tuple[int, int]) -> str | None:
    try:
        _run(key, lambda model, images: model.forward_head(model.forward_features(images)), size)
    except Exception as error:  # hundreds of models refuse in as many ways
        return _in_words(error)
    return None


def _sizes_that_do(key: _Key, most: int = 2, tries: int = 5) -> str:
    """The nearest sizes that a model runs on, as the end of a message; empty where none of a few does."""
    if key.image_size is None:
        return ""
    height, width = key.image_size
    own = (timm.get_pretrained_cfg(key.model).input_size or (3, 224, 224))[1:]
    near = {
        (max(height // step + up, 1) * step, max(width // step + up, 1) * step)
        for step in STEPS
        for up in (0, 1)
        if own[0] % step == 0
    }
    near = (near | {tuple(own)}) - {key.image_size}
    found: list[tuple[int, int]] = []
    for size in sorted(near, key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))[:tries]:
        with suppress(Exception):  # hundreds of models refuse in as many ways
            _run(key._replace(image_size=size), _look_at, None)
            found.append(size)
        if len(found) == most:
            break
    if not found:
        return ""
    told = " or ".join(f"views.global_crops.size=[{rows}, {columns}]" for rows, columns in found)
    return f". It runs on others: set {told}, for example"


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


@lru_cache(maxsize=4)
def _without_weights(key: _Key) -> tuple[nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        return key.create()


def _run(key: _Key, what: Callable[[nn.Module, Tensor], Any], size: tuple[int, int] | None) -> Any:
    """`what(model, images)` for one empty image of `size` px, without weights; with weights for the few models that
    need numbers. Leaves torch's generators as they are."""

    def run(model: nn.Module, arguments: dict[str, Any]) -> Any:
        data = resolve_model_data_config(model)
        own = key.image_size or tuple(data["input_size"][1:])
        given = what(model.eval(), torch.zeros(1, key.channels or data["input_size"][0], *(size or own)))
        return replace(given, arguments=arguments) if isinstance(given, Survey) else given

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            with torch.device("meta"):
                return run(*_without_weights(key))
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "meta" not in str(error):
                raise
        return run(*key.create())


def _look_at(model: nn.Module, images: Tensor) -> Survey:
    size = (images.shape[2], images.shape[3])
    blocks = getattr(model, "blocks", None)
    numbered = dict(enumerate(blocks)) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else {}
    drops = dict(enumerate(part for part in model.modules() if isinstance(part, DropPath)))
    with (
        calls_of(candidates(model)) as embedded,
        calls_of(numbered) as through_blocks,
        calls_of(drops) as dropped,
    ):
        given = model.forward_features(images)
    pooled = model.forward_head(given, pre_logits=True)
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        raise ValueError("its pooled feature is not one vector an image; leave encoder.args.global_pool as timm has it")
    embeddings = embeddings_of(embedded, size)
    layout, num_prefix, grid = _layout(model, given, pooled.shape[1], size, embeddings)
    shapes = {
        tuple(output.shape) if isinstance(output, Tensor) else None
        for calls in through_blocks.values()
        for _, output in calls
    }
    patch = size[0] // embeddings[0].grid[0] if embeddings else 1
    unmaskable = _why_not_replaced(layout, grid, size, patch if embeddings else None)
    return Survey(
        arguments={},
        image_size=size,
        channels=images.shape[1],
        dim=pooled.shape[1],
        layout=layout,
        num_prefix=num_prefix,
        grid=grid,
        embeddings=embeddings,
        patch=patch,
        unmaskable=unmaskable,
        undroppable=why_not_dropped(model) or unmaskable,
        uniform=isinstance(given, Tensor) and shapes == {tuple(given.shape)},
        grouped=hasattr(model, "group_matcher"),
        drop_calls=tuple(len(dropped[index]) for index in drops),
    )


def _why_not_replaced(
    layout: str, grid: tuple[int, int] | None, size: tuple[int, int], patch: int | None
) -> str | None:
    """Why the tokens that a model begins with, of `patch` px, can't be replaced by a mask token."""
    if patch is None:
        return "no single patch embedding"
    if layout == "none":
        return "its features form no map as wide as the pooled one"
    if grid is None or size[0] % grid[0] or size[0] // grid[0] * grid[1] != size[1]:
        return f"its features form no map that divides {size[0]}x{size[1]} px"
    if size[0] // grid[0] % patch:
        halvings = math.ceil(math.log2(size[0] / patch / grid[0]))
        return (
            f"its tokens hold no whole patches of {patch} px: take views.global_crops whose sides are multiples of "
            f"{patch * 2**halvings} px"
        )
    return None


def _layout(
    model: nn.Module, given: Any, dim: int, size: tuple[int, int], embeddings: tuple[Embedded, ...]
) -> tuple[str, int, tuple[int, int] | None]:
    """Where the tokens are in what `forward_features` gave, how many prefix tokens come first, and the map."""
    if isinstance(given, (list, tuple)) and embeddings:
        shapes = [(1, 1 + own.grid[0] * own.grid[1], own.width) for own in embeddings]
        if [tuple(part.shape) for part in given] == shapes and sum(own.width for own in embeddings) == dim:
            return "branches", 1, embeddings[0].grid
    if isinstance(given, Tensor) and given.ndim == 4:
        order = "rows columns channels" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "channels rows columns"
        if given.shape[1] != dim and given.shape[3] == dim:
            order = "rows columns channels"
        rows, columns, width = (
            given.shape[1:] if order == "rows columns channels" else (*given.shape[2:], given.shape[1])
        )
        return (order, 0, (rows, columns)) if width == dim else ("none", 0, None)
    if isinstance(given, Tensor) and given.ndim == 3 and given.shape[2] == dim:
        count = given.shape[1]
        num_prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
        if not num_prefix and isinstance(getattr(model, "cls_token", None), Tensor) and map_of(count - 1, size):
            num_prefix = 1
        if count > max(num_prefix, 1):
            return "sequence", num_prefix, map_of(count - num_prefix, size)
    return "none", 0, None
