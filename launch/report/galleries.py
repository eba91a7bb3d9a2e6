"""A run's pictures in rows, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from PIL import Image

from launch.report.markup import Html, element
from launch.report.pictures import Frame, frames_of, spread
from launch.report.read import Run
from pretrain.tracking.pictures import enlargement

_CAPTIONS = {
    "crops": "what the loader gave in that step",
    "reconstructions": "image, what the network was given, what it made of it",
    "segmentation": "val images with the worst and with the middle IoU of a linear layer on frozen patches, under the "
    "colours of the classes: of the true mask, of the linear layer, of the nearest patches of train",
    "neighbours": "each image on the left, then those that the encoder finds most like it",
}


def galleries(runs: Sequence[Run], budget: int, problems: list[str]) -> Html | None:
    """Pictures over the steps; of several runs, the last of each."""
    wanted = [(run, name, steps) for run in runs for name, steps in sorted(run.pictures.items(), key=_crops_last)]
    if len(runs) > 1:
        wanted = [(run, name, spread(steps, 1)) for run, name, steps in wanted]
    shown = []
    for run, name, steps in wanted:
        height, columns = _layout(run, name)
        frames = frames_of(steps, budget // len(wanted), problems, height)
        if not frames:
            continue
        words = name.replace("-", " ")
        label = f"{run.name}: {words}" if len(runs) > 1 else words
        images = [_figure(frame, label, columns) for frame in frames]
        caption = _CAPTIONS.get(name)
        left_out = len(steps) - len(frames)
        notes = [caption] if caption else []
        notes += [f"{left_out} more in pictures/"] if left_out and len(runs) == 1 else []
        shown.append(
            element(
                "article",
                element("h3", label),
                element("p", "; ".join(notes), class_="note") if notes else None,
                element("div", *images, class_="strip", tabindex=0, role="group", aria_label=f"{label} over the steps"),
                class_="gallery",
            )
        )
    return element("div", *shown, class_="galleries side" if len(runs) > 1 else "galleries") if shown else None


def _figure(frame: Frame, label: str, columns: Sequence[tuple[str, int]]) -> Html:
    """A step's blocks of pictures, each under the headings of its columns, where these make up its width."""
    heads = None
    if frame.width == sum(width for _, width in columns):
        shares = " ".join(f"{width}fr" for _, width in columns)
        cells = [element("span", name) for name, _ in columns]
        heads = element("div", *cells, class_="heads", style=f"grid-template-columns: {shares}", aria_hidden="true")
    blocks = [
        element(
            "div",
            heads,
            element("img", src=uri, alt=f"{label} at step {frame.step:,}", width=width, height=height),
            class_="block",
        )
        for uri, width, height in frame.blocks
    ]
    caption = element("figcaption", f"step {frame.step:,}")
    return element("figure", caption, element("div", *blocks, class_="blocks"), data_step=frame.step)


def _layout(run: Run, name: str) -> tuple[int | None, list[tuple[str, int]]]:
    """Of a sheet as training draws it, the height of a row, and its columns' headings and widths in px."""
    if name in ("neighbours", "segmentation"):  # drawn by `selfsight neighbours` and probes, not while it trains
        return None, []
    crops, local = run.setting("views", "global_crops"), run.setting("views", "local_crops")
    try:
        height, width = map(int, crops[0]["size"])
        factor = enlargement(height)
        row, each = factor * height, factor * width
        if name.startswith("crops"):
            heads = [(f"global {number}", each) for number in range(1, len(crops) + 1)]
            if local:
                heads += [(f"local {number}", factor * local["size"][1]) for number in range(1, local["count"] + 1)]
        elif name.startswith("attention"):
            heads = [("image", each), ("mean of heads", each)]
            heads += [(f"head {number}", each) for number in range(1, _num_heads(run) + 1)]
        elif name.startswith("tokens"):
            heads = [("image", each), ("main directions", each)]
        else:
            heads = [(words, each) for words in ("image", "masked", "output")]
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError):
        return None, []
    return row, heads


def _num_heads(run: Run) -> int:
    """Heads that are drawn: all of them, up to a number, by the width of the last picture of attention."""
    crop = run.setting("views", "global_crops")[0]["size"]
    path = next(steps[-1][1] for name, steps in run.pictures.items() if name.startswith("attention"))
    with suppress(OSError), Image.open(path, formats=["PNG"]) as picture:
        return picture.width // (enlargement(crop[0]) * crop[1]) - 2
    return 0


def _crops_last(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] == "crops", item[0]
