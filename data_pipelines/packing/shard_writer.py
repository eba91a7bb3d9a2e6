"""One shard, written so that the same images always give the same bytes."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tarfile import BLOCKSIZE, USTAR_FORMAT, TarInfo
from threading import Event, Lock
from typing import Any

import numpy as np

from data_pipelines.files import atomic_write
from data_pipelines.images.decode import DAMAGE, reason_of
from data_pipelines.images.issues import shown
from data_pipelines.images.pixels import UnusableImageError
from data_pipelines.packing.listing import GROUP_KEY
from data_pipelines.packing.map_folders import NOTHING_BESIDE, Beside, MapCount, MapFolder, maps_of
from data_pipelines.packing.reencode import Prepared, Reencoding, prepare
from data_pipelines.packing.scan import Catalogue
from data_pipelines.packing.sources.base import Content
from data_pipelines.shards.index import NO_LABEL


@dataclass
class Workshop:
    """What the shards of one pack share: where the images come from, who prepares them, and when to stop.

    Args:
        catalogue: What is packed.
        pool: Threads that read images and prepare them.
        in_flight: Images that a shard has under way at a time.
        reencoding: See `prepare`.
        decode_all: See `prepare`.
        refuse: Stop at an unusable image, instead of leaving it out.
        advance: Called for every image with the bytes that were read, by any thread.
        map_folders: Where masks and depths lie that are not beside their images.
    """

    catalogue: Catalogue
    pool: ThreadPoolExecutor
    in_flight: int
    reencoding: Reencoding | None
    decode_all: bool
    refuse: bool
    advance: Callable[[int], None]
    map_folders: tuple[MapFolder, ...] = ()
    stop: Event = field(default_factory=Event)
    refused: list[dict[str, str]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True)
class _Image:
    """One entry, ready to be written; `prepared` None: it cannot be used, for that reason."""

    number: int
    prepared: Prepared | None
    reason: str
    json: bytes | None
    num_read: int
    beside: Beside = NOTHING_BESIDE
    frames: tuple[Prepared, ...] = ()  # of a stack, of which `prepared` is the first


def write_shard(shop: Workshop, shard: Path, numbers: np.ndarray) -> dict[str, Any]:
    """Write one shard, whole or not at all; what cannot be opened as an image is left out.

    Args:
        shop: Of the pack.
        shard: The tar to be.
        numbers: Its entries in order.

    Returns:
        What is in it, for JSON: samples, bytes, sha256; how often each size, mode, label and outcome of
        re-encoding; bytes of the images before and after; the skipped; of how many images there are maps.

    Raises:
        InterruptedError: The pack was told to stop; if for unusable images, they are in `shop.refused`.
        OSError: An image cannot be read, or changed since it was listed.
    """
    listing, labels = shop.catalogue.source.listing, shop.catalogue.labels
    digest, num_samples, num_read, num_kept = sha256(), 0, 0, 0
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("sizes", "modes", "labels", "outcomes")}
    skipped: list[dict[str, str]] = []
    map_count = MapCount()
    with atomic_write(shard) as file:

        def put(content: bytes) -> None:
            file.write(content)
            digest.update(content)

        for image in _prepared(shop, numbers):
            shop.advance(image.num_read)
            path = listing.entry(image.number).path
            bad = [image.reason] if image.prepared is None else [*image.beside.refused.values()]
            if bad and shop.refuse:
                with shop.lock:
                    shop.refused += [{"path": path, "reason": reason} for reason in bad]
                shop.stop.set()
            if image.prepared is None:
                skipped.append({"path": path, "reason": image.reason})
                continue
            map_count.add(path, image.beside)
            key, label = listing.key(image.number), int(labels[image.number])
            if image.frames:
                digits = max(3, len(str(len(image.frames) - 1)))
                for place, frame in enumerate(image.frames):
                    put(_member(f"{key}.{place:0{digits}}.{frame.suffix}", frame.content))
            else:
                put(_member(f"{key}.{image.prepared.suffix}", image.prepared.content))
            if label != NO_LABEL:
                put(_member(f"{key}.cls", str(label).encode()))
                counts["labels"][str(label)] += 1
            if image.json is not None:
                put(_member(f"{key}.json", image.json))
            for suffix, content in image.beside.maps.values():
                put(_member(f"{key}.{suffix}", content))
            counts["sizes"][f"{image.prepared.width}x{image.prepared.height}"] += 1
            counts["modes"][image.prepared.mode] += 1
            counts["outcomes"][image.prepared.outcome] += 1
            num_samples += 1
            num_read += image.num_read
            num_kept += sum(len(frame.content) for frame in image.frames or (image.prepared,))
        if shop.stop.is_set():
            raise InterruptedError(f"{shard} is left unfinished; another one failed, or the pack was interrupted")
        put(bytes(2 * BLOCKSIZE))
        num_bytes = file.tell()
    return {
        "samples": num_samples,
        "bytes": num_bytes,
        "sha256": digest.hexdigest(),
        **counts,
        "bytes_before": num_read,
        "bytes_after": num_kept,
        "skipped": skipped,
        "maps": map_count.as_json(),
    }


def _prepared(shop: Workshop, numbers: np.ndarray) -> Iterator[_Image]:
    """The images in order, a bounded number of them under way; once told to stop, only what is under way."""
    contents = shop.catalogue.source.contents(numbers.tolist())
    pending: deque[Future[_Image]] = deque()
    places = iter(numbers.tolist())
    try:
        while True:
            while (
                len(pending) < shop.in_flight and not shop.stop.is_set() and (number := next(places, None)) is not None
            ):
                pending.append(shop.pool.submit(_prepare, shop, number, next(contents)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _prepare(shop: Workshop, number: int, read: Callable[[], Content]) -> _Image:
    try:
        content = read()
    except UnusableImageError as error:
        return _Image(number, None, reason_of(error), None, 0)
    try:
        prepared = prepare(content.image, shop.reencoding, shop.decode_all)
    except DAMAGE as error:
        return _Image(number, None, reason_of(error), None, len(content.image))
    if content.frames:
        return _prepare_stack(shop, number, content)
    path = shop.catalogue.source.listing.entry(number).path
    beside = maps_of(path, content.image, prepared, content.maps, shop.map_folders)
    return _Image(number, prepared, "", _with_group(shop, number, content.json), len(content.image), beside)


def _prepare_stack(shop: Workshop, number: int, content: Content) -> _Image:
    """Every frame as an image is; one that cannot be used, or is of another size, leaves the stack out."""
    num_read, json = sum(map(len, content.frames)), _with_group(shop, number, content.json)
    made: list[Prepared] = []
    for place, frame in enumerate(content.frames):
        try:
            made.append(prepare(frame, shop.reencoding, shop.decode_all))
        except DAMAGE as error:
            reason = f"frame {place} of {len(content.frames)}: {reason_of(error)}"
            return _Image(number, None, reason, None, num_read)
        if (made[-1].width, made[-1].height) != (made[0].width, made[0].height):
            size = f"{made[-1].width}x{made[-1].height} px, and the first {made[0].width}x{made[0].height}"
            return _Image(number, None, f"frame {place} of {len(content.frames)} has {size}", None, num_read)
    return _Image(number, made[0], "", json, num_read, frames=tuple(made))


def _with_group(shop: Workshop, number: int, stored: bytes | None) -> bytes | None:
    """The json of an image, with its group where that was found in the path; a table has it in a column."""
    source = shop.catalogue.source
    group = source.memberships[source.listing.membership_numbers[number]].group
    if group is None or not source.listing.finds_groups:
        return stored
    try:
        known = json.loads(stored) if stored else {}
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or known.get(GROUP_KEY, group) != group:
        raise ValueError(
            f"{shown(source.listing.entry(number).path)}: the .json beside it "
            + (f"says {GROUP_KEY}: {known[GROUP_KEY]!r}" if isinstance(known, dict) else "is no JSON object")
            + f", and {GROUP_KEY} {group!r} is to be written there; mend or move away the .json"
        )
    return json.dumps({**known, GROUP_KEY: group}).encode()


def _member(name: str, content: bytes) -> bytes:
    """A tar member with nothing in it that depends on the day or the user."""
    info = TarInfo(name)
    info.size = len(content)
    return info.tobuf(USTAR_FORMAT) + content + bytes(-len(content) % BLOCKSIZE)
