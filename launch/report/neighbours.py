"""The page of `selfsight neighbours`: queries, what is nearest to them, and what nothing is near to, in pictures."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from PIL import Image

from launch.report.markup import Html, element, escape, joined

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
_STYLE = """
.near { display: flex; flex-wrap: wrap; gap: .5rem; margin: .4rem 0 1rem; align-items: flex-start; }
.near figure { margin: 0; width: 7rem; }
.near img { display: block; width: 7rem; height: 7rem; object-fit: contain; border-radius: 4px;
  border: 3px solid var(--rule); image-rendering: pixelated; background: var(--grid); }
.near .asked { margin-right: .9rem; } .near .asked img { border-color: var(--ink); }
.near .same img { border-color: var(--good); } .near .other img { border-color: var(--c1); }
.near figcaption { font-size: .72rem; color: var(--muted); overflow-wrap: anywhere; line-height: 1.25; }
"""


class Shown(NamedTuple):
    """An image on the page. label: in words, or empty. number: a similarity, or None."""

    picture: Image.Image
    key: str
    label: str = ""
    number: float | None = None


def page(
    title: str,
    lead: Sequence[str],
    queries: Sequence[tuple[Shown, Sequence[Shown]]],
    untypical: Sequence[Shown],
    notes: Sequence[str] = (),
) -> str:
    """The whole page as text; it asks nobody for anything."""
    rows = [
        element("div", _figure(query, "asked"), *(_figure(each, _kind(query, each)) for each in near), class_="near")
        for query, near in queries
    ]
    parts = [
        element("header", element("h1", title), *(element("p", line, class_="lead") for line in lead)),
        element("section", element("h2", "Queries and what is nearest to them"), *rows),
    ]
    if untypical:
        drawn = element("div", *(_figure(each, "") for each in untypical), class_="near")
        note = element("p", "farthest first, with their mean similarity to the nearest others", class_="note")
        parts.append(element("section", element("h2", "Least typical"), note, drawn))
    if notes:
        parts.append(element("ul", *(element("li", line) for line in notes), class_="notes"))
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    parts.append(element("footer", f"Written by selfsight neighbours at {written}. This file needs no network."))
    style = Html(files("launch.report").joinpath("assets", "report.css").read_text(encoding="utf-8") + _STYLE)
    head = joined(
        [
            element("meta", charset="utf-8"),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'),
            element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            element("title", f"{title} · selfsight"),
            element("style", style),
        ]
    )
    return f"<!doctype html>\n{element('html', element('head', head), element('body', *parts), lang='en')}\n"


def sheet(queries: Sequence[tuple[Shown, Sequence[Shown]]], side: int = 96, gap: int = 4) -> Image.Image:
    """A row a query, itself first: what the report shows among a run's pictures."""
    across = 1 + max(len(near) for _, near in queries)
    drawn = Image.new("RGB", (across * (side + gap) + gap, len(queries) * (side + gap)), (255, 255, 255))
    for row, (query, near) in enumerate(queries):
        for place, each in enumerate((query, *near)):
            picture = each.picture.resize((side, side), _filter(each.picture, side))
            drawn.paste(picture, (place * (side + gap) + (gap if place else 0), row * (side + gap)))
    return drawn


def _kind(query: Shown, each: Shown) -> str:
    if not query.label or not each.label:
        return ""
    return "same" if query.label == each.label else "other"


def _figure(each: Shown, kind: str) -> Html:
    lines = [element("div", each.label or each.key)]
    if each.number is not None:
        lines.append(element("div", f"{each.number:.3f}"))
    words = f"{each.key}{f', {each.label}' if each.label else ''}"
    image = element("img", src=_uri(each.picture), alt=words, title=words)
    return element("figure", image, element("figcaption", *lines), class_=kind or None)


def _uri(picture: Image.Image, side: int = 112) -> str:
    """Small enough for a page of hundreds."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    kind, options = ("PNG", {"optimize": True}) if max(picture.size) <= 48 else ("JPEG", {"quality": 85})
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _filter(picture: Image.Image, side: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if max(picture.size) < side else Image.Resampling.LANCZOS
