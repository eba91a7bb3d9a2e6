"""Results that many probes share, such as raw pixels' and untrained encoders', kept between commands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipelines.files import write_json

#: Raise it when a change of the code changes results that no other part of the key tells apart.
VERSION = 2


def cached(key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON values `compute` gave for this `key` before, or gives now.

    Kept in $SELFSIGHT_CACHE/probes (~/.cache/selfsight/probes). A damaged entry, or one of another key, is computed
    anew; a cache that cannot be written is passed over.
    """
    libraries = {name: version(name) for name in ("torch", "timm", "pillow")}  # any of them may change the numbers
    key = json.loads(json.dumps({"version": VERSION, "libraries": libraries, **key}))
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "value": value})
    return value
