"""What a fine-tuned run has reached on its held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.report.confused import matrix
from launch.report.markup import Html, element, table
from launch.report.read import NO_RESULTS, Run

_WORDS = {
    "top1": "top-1", "top5": "top-5", "map": "mAP", "r2": "R2", "mae": "mean absolute error", "loss": "loss",
    "balanced_accuracy": "balanced accuracy", "miou": "mIoU", "pixel_accuracy": "pixels right",
}  # fmt: skip
_SHARES = ("top1", "top5", "map", "balanced_accuracy", "miou", "pixel_accuracy")
_ROWS = {"val": "last step's weights", "ema": "averaged weights"}


def finetuned(run: Run, problems: list[str]) -> Html | None:
    """The last measurement of the run, with errors; None where it has none."""
    if not run.finetuned:
        return None
    name, results = run.finetuned[-1]
    try:
        return _article(results)
    except NO_RESULTS as error:
        problems.append(f"eval/{name} is not what fine-tuning writes in this version ({error!r})")
        return None


def _article(results: dict[str, Any]) -> Html:
    networks: dict[str, dict[str, Any]] = results["networks"]
    known = [score for score in _WORDS if any(isinstance(each.get(score), float) for each in networks.values())]
    rows = [("without looking", *(_told(results["chance"] if s == results["headline"] else None, s) for s in known))]
    rows += [
        (
            _ROWS.get(name, name),
            *(_told(each.get(score), score, each.get(f"{score}_standard_error")) for score in known),
        )
        for name, each in networks.items()
    ]
    last = list(networks.values())[-1]
    return element(
        "article",
        element("h3", f"Step {results['step']:,}, on {last['images']:,} images of {results['held_out']['name']}"),
        table(["", *(_WORDS[score] for score in known)], rows),
        matrix({"confusion": last.get("confusion")}, {"data": {"classes": results["classes"]}}),
        element("ul", *(element("li", note) for note in _notes(results)), class_="notes"),
    )


def _told(value: Any, score: str, error: Any = None) -> str:
    """`83.1 ± 0.4` of a share, in percent."""
    if not isinstance(value, float | int):
        return ""
    factor, digits = (100, 1) if score in _SHARES else (1, 3)
    sure = f" ± {factor * error:.{digits}f}" if isinstance(error, float) else ""
    return f"{factor * value:.{digits}f}{sure}"


def _notes(results: dict[str, Any]) -> Iterator[str]:
    yield "± is one standard error over the held-out images"
    best = results.get("best")
    if best is not None:
        score = _told(best["score"], results["headline"])
        yield (
            f"the best weights, of step {best['step']:,} ({score}), are in best/; they were chosen on these images, so "
            "their number flatters"
        )
    rare = results.get("rare_classes")
    if rare:
        yield "fewer than ten images to learn from: " + ", ".join(
            f"{name} ({n})" for name, n in list(rare.items())[:20]
        )
