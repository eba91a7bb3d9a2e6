"""Words for probes of encoders that learned from captions: class names and the sentences around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.files import parse_json

#: Around a class's name {}, averaged: some of the sentences of Radford et al. 2021.
TEMPLATES = ("{}", "a photo of {}.", "a picture of {}.", "a photo of the {}.", "a drawing of {}.")
_EXAMPLE = '{"templates": ["a photo of {}."], "names": {"n01440764": "tench"}}'


def read_prompts(path: Path) -> dict[str, Any]:
    """The settings of `zero_shot` that a JSON file says: `templates`, sentences with {} for the name of a class, and
    `names`, words for classes whose names in the data are none.

    Raises:
        ValueError: It is no such file.
    """
    try:
        said = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(said, dict) or not said or said.keys() - {"templates", "names"}:
        raise ValueError(f"{path} must be a JSON object with templates, names, or both, such as {_EXAMPLE}")
    templates, names = said.get("templates", list(TEMPLATES)), said.get("names", {})
    if not isinstance(templates, list) or not templates or any(not _is_template(one) for one in templates):
        raise ValueError(f"{path}: templates must be sentences with {{}} in them, such as {_EXAMPLE}")
    if not isinstance(names, dict) or any(not isinstance(word, str) or not word.strip() for word in names.values()):
        raise ValueError(f"{path}: names must say a word for each class, such as {_EXAMPLE}")
    return {"templates": tuple(templates), "names": tuple(sorted(names.items()))}


def _is_template(value: object) -> bool:
    return isinstance(value, str) and value.count("{}") == 1
