"""What users name: images that are to be packed, or shards (imports nothing: asked before anything is refused)."""

from __future__ import annotations

from pathlib import Path

_TABLES = (".csv", ".tsv", ".parquet", ".arrow")


def holds_images(spec: str | Path) -> bool:
    """Whether `spec` names images that are to be packed, rather than shards, or nothing that is there."""
    if "://" in str(spec):
        return False
    path = Path(spec).expanduser()
    if path.is_dir():
        return not any(path.glob("*.tar"))
    return path.name.lower().endswith(_TABLES) and (path.is_file() or any(letter in str(spec) for letter in "*?[{"))
