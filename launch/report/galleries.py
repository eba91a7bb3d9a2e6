"""A run's pictures in rows, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.report.markup import Html, element
from launch.report.pictures import frames_of, spread
from launch.report.read import Run

_CAPTIONS = {
    "crops": "what the loader gave in that step",
    "reconstructions": "image, what the network was given, what it made of it",
}


def galleries(runs: Sequence[Run], budget: int, problems: list[str]) -> Html | None:
    """Pictures over the steps; of several runs, the last of each."""
    wanted = [(run, name, steps) for run in runs for name, steps in sorted(run.pictures.items(), key=_crops_last)]
    if len(runs) > 1:
        wanted = [(run, name, spread(steps, 1)) for run, name, steps in wanted]
    shown = []
    for run, name, steps in wanted:
        frames = frames_of(steps, budget // len(wanted), problems)
        if not frames:
            continue
        words = name.replace("-", " ")
        label = f"{run.name}: {words}" if len(runs) > 1 else words
        images = [
            element(
                "figure",
                element(
                    "img", src=frame.uri, alt=f"{label} at step {frame.step:,}", width=frame.width, height=frame.height
                ),
                element("figcaption", f"step {frame.step:,}"),
                data_step=frame.step,
            )
            for frame in frames
        ]
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


def _crops_last(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] == "crops", item[0]
