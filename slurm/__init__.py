"""Batch script templates for SLURM, shipped as package data."""

from __future__ import annotations

from importlib.resources import files


def template(name: str) -> str:
    """The text of `slurm/NAME.sbatch`. Raises ValueError for a name that is not a template, naming those that are."""
    names = sorted(
        item.name.removesuffix(".sbatch") for item in files(__name__).iterdir() if item.name.endswith(".sbatch")
    )
    if name not in names:
        raise ValueError(f"there is no template {name!r}; templates: {', '.join(names)}")
    return files(__name__).joinpath(f"{name}.sbatch").read_text(encoding="utf-8")
