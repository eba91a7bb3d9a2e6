"""Look at every byte of a data set of shards before a cluster does."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import file_digest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipelines.decode import BadSampleError, decode
from data_pipelines.files import read_json, write_json
from data_pipelines.index import Dataset, find_shards
from data_pipelines.sample_index import NO_LABEL
from data_pipelines.shard_index import INDEX_SUFFIX, build_index, load_index

_PIECE = 64  # samples a thread decodes at a time
_MAX_LISTED = 1000  # bad samples named in the report


def verify(
    out: str | Path, *, report: Path | None = None, workers: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Decode every sample of every shard, and compare with what the index and `dataset.json` say.

    Args:
        out: A folder, of which all `*.tar` are looked at; or shards by `*` or `{000..009}`.
        report: Where to write the report as JSON; default `verify.json` in the folder, if that can be written to.
        workers: Threads; default: the cores this process may use.
        progress: Show a bar.

    Returns:
        The report. `ok`: nothing is wrong. `problems`: what is, in words. `bad`: the samples that cannot be
        decoded (key, shard, reason), at most 1,000 of `num_bad`. `samples`, `labelled`, `shards`: what there is.
        `width`, `height`: smallest and largest, in px.

    Raises:
        FileNotFoundError: There are no such shards.
    """
    folder = Path(out).expanduser()
    shards = find_shards(folder / "*.tar") if folder.is_dir() else find_shards(out)
    folder = shards[0].parent
    workers = workers or len(os.sched_getaffinity(0))
    problems: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(_check_shard, shards):
            problems.extend(found)
        problems.extend(_compare(folder, shards, pool))
    sound = [shard for shard in shards if len(load_index(shard))]
    bad: list[dict[str, str]] = []
    sizes: Counter[tuple[int, int]] = Counter()
    num_labelled = num_samples = 0
    if sound:
        with Dataset(sound) as dataset:
            num_samples, num_labelled = dataset.num_samples, int((dataset.labels != NO_LABEL).sum())
            for piece_sizes, piece_bad in _decode_all(dataset, workers, progress):
                sizes.update(piece_sizes)
                bad.extend(piece_bad)
    if bad:
        first = bad[0]
        problems.append(
            f"{len(bad)} of {num_samples} samples cannot be decoded, "
            f"the first of them {first['key']} of {first['shard']}: {first['reason']}"
        )
    widths, heights = zip(*sizes, strict=True) if sizes else ((0,), (0,))
    result = {
        "ok": not problems,
        "problems": problems,
        "shards": len(shards),
        "samples": num_samples,
        "labelled": num_labelled,
        "num_bad": len(bad),
        "bad": bad[:_MAX_LISTED],
        "width": [min(widths), max(widths)],
        "height": [min(heights), max(heights)],
    }
    if report is not None:
        write_json(report, result)
    elif os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        write_json(folder / "verify.json", result)
    if progress:
        console = Console(highlight=False, soft_wrap=True)
        for problem in problems:
            console.print(problem, markup=False)
        state = "all is well" if not problems else f"{len(problems)} problem(s)"
        console.print(f"{num_samples:,} samples in {len(shards):,} shards: {state}")
    return result


def _check_shard(shard: Path) -> list[str]:
    """What the headers of a shard tell, and whether its stored index tells the same."""
    fresh, stored = build_index(shard), load_index(shard)
    problems = [f"{shard.name}: {problem}" for problem in fresh.problems]
    if fresh.digest(0) != stored.digest(0):
        problems.append(f"{shard.name}: the index does not fit the shard; remove {shard.name}{INDEX_SUFFIX}")
    if not len(fresh):
        problems.append(f"{shard.name}: no sample in it")
    return problems


def _compare(folder: Path, shards: list[Path], pool: ThreadPoolExecutor) -> list[str]:
    """Differences to `dataset.json`, if there is one; reads every shard for its checksum."""
    info = read_json(folder / "dataset.json")
    if info is None or "splits" not in info:
        return []
    listed = {entry["name"]: entry for split in info["splits"].values() for entry in split["shards"]}
    there = {shard.name: shard for shard in shards if shard.parent == folder}
    problems = [f"{name} is in dataset.json and not in the folder" for name in listed if not (folder / name).is_file()]
    problems += [f"{name} is in the folder and not in dataset.json" for name in there if name not in listed]
    common = [name for name in listed if name in there]
    for name, digest in zip(common, pool.map(_sha256, (there[name] for name in common)), strict=True):
        if digest != listed[name]["sha256"]:
            problems.append(f"{name}: its bytes are not those that were packed (sha256); fetch it or pack it again")
    num_classes = len(info["classes"]) if info.get("classes") else None
    for name in common:
        labels = load_index(there[name]).labels
        if num_classes is not None and len(labels) and labels.max() >= num_classes:
            problems.append(f"{name}: label {labels.max()} of {num_classes} classes in dataset.json")
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _decode_all(
    dataset: Dataset, workers: int, progress: bool
) -> Iterator[tuple[Counter[tuple[int, int]], list[dict[str, str]]]]:
    """Sizes and bad samples piece by piece, a bounded number of pieces ahead."""
    starts = iter(range(0, dataset.num_samples, _PIECE))
    pending: deque[Future[tuple[Counter[tuple[int, int]], list[dict[str, str]]]]] = deque()
    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("verifying", total=dataset.num_samples)
        while True:
            while len(pending) < 4 * workers and (start := next(starts, None)) is not None:
                pending.append(
                    pool.submit(_decode_piece, dataset, range(start, min(start + _PIECE, dataset.num_samples)))
                )
            if not pending:
                return
            sizes, bad = pending.popleft().result()
            bar.advance(task, sizes.total() + len(bad))
            yield sizes, bad


def _decode_piece(dataset: Dataset, samples: range) -> tuple[Counter[tuple[int, int]], list[dict[str, str]]]:
    sizes: Counter[tuple[int, int]] = Counter()
    bad = []
    for number in samples:
        try:
            height, width, _ = decode(dataset.read(number)).shape
            sizes[width, height] += 1
        except BadSampleError as error:
            bad.append({"key": error.key, "shard": error.shard.name, "reason": error.reason})
    return sizes, bad
