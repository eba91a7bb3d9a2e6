"""The kit's results in Markdown."""

from __future__ import annotations

from typing import Any

SPEED = {
    "images_per_second": ("images/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "teraflops": ("TFLOP/s", "{:,.3g}"),
    "memory_gb": ("GB", "{:.1f}"),
    "forward_share": ("forward", "{:.0%}"),
    "backward_share": ("backward", "{:.0%}"),
    "optimizer_share": ("optimizer", "{:.0%}"),
    "average_share": ("average", "{:.0%}"),
}


def markdown(whole: dict[str, Any]) -> str:
    """The tables of a results.json."""
    about, parts = whole["machine"], whole["parts"]
    lines = [
        "# What was measured on a GPU"
        if not whole["rehearsed"]
        else "# A rehearsal on the CPU: its numbers say nothing",
        "",
        f"{about['device']}, {about['cores']} cores, torch {about['torch']}, CUDA {about['cuda']}; "
        f"{about['seconds']:.0f} s in all (`python tests/gpu/kit.py`).",
        "",
        "| part | status | seconds | why |",
        "| --- | --- | ---: | --- |",
        *(f"| {name} | {p['status']} | {p['seconds']:.0f} | {_cell(p.get('why', ''))} |" for name, p in parts.items()),
    ]
    speeds = {name.removeprefix("speed "): p["found"] for name, p in parts.items() if name.startswith("speed ")}
    if speeds:
        heads = [head for head, _ in SPEED.values()]
        lines += ["", f"| training step | batch | {' | '.join(heads)} |", "| --- " + "| ---: " * (len(heads) + 1) + "|"]
        for name, found in speeds.items():
            cells = [form.format(found[key]) if key in found else "" for key, (_, form) in SPEED.items()]
            lines.append(f"| {name} | {found.get('batch', '')} | {' | '.join(cells)} |")
    for name, part in parts.items():
        if part["found"] and not name.startswith("speed "):
            lines += ["", f"| {name} | |", "| --- | --- |"]
            lines += [f"| {key} | {_cell(_word(value))} |" for key, value in part["found"].items()]
    return "\n".join(lines) + "\n"


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]
