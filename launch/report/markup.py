"""HTML from values: whatever is not markup already is escaped, so that no name or log line becomes code."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from markupsafe import Markup

_VOID = ("img", "input", "meta", "br")


#: Text that is markup; jinja, too, leaves it as it is.
Html = Markup


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name ...>children</name>`; `class_` is class, `data_x` is data-x; None and False leave an attribute out."""
    given = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        given += f" {key}" if value is True else f' {key}="{escape(value)}"'
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[Any]) -> Html:
    """Markup as it is, other values as text; None is nothing."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def shown(value: Any) -> str:
    """A value as text that a page may hold: lone surrogates and control characters become a replacement character."""
    text = "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in str(value))
    return text.encode("utf-8", "replace").decode("utf-8")


def escape(value: Any) -> str:
    """Text for inside of elements and attributes."""
    return html.escape(shown(value), quote=True)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "", numbers: bool = True) -> Html:
    """A table; with `numbers`, all columns but the first are set flush right."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = (
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    )
    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else None,
            element("thead", head),
            element("tbody", *body),
            class_="numbers" if numbers else None,
        ),
        class_="scroll",
    )


def data(value: Any, **attributes: Any) -> Html:
    """Values for a script, which reads them as text: nothing in them can end the element or start another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", Html(text), type="application/json", **attributes)
