"""The layouts of checkpoints that the families read, by name, and as their keys tell them."""

from __future__ import annotations

import re
from pkgutil import resolve_name

from pretrain.encoders.envelopes import ENVELOPES, named, opened
from pretrain.encoders.layouts import CheckpointState, Imported, recognised
from pretrain.encoders.registry import FAMILIES


def layouts() -> list[str]:
    """The names of all layouts, as `selfsight import --as` takes them."""
    return list(dict.fromkeys([*(name for spec in FAMILIES.values() for name in spec.layouts), *ENVELOPES]))


def recognised_layout(state: CheckpointState) -> str:
    """The one layout that `state` is of, by its signs; ValueError, naming the possible ones, where they do not tell."""
    sure = recognised(state)
    known = {layout.read for spec in FAMILIES.values() for name, layout in spec.layouts.items() if name in sure}
    if len(sure) == 1 or len(known) == 1:
        state.notes.append(f"read as {sure[0]}, whose names its keys have")
        return sure[0]
    if sure:
        raise ValueError(
            f"its keys may be of several layouts; name one: {' or '.join(f'--as {name}' for name in sure)}"
        )
    raise ValueError(
        f"its keys, which begin with {', '.join(list(state.tensors)[:4])}, do not tell its layout; name one: --as "
        f"takes one of {', '.join(layouts())}"
    )


def _bare(state: CheckpointState) -> None:
    """Take off what frameworks call a model of timm's within their own, and leave out what is around it."""
    if any(key.startswith("visual.trunk.") for key in state.tensors):  # OpenCLIP's
        state.keep("visual.trunk.", "not of the image encoder")
    state.left |= dict.fromkeys(state.backbone(), "not of the backbone")
    if all(key.startswith("model.") for key in state.tensors):
        state.drop_prefix("model.")


def read_layout(name: str, state: CheckpointState) -> Imported:
    """What `state` holds in the layout `name`, by the family whose marks its keys bear.

    Raises ValueError for a key that is missing and for a layout whose signs tell that it is another's, pydantic's
    ValidationError where the weights tell of no such encoder.
    """
    sure = recognised(state)
    if name in ENVELOPES:
        inner, heads = opened(name, state)
        return named(read_layout(inner, state), heads, ENVELOPES[name].title)
    readers = [spec.layouts[name] for spec in FAMILIES.values() if name in spec.layouts]
    if not readers:
        raise ValueError(f"there is no layout {name!r}; --as takes one of {', '.join(layouts())}")
    if sure and name not in sure:
        raise ValueError(f"this looks like another layout than {name}: {' or '.join(f'--as {each}' for each in sure)}")
    if name == "timm":
        _bare(state)
    marked = [found for found in readers if found.marks and any(re.search(found.marks, key) for key in state.tensors)]
    return resolve_name((marked or [found for found in readers if not found.marks] or readers)[0].read)(state)
