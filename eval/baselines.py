"""Results that many probes share, such as raw pixels' and untrained encoders', kept between commands."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Raise it when a change of the code changes results that no other part of the key tells apart.
VERSION = 1


def cached(key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON values `compute` gave for this `key` before, or gives now.

    Kept in $SELFSIGHT_CACHE/probes (~/.cache/selfsight/probes). A damaged entry, or one of another key, is computed
    anew; a cache that cannot be written is passed over.
    """
    key = json.loads(json.dumps({"version": VERSION, **key}))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    root = Path(os.environ.get("SELFSIGHT_CACHE") or Path.home() / ".cache" / "selfsight")
    path = root / "probes" / f"{digest[:32]}.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] == key:
            return entry["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value = compute()
    with suppress(OSError):
        write_json(path, {"key": key, "value": value})
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` so that a reader finds the whole file or the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(handle)
        Path(temporary).chmod(0o644)  # mkstemp's own is for the owner only
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
