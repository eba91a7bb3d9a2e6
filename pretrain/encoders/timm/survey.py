"""What a timm model does with images of one size, found by running it once without weights."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from pretrain.encoders.timm.config import TimmConfig

#: Asked of every model, and left out for those that have no such argument: they make it take images of other sizes.
WISHES = {"dynamic_img_size": True, "strict_img_size": False}
#: Modules that timm calls by these names turn the image into the first tokens.
EMBEDDINGS = ("patch_embed", "stem")


@dataclass(frozen=True)
class Survey:
    """What a timm model does with images of one size; found by a run without weights.

    arguments: those of `timm.create_model` that make it, but for num_classes and drop path.
    dim: width of the pooled feature. layout: where the tokens are in what `forward_features` gives.
    grid: rows and columns of the map that the tokens form, None where they form none.
    embedding: name of the module whose output is one map of tokens; its `patch` in px, `width` and `embedded_as`.
    unmaskable: why tokens can't be replaced by a mask token, None where they can.
    uniform: whether `model.blocks` all give what the last one gives. grouped: whether timm knows its layers.
    """

    arguments: dict[str, Any]
    image_size: tuple[int, int]
    channels: int
    dim: int
    layout: str  # of "rows columns channels", "channels rows columns", "sequence" and "none"
    num_prefix: int
    grid: tuple[int, int] | None
    embedding: str | None
    embedded_as: str
    patch: int
    width: int
    unmaskable: str | None
    uniform: bool
    grouped: bool

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
    given = dict(config.args)
    if channels is not None:
        given["in_chans"] = channels
    drop_path = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    while True:
        arguments = {**optional, **given}
        try:
            model = timm.create_model(config.model, pretrained=pretrained, num_classes=0, **arguments, **drop_path)
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
                if name in drop_path:
                    raise ValueError(f"timm:{config.model} takes no drop path; set encoder.drop_path=0") from None
            if not set(unknown) & set(optional):
                raise
            for name in unknown:
                optional.pop(name, None)


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
        raise ValueError(f"timm:{key.model} does not run on images of {size}: {_in_words(error)}") from error


@lru_cache(maxsize=64)
def _why_not_size(key: _Key, size: tuple[int, int]) -> str | None:
    try:
        _run(key, lambda model, images: model.forward_head(model.forward_features(images)), size)
    except Exception as error:  # hundreds of models refuse in as many ways
        return _in_words(error)
    return None


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
    modules = {name: part for name in EMBEDDINGS if isinstance(part := getattr(model, name, None), nn.Module)}
    blocks = getattr(model, "blocks", None)
    numbered = dict(enumerate(blocks)) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else {}
    with outputs_of(modules) as embedded, outputs_of(numbered) as outputs:
        given = model.forward_features(images)
    pooled = model.forward_head(given, pre_logits=True)
    if not isinstance(pooled, Tensor) or pooled.ndim != 2:
        raise ValueError("its pooled feature is not one vector an image; leave encoder.args.global_pool as timm has it")
    layout, num_prefix, grid = _layout(model, given, pooled.shape[1], size)
    name, embedded_as, patch, width = _embedding(embedded, size)
    shapes = {tuple(o.shape) if isinstance(o, Tensor) else None for calls in outputs.values() for o in calls}
    if name is None:
        unmaskable = "no single patch embedding"
    elif layout == "none":
        unmaskable = "its features form no map as wide as the pooled one"
    elif grid is None or size[0] % grid[0] or size[0] // grid[0] * grid[1] != size[1]:
        unmaskable = f"its features form no map that divides {size[0]}x{size[1]} px"
    else:
        unmaskable = None
    return Survey(
        arguments={},
        image_size=size,
        channels=images.shape[1],
        dim=pooled.shape[1],
        layout=layout,
        num_prefix=num_prefix,
        grid=grid,
        embedding=name,
        embedded_as=embedded_as,
        patch=patch,
        width=width,
        unmaskable=unmaskable,
        uniform=isinstance(given, Tensor) and shapes == {tuple(given.shape)},
        grouped=hasattr(model, "group_matcher"),
    )


def _layout(model: nn.Module, given: Any, dim: int, size: tuple[int, int]) -> tuple[str, int, tuple[int, int] | None]:
    """Where the tokens are in what `forward_features` gave, how many prefix tokens come first, and the map."""
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


def _embedding(embedded: dict[str, list[Any]], size: tuple[int, int]) -> tuple[str | None, str, int, int]:
    """Name, layout, px per token and width of the first module that was called once and gave one map of tokens."""
    for name, outputs in embedded.items():
        output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        if not isinstance(output, Tensor) or len(outputs) != 1:
            continue
        found: list[tuple[str, tuple[int, int] | None, int]] = []
        if output.ndim == 3:
            found = [("sequence", map_of(output.shape[1], size), output.shape[2])]
        elif output.ndim == 4:
            _, first, second, third = output.shape
            found = [
                ("channels rows columns", (second, third), first),
                ("rows columns channels", (first, second), third),
            ]
        for layout, grid, width in found:
            if grid is None or size[0] % grid[0] or size[1] % grid[1] or size[0] // grid[0] != size[1] // grid[1]:
                continue
            return name, layout, size[0] // grid[0], width
    return None, "", 1, 1


def map_of(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of `count` square tokens that tile an image of `size` (h, w) px; None if none do."""
    if count < 1:
        return None
    side = math.isqrt(size[0] * size[1] // count)
    if side < 1 or side * side * count != size[0] * size[1] or size[0] % side or size[1] % side:
        return None
    return size[0] // side, size[1] // side


@contextmanager
def outputs_of(modules: dict[Any, nn.Module]) -> Iterator[dict[Any, list[Any]]]:
    """Collects, while it lasts, what each of the modules gives at every call, by its key."""
    outputs: dict[Any, list[Any]] = defaultdict(list)

    def keeper(key: Any) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[key].append(output)

        return keep

    handles = [module.register_forward_hook(keeper(key)) for key, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
