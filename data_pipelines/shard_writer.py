"""One shard, written so that the same images always give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tarfile import BLOCKSIZE, USTAR_FORMAT, TarInfo
from threading import Event
from typing import Any

from data_pipelines.decode import DAMAGE, look, reason_of
from data_pipelines.files import atomic_write
from data_pipelines.scan import Item


def write_shard(root: Path, shard: Path, items: list[Item], stop: Event, advance: Callable[[], None]) -> dict[str, Any]:
    """Write one shard, whole or not at all; what cannot be opened as an image is left out.

    Args:
        root: Of the tree.
        shard: The tar to be.
        items: Its images in order.
        stop: Once set, give up.
        advance: Called once an image.

    Returns:
        What is in it, for JSON: samples, bytes, sha256; how often each size, mode and label; the skipped.

    Raises:
        InterruptedError: `stop` was set.
        OSError: An image cannot be read, or changed since the tree was scanned.
    """
    digest, written = sha256(), 0
    sizes: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    labels: Counter[int] = Counter()
    skipped: list[dict[str, str]] = []
    with atomic_write(shard) as file:

        def put(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        for item in items:
            advance()
            if stop.is_set():
                raise InterruptedError(f"{shard} is left unfinished; another one failed, or the pack was interrupted")
            content = _read(root / item.path, item.size)
            try:
                header = look(content)
            except DAMAGE as error:
                skipped.append({"path": item.path, "reason": reason_of(error)})
                continue
            put(_member(f"{item.key}.{item.path.rpartition('.')[2].lower()}", content))
            if item.label is not None:
                put(_member(f"{item.key}.cls", str(item.label).encode()))
                labels[item.label] += 1
            if item.json_size is not None:
                sidecar = (root / item.path).with_suffix(".json")
                put(_member(f"{item.key}.json", _read(sidecar, item.json_size)))
            sizes[f"{header.width}x{header.height}"] += 1
            modes[header.mode] += 1
            written += 1
        put(bytes(2 * BLOCKSIZE))
        num_bytes = file.tell()
    return {
        "samples": written,
        "bytes": num_bytes,
        "sha256": digest.hexdigest(),
        "sizes": sizes,
        "modes": modes,
        "labels": {str(label): count for label, count in labels.items()},
        "skipped": skipped,
    }


def _member(name: str, content: bytes) -> bytes:
    """A tar member with nothing in it that depends on the day or the user."""
    info = TarInfo(name)
    info.size = len(content)
    return info.tobuf(USTAR_FORMAT) + content + bytes(-len(content) % BLOCKSIZE)


def _read(path: Path, size: int) -> bytes:
    content = path.read_bytes()
    if len(content) != size:
        raise OSError(f"{path} had {size} bytes and has {len(content)} now; pack when nothing writes to the images")
    return content
