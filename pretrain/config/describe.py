"""What a setting means, takes and is by default: read from the sections themselves, so that it can't go out of date.

The meaning of a setting is the comment behind it, and the string below it, in the source of its section.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ByteSize, StringConstraints, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pretrain.config.annotations import Setting, members, sections_of, tag_of
from pretrain.config.overrides import written

_PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    ByteSize: "bytes, such as 500GB",
}
#: Where a value made from the type alone would say little.
EXAMPLES = {
    "name": "longer",
    "description": "'a first try'",
    "runs": "/shared/runs",
    "data.train": "shards/",
    "encoder": "timm:convnext_tiny",
    "data.train.path": "shards/",
    "data.mean": "[0.485, 0.456, 0.406]",
    "data.std": "[0.229, 0.224, 0.225]",
    "data.cache.dir": "/local/cache",
    "data.cache.max_bytes": "500GB",
    "init_from": "timm:vit_small_patch16_224.augreg_in21k",
    "encoder.model": "convnext_tiny",
    "encoder.args": "'{global_pool: avg}'",
    "method.tokenizer": "runs/vqkd",
    "method.teacher": "timm:vit_base_patch16_clip_224.openai",
    "views.global_crops.size": "64",
    "views.global_crops.scale": "[0.2, 1.0]",
    "views.global_crops.jitter": "[0.4, 0.4, 0.2, 0.1]",
    "views.local_crops.size": "32",
    "views.local_crops.scale": "[0.05, 0.4]",
    "views.local_crops.jitter": "[0.4, 0.4, 0.2, 0.1]",
    "views.global_crops.max_tokens": "256",
    "views.global_crops.area": "[64, 256]",
    "views.local_crops.max_tokens": "36",
    "views.local_crops.area": "[16, 36]",
    "views.target_crop.size": "112",
    "views.teacher_crops.size": "512",
    "views.mixed_sizes.global_crops": "256",
    "views.mixed_sizes.local_crops": "96",
    "views.mixed_sizes.teacher_crops": "512",
    "method.ibot.ratio": "[0.1, 0.5]",
    "optim.lr": "1e-3",
    "encoder.dim": "192",
    "encoder.dims": "[64, 128, 320, 512]",
    "encoder.depth": "12",
    "encoder.depths": "[2, 2, 6, 2]",
    "encoder.layer_scale": "1e-5",
    "method.decoder_dim": "192",
    "optim.weight_decay_end": "0.4",
    "train.epochs": "100",
    "train.steps": "10000",
    "checkpoint.every_epochs": "5",
    "checkpoint.milestone_every_epochs": "50",
    "optim.schedule": "cosine",
    "optim.step_epochs": "[30, 60]",
    "optim.betas": "[0.9, 0.95]",
    "engine.deepspeed": "'{wall_clock_breakdown: true}'",
    "tracking.tags": "[photos, first]",
    "tracking.project": "photos",
    "diagnostics.knn_data": "labelled/",
    "diagnostics.stop_on": "[teacher_uniform]",
}


def meaning(setting: Setting) -> str:
    """What the source says of a setting, and of a section its own first sentence; empty where the source is away."""
    tag = tag_of(setting.owner)
    if tag is not None and tag[0] == setting.name:
        return f"which {setting.path.split('.')[-2]} it is"
    said = next((text for section in setting.owner.__mro__ if (text := _meanings(section).get(setting.name))), "")
    sections = sections_of(setting.annotation)
    if said or len(sections) != 1:
        return said or (f"one of {len(sections)} kinds" if sections else "")
    return first_sentence(sections[0])


def first_sentence(section: type) -> str:
    """What a section is for."""
    return (inspect.getdoc(section) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")


@cache
def _meanings(section: type) -> dict[str, str]:
    """The comment behind each field of one class, and the string below it."""
    try:
        source = inspect.getsource(inspect.getmodule(section) or section)
    except (OSError, TypeError):  # built in, or installed without its source
        return {}
    definition = _classes(source).get(section.__name__)
    if definition is None:
        return {}
    comments = _comments(source)
    found: dict[str, str] = {}
    for position, node in enumerate(definition.body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        texts = [comments.get(node.end_lineno or 0, "")]
        below = definition.body[position + 1 : position + 2]
        if below and isinstance(below[0], ast.Expr) and isinstance(below[0].value, ast.Constant):
            texts.append(inspect.cleandoc(str(below[0].value.value)).replace("\n", " "))
        found[node.target.id] = "; ".join(text for text in texts if text)
    return found


@cache
def _classes(source: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


@cache
def _comments(source: str) -> dict[int, str]:
    """The text of each comment, by its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("#: ") for token in tokens if token.type == tokenize.COMMENT}


def takes(annotation: Any) -> str:
    """What values a setting takes, in words: `a whole number, at least 1, or null`."""
    return _takes(annotation, ())


def _takes(annotation: Any, limits: tuple[Any, ...]) -> str:
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        return _takes(inner, (*limits, *marks))
    options = members(annotation)
    if len(options) > 1:
        bare = _union_args(annotation)
        texts = [_takes(option, limits) for option in bare if option is not type(None)]
        texts += ["null"] if type(None) in bare else []
        return (", or " if any("," in text for text in texts) else " or ").join(dict.fromkeys(texts))
    if get_origin(annotation) is Literal:
        return " | ".join(
            str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in get_args(annotation)
        )
    if get_origin(annotation) in (tuple, list):
        items = get_args(annotation)
        if items[-1] is Ellipsis or len(items) == 1:
            return f"a list, each {_takes(items[0], ())}"
        each = list(dict.fromkeys(_takes(item, ()) for item in items))
        return f"[{', '.join(each)}]" if len(each) > 1 else f"{len(items)} values in [ ], each {each[0]}"
    if dataclasses.is_dataclass(annotation):
        tag = tag_of(annotation)  # type: ignore[arg-type]
        return f"{{{tag[0]}: {tag[1]}, ...}}" if tag else "a section"
    if annotation is dict or get_origin(annotation) is dict:
        return "a mapping"
    return ", ".join([_PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation))), *_bounds(limits)])


def _union_args(annotation: Any) -> list[Any]:
    """The members of a union with what annotates each."""
    if len(members(annotation)) == 1:
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _union_args(get_args(annotation)[0])
    return [found for member in get_args(annotation) for found in _union_args(member)]


def _bounds(limits: tuple[Any, ...]) -> list[str]:
    found = []
    for mark in (inner for limit in limits for inner in (limit.metadata if isinstance(limit, FieldInfo) else (limit,))):
        for name, words in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            bound = getattr(mark, name, None)
            if bound is not None:
                found.append(f"{words} {bound:g}")
        if isinstance(mark, StringConstraints):
            found.append("letters, digits, dots, dashes and underscores")
    return found


def default_of(setting: Setting) -> str | None:
    """The default as it is written in a file; None for what has to be set."""
    value = setting.default
    return None if value is dataclasses.MISSING else written(TypeAdapter(Any).dump_python(value, mode="json"))


def is_section(setting: Setting) -> bool:
    """Whether a setting is a section, or a list of them, with keys of its own."""
    return bool(sections_of(setting.annotation))


def example_of(setting: Setting) -> str:
    """A value that the setting takes: another than the default where it is one of a few, else the default's like."""
    if setting.path in EXAMPLES:
        return EXAMPLES[setting.path]
    default = default_of(setting)
    known = None if default is None else yaml.safe_load(default)
    if default is not None and isinstance(known, int | float | list) and not isinstance(known, bool) and known != []:
        return default
    adapter = TypeAdapter(setting.annotation)
    for value in _candidates(setting.annotation, known):
        with contextlib.suppress(ValidationError):
            adapter.validate_python(value)
            if value != known:
                return written(value)
    return default or "..."


def _candidates(annotation: Any, default: Any) -> Iterator[Any]:
    """Values that a setting of this type may take, the most telling first."""
    for option in members(annotation):
        if get_origin(option) is Literal:
            yield from get_args(option)
        elif option is bool:
            yield not default
        elif option in (int, ByteSize):
            yield 8
        elif option is float:
            yield from (0.1, 0.5, 2.0)
        elif option is str:
            yield "NAME"
        elif get_origin(option) in (tuple, list):
            yield default
            item, *more = get_args(option)
            yield [2, 2, 6, 2]  # of four stages
            for value in _candidates(item, None):
                yield [value] * (1 + len([other for other in more if other is not Ellipsis]))
