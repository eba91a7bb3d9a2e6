"""What is held back of images that are packed (imports nothing: command lines have it in their signatures)."""

from __future__ import annotations

from typing import NamedTuple


class Grouping(NamedTuple):
    """What is held back of images that have no val of their own, and what must not be divided by that."""

    val_share: float = 0.0
    group_pattern: str | None = None
    group_column: str | None = None


NO_GROUPS = Grouping()
