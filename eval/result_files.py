"""Result files of `selfsight probe`: read, and found again for an encoder and data (imports no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.earlier import as_today


def read_result(path: Path) -> dict[str, Any]:
    """A file's result in today's form; FileNotFoundError where there is none, ValueError for what is none."""
    try:
        found = as_today(json.loads(path.read_text(encoding="utf-8")))
        _ = found["target"]["step"], found["data"]["val"]["checksum"], found["rows"]["pretrained"], found["columns"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no result of `selfsight probe` ({error!r}); name a file of eval/, a run or an encoder"
        ) from error
    return found


def results_for(
    paths: Iterable[Path],
    train: str,
    val: str,
    label: str | None,
    group_by: str | None = None,
    image_size: int | None = None,
) -> list[Path]:
    """Those files that hold a result of whole crops of data of these checksums with that label, oldest first; with
    outcomes beside.

    `group_by` and `image_size` matter where they are given.
    """
    found = []
    for path in paths:
        try:
            result = read_result(path)
        except (OSError, ValueError):
            continue
        data = result["data"]
        if (data["train"]["checksum"], data["val"]["checksum"], data.get("label")) != (train, val, label):
            continue
        if group_by is not None and data.get("group_by") != group_by:
            continue
        if result["target"].get("window") is not None or result["target"].get("native"):  # of what is seen otherwise
            continue
        if image_size is not None and result["target"]["image_size"] != image_size:
            continue
        if path.with_suffix(".npz").is_file():
            found.append((str(result.get("started", "")), path))
    return [path for _, path in sorted(found)]


def missing(paths: Iterable[Path], asked: Mapping[str, Any], probes: Iterable[str]) -> list[str]:
    """Those of `probes` that none of these results has with the settings and seeds of the protocol `asked`."""
    known: set[str] = set()
    for path in paths:
        result = read_result(path)
        protocol = result["protocol"]
        if all(protocol.get(name) == asked.get(name) for name in ("seeds", "last_blocks", "labels")):
            known |= {
                name for name in result["rows"]["pretrained"] if name in protocol and protocol[name] == asked.get(name)
            }
    return [name for name in probes if name not in known]
