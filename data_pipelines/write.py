"""A folder of images to shards in WebDataset's format, with their indexes and a `dataset.json`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from tarfile import BLOCKSIZE
from threading import Event
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.describe import describe
from data_pipelines.files import TEMPORARY_SUFFIX, lock, read_json, write_json
from data_pipelines.scan import Item, scan
from data_pipelines.shard_index import INDEX_SUFFIX, load_index
from data_pipelines.shard_writer import write_shard
from data_pipelines.streams import Purpose, random_bits, stream_key

_WORK = ".pack"  # in the folder of shards while a pack is under way: its plan, and a receipt for every finished shard
_DOOMED = "doomed.json"  # in it: shards whose removal has begun
_SHARD_NAME = re.compile(r"[^/.][^/]*-[0-9]{6}\.tar")
_MAX_SHOWN = 10  # skipped images on the screen


def pack(
    images: Path,
    out: Path,
    *,
    split: str = "train",
    val_share: float = 0.0,
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 512 << 20,
    seed: int = 0,
    workers: int | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the images of a tree into shuffled shards `{split}-{number:06d}.tar`; what a tree may be, says `scan`.

    The bytes of every image are kept as they are. The same tree, seed and sizes give the same shards to the
    byte. Every shard appears whole or not at all; `dataset.json` comes last. After a kill, the same call
    goes on where it stopped. Images whose header cannot be read are skipped, counted and listed.

    Args:
        images: The tree.
        out: Folder of the shards; made if missing.
        split: Name of the images' split, where the tree has none of its own.
        val_share: Share of every class to hold back as split `val`.
        samples_per_shard: At most; shards of a split are of equal length (to one).
        bytes_per_shard: About, of a shard.
        seed: Of the shuffle and of what is held back.
        workers: Shards written at a time; default: the cores this process may use, up to 8.
        metadata: Further facts for `dataset.json`, such as source and licence.
        overwrite: Remove what an earlier pack wrote into `out`.
        progress: Show a bar.

    Returns:
        What `dataset.json` holds.

    Raises:
        FileExistsError: `out` holds another pack, or shards of other origin.
        OSError: Too little space, or a file that cannot be read or changed meanwhile.
    """
    if min(samples_per_shard, bytes_per_shard) < 1:
        raise ValueError(f"a shard of {samples_per_shard} samples and {bytes_per_shard} bytes; both must be 1 or more")
    images, out = Path(images), Path(out)
    tree = scan(images, split, val_share, seed)
    plan = {
        "tree": tree.fingerprint,
        "split": split,
        "val_share": val_share,
        "samples_per_shard": samples_per_shard,
        "bytes_per_shard": bytes_per_shard,
        "seed": seed,
        "metadata": metadata,
    }
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        finished = _agree(out, plan, overwrite)
        if finished is not None:
            shutil.rmtree(out / _WORK, ignore_errors=True)
            return finished
        shards = {
            f"{name}-{number:06d}.tar": items
            for name, found in tree.splits.items()
            for number, items in enumerate(_cut(found, name, samples_per_shard, bytes_per_shard, seed))
        }
        receipts = {name: receipt for name in shards if (receipt := _receipt(out, name)) is not None}
        missing = {name: items for name, items in shards.items() if name not in receipts}
        _check_space(out, missing)
        workers = workers or min(8, len(os.sched_getaffinity(0)))
        receipts |= _write_shards(tree.root, out, missing, workers, progress)
        result = describe(tree, plan, {name: receipts[name] for name in shards}, workers)
        write_json(out / "dataset.json", result)
        shutil.rmtree(out / _WORK)
    if progress:
        _report(out, result)
    return result


def _report(out: Path, result: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for split, entry in result["splits"].items():
        console.print(
            f"{split}: {entry['samples']:,} samples in {len(entry['shards']):,} shards, {entry['bytes']:,} bytes"
        )
    for entry in result["skipped"][:_MAX_SHOWN]:
        console.print(f"skipped {entry['path']}: {entry['reason']}", markup=False)
    if result["num_skipped"] > _MAX_SHOWN:
        console.print(f"skipped {result['num_skipped']:,} in all; {out / 'dataset.json'} lists them", markup=False)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the folder against a second pack; the kernel lets go when the process ends, however it does."""
    place = out / ".pack.lock"  # removed again when the pack ends
    with place.open("wb") as file:
        if not lock(file):
            raise FileExistsError(f"another pack is writing into {out}; wait for it, or take another folder")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _agree(out: Path, plan: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Settle whether to begin (None), to go on (None) or that all is done (the result)."""
    for leftover in out.glob(f".*{TEMPORARY_SUFFIX}"):  # of a call that was killed
        leftover.unlink()
    _finish_removal(out)
    result, begun = read_json(out / "dataset.json"), read_json(out / _WORK / "plan.json")
    earlier = result["pack"] if result is not None and "pack" in result else begun
    if overwrite and earlier is not None and (earlier != plan or result is not None):
        _remove_pack(out)
        earlier = result = None
    if earlier is None:
        if result is not None or any(out.glob("*.tar")):
            raise FileExistsError(f"{out} holds shards that `selfsight pack` did not write; take another folder")
        (out / _WORK).mkdir(exist_ok=True)
        write_json(out / _WORK / "plan.json", plan)
        return None
    differences = [name for name in plan if plan[name] != earlier.get(name)]
    if differences:
        told = "; ".join(
            "the images are others" if name == "tree" else f"{name} is {plan[name]!r}, there {earlier.get(name)!r}"
            for name in differences
        )
        state = "holds" if result is not None else "holds part of"
        raise FileExistsError(f"{out} {state} another pack: {told}. Take another folder, or overwrite (--overwrite)")
    return result


def _remove_pack(out: Path) -> None:
    """Remove the shards that earlier packs wrote here, and nothing else; a call that is killed is taken up again."""
    result = read_json(out / "dataset.json")
    own = {path.stem for path in (out / _WORK).glob("*.begun")}
    if result is not None:
        own |= {shard["name"] for entry in result["splits"].values() for shard in entry["shards"]}
    (out / _WORK).mkdir(exist_ok=True)
    write_json(out / _WORK / _DOOMED, sorted(own))
    _finish_removal(out)


def _finish_removal(out: Path) -> None:
    doomed = read_json(out / _WORK / _DOOMED)
    if doomed is None:
        return
    foreign = [name for name in doomed if not _SHARD_NAME.fullmatch(name)]
    if foreign:  # the folder may come from a stranger
        raise ValueError(
            f"{out} says that pack wrote {foreign[0]!r}, which is no name of a shard; nothing was removed. "
            "Take another folder, or remove this one by hand"
        )
    (out / "dataset.json").unlink(missing_ok=True)  # first: without it nothing looks finished
    (out / "verify.json").unlink(missing_ok=True)
    for name in doomed:
        (out / f"{name}{INDEX_SUFFIX}").unlink(missing_ok=True)
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / _WORK)


def _cut(items: list[Item], split: str, max_samples: int, max_bytes: int, seed: int) -> Iterator[list[Item]]:
    """Shuffle and cut into shards of equal length."""
    key = stream_key(seed, Purpose.SHUFFLE, *split.encode())
    shuffled = random_bits(key, len(items)).argsort(kind="stable")
    num_bytes = sum(item.size for item in items)
    count = max(-(-len(items) // max_samples), min(-(-num_bytes // max_bytes), len(items)))
    for number in range(count):
        first, last = (len(items) * part // count for part in (number, number + 1))
        yield [items[place] for place in shuffled[first:last]]


def _check_space(out: Path, shards: dict[str, list[Item]]) -> None:
    needed = sum(item.size + 4 * BLOCKSIZE for items in shards.values() for item in items)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(
            f"the shards need about {needed:,} bytes and {out} has {free:,} free; make room, or pack elsewhere"
        )


def _write_shards(
    root: Path, out: Path, shards: dict[str, list[Item]], workers: int, progress: bool
) -> dict[str, dict[str, Any]]:
    """Write them in parallel; the receipts by shard."""
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    receipts = {}
    stop = Event()
    with Progress(*columns, disable=not progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("packing", total=sum(len(items) for items in shards.values()))
        futures = {
            pool.submit(_finish_shard, root, out / name, items, stop, lambda: bar.advance(task)): name
            for name, items in shards.items()
        }
        try:
            for future in as_completed(futures):
                receipts[futures[future]] = future.result()
        finally:  # after a failure the others end early; after the last shard there is nothing to stop
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return receipts


def _finish_shard(
    root: Path, shard: Path, items: list[Item], stop: Event, advance: Callable[[], None]
) -> dict[str, Any]:
    """One shard, its index, and last its receipt: that it is finished, and what is in it."""
    (shard.parent / _WORK / f"{shard.name}.begun").touch()  # from now on it is ours to remove
    receipt = write_shard(root, shard, items, stop, advance)
    load_index(shard)
    write_json(_receipt_path(shard.parent, shard.name), receipt)
    return receipt


def _receipt_path(out: Path, shard: str) -> Path:
    return out / _WORK / f"{shard}.json"


def _receipt(out: Path, shard: str) -> dict[str, Any] | None:
    """The receipt of a shard that an earlier call finished, and which is still as it left it."""
    receipt = read_json(_receipt_path(out, shard))
    path = out / shard
    return receipt if receipt and path.is_file() and path.stat().st_size == receipt["bytes"] else None
