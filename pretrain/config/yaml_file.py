"""YAML as this project reads it: no key twice, nothing endless, and what takes text stays text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.config.annotations import element_of, hints_of, section_of, sections_of, takes_only_text
from pretrain.config.errors import ConfigError

MOST_VALUES = 100_000  # of one file
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key written twice, which YAML would let the last one win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise ConfigError(f"{mark.name}: {key!r} is set twice, again in line {mark.line + 1}")
            seen.add(key)
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep)


def parse_yaml(source: Any, annotations: Sequence[Any] = ()) -> Any:
    """The value of a YAML text or open file; where one of `annotations` takes only text, `on` and `1e3` are text.

    Raises yaml.YAMLError.
    """
    loader = _Loader(source)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, annotations, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read_yaml(path: Path, may_be_empty: bool = False, annotation: Any = None) -> dict[str, Any]:
    """The mapping that a YAML file holds, for a section of type `annotation` where that is given.

    Raises ConfigError for anything else than a mapping, and for a key that is there twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            data = parse_yaml(file, () if annotation is None else (annotation,))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if data is None and may_be_empty:  # a file of comments
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; a configuration is a mapping of sections")
    _count_values(data, path, {})
    return data


def _keep_text(node: yaml.Node, annotations: Sequence[Any], seen: set[int]) -> None:
    """Mark the plain values of settings that take only text as text, before YAML's rules make others of them."""
    if not annotations or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        texts = all(takes_only_text(annotation) or _lists_text(annotation) for annotation in annotations)
        if texts and node.tag != _NULL:
            node.tag = _TEXT
    elif isinstance(node, yaml.SequenceNode):
        elements = [element for annotation in annotations if (element := element_of(annotation)) is not None]
        for item in node.value:
            _keep_text(item, elements, seen)
    elif isinstance(node, yaml.MappingNode):
        plain = {key.value: value.value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        sections = []
        for annotation in annotations:
            section = section_of(annotation, plain)
            sections += [section] if section else sections_of(annotation)
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            _keep_text(value, [hints_of(section)[name] for section in sections if name in hints_of(section)], seen)


def _lists_text(annotation: Any) -> bool:
    """Whether a setting takes a list of texts; one by itself is refused, but as it was written."""
    element = element_of(annotation)
    return element is not None and takes_only_text(element)


def _count_values(node: Any, path: Path, counts: dict[int, int | None]) -> int:
    """Values of a file with each alias counted where it stands, which a few lines can make billions of."""
    if not isinstance(node, (dict, list)):
        return 1
    known = counts.get(id(node), 0)
    if known is None:
        raise ConfigError(f"{path} holds a YAML alias that contains itself")
    if not known:
        counts[id(node)] = None
        items = node.values() if isinstance(node, dict) else node
        known = 1 + sum(_count_values(item, path, counts) for item in items)
        if known > MOST_VALUES:
            raise ConfigError(f"{path} holds more than {MOST_VALUES:,} values, its YAML aliases written out")
        counts[id(node)] = known
    return known
