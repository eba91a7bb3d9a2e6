"""Images to shards in WebDataset's format, with their indexes and a `dataset.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from data_pipelines.cores import cores_per_process
from data_pipelines.datasets.dataset_index import write_index
from data_pipelines.files import atomic_write, check_writable, read_json, write_json
from data_pipelines.images.issues import shown
from data_pipelines.packing.describe import describe
from data_pipelines.packing.map_folders import MapFolder
from data_pipelines.packing.mask_names import read_mask_names
from data_pipelines.packing.meter import Meter
from data_pipelines.packing.pack_folder import SKIPPED, WORK, agree, alone_in, read_receipt, receipt_path
from data_pipelines.packing.reencode import Reencoding
from data_pipelines.packing.report import MAX_SHOWN, report
from data_pipelines.packing.scan import Catalogue, scan
from data_pipelines.packing.shard_writer import Workshop, write_shard
from data_pipelines.packing.sources.base import ANY_COLUMNS, Columns, Source
from data_pipelines.packing.sources.opening import open_source
from data_pipelines.rng import Purpose, random_bits, stream_key
from data_pipelines.shards.scan import INDEX_SUFFIX, load_index

CHECKS = ("header", "full")
BAD = ("skip", "refuse")
_MAX_SHARDS_AT_A_TIME = 8


def pack(
    images: str | Path,
    out: Path,
    *,
    kind: str | None = None,
    root: Path | None = None,
    columns: Columns = ANY_COLUMNS,
    labels: bool = True,
    split_folders: bool = True,
    group_pattern: str | None = None,
    dicom_window: tuple[float, float] | None = None,
    split: str = "train",
    val_share: float = 0.0,
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 512 << 20,
    seed: int = 0,
    reencoding: Reencoding | None = None,
    bad: str = "skip",
    check: str = "header",
    leave_out: Path | None = None,
    masks: Path | None = None,
    depths: Path | None = None,
    mask_names: Path | None = None,
    workers: int | None = None,
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    source: Source | None = None,
) -> dict[str, Any]:
    """Write the images of a source into shuffled shards `{split}-{number:06d}.tar`.

    The same source, seed and settings give the same shards to the byte (re-encoded: under the same Pillow). Every shard
    appears whole or not at all; `dataset.json` comes last. After a kill, the same call goes on where it stopped.
    Memory grows by some 80 bytes an image.

    Args:
        images: A folder of images, tars, parquet or arrow files; such files by `*` or braces; or a CSV, TSV or parquet
            list of paths. What each may be, say `sources`.
        out: Folder of the shards; made if missing.
        kind: Of the source; one of `sources.opening.KINDS`. None: by what is there.
        root: Where the relative paths of a list begin; default: its folder.
        columns: Of a table or list.
        labels: Whether to carry labels.
        split_folders: Whether folders named train, val and so on are splits; else they are classes.
        group_pattern: A regular expression that finds in an image's path the group, such as a patient, that no two
            splits may share. It becomes `group` in the image's json. Tables name a column in `columns` instead.
        dicom_window: Centre and width, by which DICOM files become images of 8 bits; None: all their levels are kept.
        split: Name of the images' split, where the source has none of its own.
        val_share: Share of every class to hold back as split `val`.
        samples_per_shard: At most; shards of a split are of equal length (to one).
        bytes_per_shard: About, of a shard, before re-encoding.
        seed: Of the shuffle and of what is held back.
        reencoding: Make images smaller; None: their bytes are kept as they are.
        bad: Images that cannot be used are left out and listed ("skip"), or end the pack ("refuse").
        check: Look at the "header" of an image, or decode all of it ("full").
        leave_out: A list of images that are not to be packed, see `scan`.
        masks: A folder of masks that lie in it as their images do in theirs, see `MapFolder`; those of the images'
            own names (`a.mask.png` of `a.jpg`) need none.
        depths: Likewise of depths.
        mask_names: A file that says what the levels of masks are called, see `read_mask_names`; default: what the
            `dataset.json` of the shards that are packed says.
        workers: Threads that prepare images; default: one a core.
        metadata: Further facts for `dataset.json`, such as source and licence.
        overwrite: Remove what an earlier pack wrote into `out`.
        progress: Show a bar, and at the end what came out and how fast.
        source: What `open_source` made of `images` by the same settings, which is closed in the end; None: it is listed
            now.

    Returns:
        What `dataset.json` holds.

    Raises:
        FileExistsError: `out` holds another pack, or shards of other origin.
        OSError: Too little space, or a file that cannot be read or changed meanwhile.
        ValueError: A setting out of range; a source that is not as it should be; with `bad="refuse"`, bad images.
    """
    if min(samples_per_shard, bytes_per_shard) < 1:
        raise ValueError(f"a shard of {samples_per_shard} samples and {bytes_per_shard} bytes; both must be 1 or more")
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share is {val_share:g}; it must be a share of the images, 0 <= val_share < 1")
    for name, value, allowed in (("bad", bad, BAD), ("check", check, CHECKS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be {' or '.join(allowed)}")
    names = None if mask_names is None else read_mask_names(mask_names)
    out = Path(out)
    workers = workers or cores_per_process()
    check_writable(out)
    spool_folder = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with Console(stderr=True, quiet=not progress).status(f"listing {escape(str(images))}"):
        source = source or open_source(
            images,
            spool_folder,
            kind=kind,
            root=root,
            columns=columns,
            labels=labels,
            split_folders=split_folders,
            group_pattern=group_pattern,
            dicom_window=dicom_window,
        )
    try:
        if any(Path(name).parent == out.resolve() for name in source.shards):
            raise ValueError(f"{out} holds the tars that are to be packed; take another folder for what comes out")
        catalogue = scan(source, split, val_share, seed, leave_out)
        given = {"mask": masks, "depth": depths}
        maps = tuple(MapFolder(kind, root, source.listing) for kind, root in given.items() if root is not None)
        if bad == "refuse" and source.skipped:
            raise _refusal([skipped._asdict() for skipped in source.skipped])
        plan = {
            "source": source.listing.fingerprint,
            "kind": source.kind,
            "labels": labels,
            "split": split,
            "val_share": val_share,
            "samples_per_shard": samples_per_shard,
            "bytes_per_shard": bytes_per_shard,
            "seed": seed,
            "reencoding": None if reencoding is None else asdict(reencoding),
            "check": check,
            "leave_out": None if leave_out is None else hashlib.sha256(leave_out.read_bytes()).hexdigest(),
            "metadata": metadata,
            "split_folders": None if split_folders else False,
            "group_pattern": group_pattern,
            "group_column": columns.group,
            "mask_column": columns.mask,
            "dicom_window": None if dicom_window is None else list(dicom_window),
            "mask_names": names or source.mask_names,
        }
        out.mkdir(parents=True, exist_ok=True)
        with alone_in(out):
            finished = agree(out, plan, overwrite)
            if finished is not None:
                shutil.rmtree(out / WORK, ignore_errors=True)
                if bad == "refuse" and finished["num_skipped"] > len(source.listing.repeats):
                    raise _refusal(finished["skipped"])
                return finished
            result, meter = _pack(catalogue, out, plan, reencoding, bad == "refuse", workers, progress, maps)
        if progress:
            report(out, result, meter)
        return result
    finally:
        source.close()


def _pack(
    catalogue: Catalogue,
    out: Path,
    plan: dict[str, Any],
    reencoding: Reencoding | None,
    refuse: bool,
    workers: int,
    progress: bool,
    maps: tuple[MapFolder, ...],
) -> tuple[Any, Meter]:
    """What `dataset.json` holds, and what has been done for it."""
    windows = catalogue.source.windows(plan["seed"])
    shards = {
        f"{name}-{number:06d}.tar": numbers
        for name, members in catalogue.splits.items()
        for number, numbers in enumerate(_cut(catalogue, members, windows, name, plan))
    }
    missing = {}
    for name, numbers in shards.items():
        receipt = read_receipt(out, name)
        if receipt is None:
            missing[name] = numbers
        elif refuse and receipt["skipped"]:  # by a call that was to skip
            raise _refusal(receipt["skipped"])
    if reencoding is None:  # else nobody knows
        _check_space(out, catalogue.source.listing.sizes, missing)
    with Meter(sum(map(len, missing.values())), progress) as meter, ThreadPoolExecutor(workers) as pool:
        shop = Workshop(
            catalogue, pool, 2 * workers + 2, reencoding, plan["check"] == "full", refuse, meter.advance, maps
        )
        _write_shards(shop, out, missing, min(workers, _MAX_SHARDS_AT_A_TIME))
    result, skipped = describe(catalogue, plan, out, list(shards), workers)
    for name in shards.keys() - {shard["name"] for entry in result["splits"].values() for shard in entry["shards"]}:
        (out / f"{name}{INDEX_SUFFIX}").unlink(missing_ok=True)  # no image of it can be used
        (out / name).unlink()
    for split in result["splits"]:
        write_index(out, split)
    if len(skipped) > len(result["skipped"]):
        with atomic_write(out / SKIPPED) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in skipped)
    write_json(out / "dataset.json", result)
    shutil.rmtree(out / WORK)
    return read_json(out / "dataset.json"), meter  # as a later call returns it, which finds all done


def _cut(
    catalogue: Catalogue, members: np.ndarray, windows: np.ndarray | None, split: str, plan: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Shuffle and cut into shards of equal length."""
    bits = random_bits(stream_key(plan["seed"], Purpose.SHUFFLE, *split.encode()), len(members))
    order = bits.argsort(kind="stable") if windows is None else np.lexsort((bits, windows[members]))
    shuffled = members[order]
    num_bytes = int(catalogue.source.listing.sizes[members].sum())
    count = max(
        -(-len(members) // plan["samples_per_shard"]), min(-(-num_bytes // plan["bytes_per_shard"]), len(members))
    )
    for number in range(count):
        first, last = (len(members) * part // count for part in (number, number + 1))
        yield shuffled[first:last]


def _check_space(out: Path, sizes: np.ndarray, shards: dict[str, np.ndarray]) -> None:
    needed = sum(int(sizes[numbers].sum()) + 4 * BLOCKSIZE * len(numbers) for numbers in shards.values())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OSError(
            f"the shards need about {needed:,} bytes and {out} has {free:,} free; make room, or pack elsewhere"
        )


def _write_shards(shop: Workshop, out: Path, shards: dict[str, np.ndarray], at_a_time: int) -> None:
    """Write several at a time, with all workers at the images of any."""
    with ThreadPoolExecutor(at_a_time) as writers:
        futures = [writers.submit(_finish_shard, shop, out / name, numbers) for name, numbers in shards.items()]
        try:
            for future in as_completed(futures):
                future.result()
        except InterruptedError:
            if not shop.refused:
                raise
        finally:  # after a failure the others end early; after the last shard there is nothing to stop
            shop.stop.set()
            writers.shutdown(cancel_futures=True)
    if shop.refused:
        raise _refusal(shop.refused)


def _finish_shard(shop: Workshop, shard: Path, numbers: np.ndarray) -> None:
    """One shard, its index, and last its receipt: that it is finished, and what is in it."""
    (shard.parent / WORK / f"{shard.name}.begun").touch()  # from now on it is ours to remove
    receipt = write_shard(shop, shard, numbers)
    load_index(shard)
    write_json(receipt_path(shard.parent, shard.name), receipt)


def _refusal(bad: list[dict[str, str]]) -> ValueError:
    ordered = sorted(bad, key=lambda entry: entry["path"])
    told = "; ".join(f"{shown(entry['path'])}: {entry['reason']}" for entry in ordered[:MAX_SHOWN])
    count = f"{len(bad)} images" if len(bad) > 1 else "an image"
    return ValueError(
        f"{count} cannot be used, and there may be more: {told}. Mend them, leave them out (--leave-out), or skip what "
        "is bad (--bad skip), which goes on where this stopped"
    )
