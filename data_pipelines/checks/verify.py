"""Look at every byte of a data set of shards before a cluster does; what can be found, `CASES` lists."""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_pipelines.checks.check_shards import Census, Listed, ShardCheck, ShardFacts, check_shard, unreadable
from data_pipelines.datasets.dataset import find_shards
from data_pipelines.datasets.local_view import LocalView
from data_pipelines.files import write_json
from data_pipelines.images.issues import Severity, shown, visible
from data_pipelines.images.maps import problems_of
from data_pipelines.images.pixels import MAX_FILE_BYTES
from data_pipelines.images.sample import KINDS, Sample
from data_pipelines.images.tally import Tally
from data_pipelines.images.tolerance import MAX_BAD_SHARE, ShardCount, best_channels, dead_end, losses_told, too_many
from data_pipelines.images.validate import Verdict, validate, validate_stack
from data_pipelines.remote.cache import Cache
from data_pipelines.remote.fetch import cancel_on
from data_pipelines.remote.urls import inside, is_url, name_of
from data_pipelines.shards.index import Index
from data_pipelines.shards.stack_part import frames_in
from data_pipelines.shards.tar import BLOCK, suffix_in
from data_pipelines.wording import samples_in

_PIECE = 64  # samples a thread decodes at a time
_MAX_LISTED = 1000  # bad samples named in the report
_MAX_NUMBERED = 100_000  # bad samples of a split, of which rows are looked for
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def verify(
    out: str | Path,
    *,
    report: Path | None = None,
    workers: int | None = None,
    quick: bool = False,
    channels: int | None = None,
    frames: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Decode every sample of every shard, and compare with what the index and `dataset.json` say.

    Memory does not grow with the number of samples, but for a moment: 8 bytes a sample, and 128 MB at most.

    Args:
        out: A folder, of which all `*.tar` are looked at; or shards by `*` or `{000..009}`; here or at a URL.
        report: Where to write the report as JSON; default `verify.json` in the folder, if that can be written to.
        workers: Threads; default: the cores this process may use.
        quick: Look at tar headers, labels and indexes only: no image, no checksum of the bytes.
        channels: Of the runs to come, as `data.channels`; default: any, each image as it is stored.
        frames: As `data.frames` of those: with several, a sample that is one image is bad. Of stacks of numbered
            members every frame is looked at in any case, of files that hold several images only so.
        progress: Show a bar, and at the end what was found.

    Returns:
        The report. `ok`: there is no error. `cases`: what was found, by its name in `CASES`, with severity, count and
        the first examples; in words `problems` (errors) and `notes`. `bad`: the samples that cannot be decoded (key,
        shard, case, reason), at most 1,000 of `num_bad`. `run`: what a run will do about these. `samples`, `labelled`,
        `shards`: what there is. `width`, `height`: smallest and largest, in px, as stored. `modes`: Pillow's, counted.

    Raises:
        FileNotFoundError: There are no such shards.
        ValueError: `dataset.json` is none.
    """
    whole = Path(out).expanduser().is_dir() or (is_url(out) and not name_of(str(out)).endswith(".tar"))
    cache = Cache()
    shards = find_shards(_all_in(out) if whole else out, cache=cache)
    with LocalView(shards, cache, whole=whole) as view:
        result = _verify(view, workers or len(os.sched_getaffinity(0)), whole, quick, channels, frames, progress)
    folder = shards[0].parent
    if report is not None:
        write_json(report, result)
    elif isinstance(folder, Path) and os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222:
        write_json(folder / "verify.json", result)
    if progress:
        _print(result)
    return result


def _verify(
    view: LocalView, workers: int, whole: bool, quick: bool, channels: int | None, frames: int, progress: bool
) -> dict[str, Any]:
    folder = view.paths[0].parent
    listed = Listed.in_folder(folder)
    stop = threading.Event()
    census, account = Census(folder, listed), _Account(whole)
    columns = (
        TextColumn("verifying"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[samples]:,} samples"),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, disable=not progress) as bar,
        ThreadPoolExecutor(workers, "verify", cancel_on, (stop,)) as pool,
        ExitStack() as ending,
    ):
        ending.callback(stop.set)
        task = bar.add_task("verifying", total=sum(_size(shard) for shard in view.paths), samples=0)

        def pieces() -> Iterator[_Piece]:
            for check in _ahead(pool, lambda shard: _check(view, shard, listed, quick), view.paths, 2 * workers):
                census.add(check)
                if quick or not check.samples:
                    bar.update(task, advance=check.facts.size)
                    view.release(check.facts.shard)
                    continue
                bar.update(task, advance=check.facts.size - int(check.samples.image_bytes[0]))
                for first in range(0, len(check.samples), _PIECE):
                    rows = range(first, min(first + _PIECE, len(check.samples)))
                    yield _Piece(check.facts.shard, check.samples, rows)

        for piece, results in _ahead(
            pool, lambda piece: (piece, _judge(piece, channels, frames)), pieces(), 4 * workers
        ):
            account.add(results)
            if piece.rows.stop == len(piece.samples):
                view.release(piece.shard)
            num_bytes = sum(result.size for result in results)
            bar.update(task, advance=num_bytes, samples=account.num_samples)
    tally = Tally()
    if channels is None:
        account.tell_mixed()
    for part in (census.tally, account.tally, census.compare()):
        tally.update(part)
    return {
        "ok": not any(tally.of(Severity.ERROR)),
        "quick": quick,
        "problems": [tally.sentence(case) for case in tally.of(Severity.ERROR)],
        "notes": [tally.sentence(case) for case in tally.of(Severity.NOTE)],
        "cases": tally.report(),
        "shards": len(view.paths),
        "samples": census.num_samples,
        "labelled": census.num_labelled,
        "num_bad": account.num_bad,
        "bad": account.bad,
        "run": outlook(census, account, listed, whole, quick),
        "width": account.width,
        "height": account.height,
        "modes": dict(sorted(account.modes.items())),
    }


class _Piece(NamedTuple):
    shard: Path
    samples: Index
    rows: range


class _Judged(NamedTuple):
    shard: str
    key: str
    size: int  # bytes
    verdict: Verdict
    bad_maps: tuple[str, ...] = ()  # what is wrong with masks and depths


class _Split:
    """The images of one split, which a run opens without the others."""

    def __init__(self) -> None:
        self.num_samples = self.num_bad = 0
        self.bad: dict[int, str] = {}  # where they lie, by number
        self.channels: Counter[int] = Counter()
        self.first: dict[int, tuple[str, str]] = {}  # shard and key of the first image of so many channels


class _Account:
    """What the images were, told in order."""

    def __init__(self, whole: bool) -> None:
        self.tally = Tally()
        self.num_bad = 0
        self.num_samples = 0
        self.bad: list[dict[str, str]] = []
        self.width, self.height = [0, 0], [0, 0]
        self.modes: Counter[str] = Counter()
        self.splits: defaultdict[str, _Split] = defaultdict(_Split)
        self._whole = whole

    def add(self, results: list[_Judged]) -> None:
        for shard, key, _, verdict, bad_maps in results:
            for reason in bad_maps:
                self.tally.add("bad_map", shard, key, reason)
            split = self.splits[split_of(shard, self._whole)]
            self.num_samples += 1
            split.num_samples += 1
            if verdict.case is None:
                self.width, self.height = _widened(self.width, verdict.width), _widened(self.height, verdict.height)
                self.modes[verdict.mode] += 1
                if verdict.channels is not None:
                    split.channels[verdict.channels] += 1
                    split.first.setdefault(verdict.channels, (shard, key))
                for note in verdict.notes:
                    self.tally.add(note, shard, key)
                continue
            self.num_bad += 1
            split.num_bad += 1
            self.tally.add(verdict.case, shard, key, verdict.reason)
            if len(self.bad) < _MAX_LISTED:
                reason = verdict.reason or ""
                self.bad.append({"key": shown(key), "shard": shard, "case": verdict.case, "reason": reason})
            if len(split.bad) < _MAX_NUMBERED:
                split.bad[split.num_samples - 1] = f"{shown(key)} of {shard}"

    def tell_mixed(self) -> None:
        """Count what a run of the number of channels that most images have cannot use."""
        for split in self.splits.values():
            if not split.channels:
                continue
            best, _ = best_channels(split.channels)
            for channels, (shard, key) in split.first.items():
                if channels != best and {channels, best} != {1, 3}:
                    told = f"{channels} channel{'s' * (channels > 1)}, and {best} would serve most"
                    self.tally.add("mixed_channels", shard, key, told, split.channels[channels])


def split_of(shard: str, whole: bool) -> str:
    """What of a folder is opened together with a shard; all that is named is, where no folder is."""
    return (shard.rpartition("-")[0] or shard) if whole else ""


def outlook(census: Census, account: _Account, listed: Listed, whole: bool, quick: bool) -> str:
    """What a run will do, of the split where it does worst; by the same judgement as the run's own."""
    shards: dict[str, list[ShardFacts]] = {}
    for facts in census.facts:
        shards.setdefault(split_of(facts.shard.name, whole), []).append(facts)
    packed = {name: entry.samples for name, entry in listed.shards.items()}
    found = []
    for name, group in shards.items():
        rank, told = _outlook(group, account.splits[name], packed, quick)
        found.append((rank, f"{name}: {told}" if len(shards) > 1 else told))
    worst, _ = max(found)
    return (
        "; ".join(told for rank, told in found if rank == worst)
        if worst
        else found[0][1].removeprefix(f"{next(iter(shards))}: ")
    )


def _outlook(facts: list[ShardFacts], split: _Split, packed: Mapping[str, int], quick: bool) -> tuple[int, str]:
    """How bad it is (2: a run ends, 1: some are replaced, 0: nothing is lost), and it in words."""
    for one in facts:
        if one.state == "unreadable":
            return 2, f"a run ends, as {one.shard.name} cannot be read"
    counts = [ShardCount(one.shard.name, one.num_samples, one.state == "damaged") for one in facts]
    if not any(count.num_samples for count in counts):
        return 2, "a run does not start, as there is no sample"
    told, _ = losses_told(counts, packed, MAX_BAD_SHARE)
    if told:
        return 2, f"a run does not start: {told}"
    if quick:
        return 0, "not known: no image was decoded"
    best, num_other = best_channels(split.channels) if split.channels else (0, 0)
    num_bad, num_samples = split.num_bad + num_other, split.num_samples
    needs = f", by a run of data.channels={best}" if best not in (0, 1, 3) or num_other else ""
    if not num_bad:
        return 0, f"every sample can be used{needs}"
    told = f"{num_bad:,} of {num_samples:,} samples ({100 * num_bad / num_samples:.3g} %) cannot be decoded"
    if num_other:
        told = told.replace("decoded", f"used{needs}")
    ends = np.cumsum([count.num_samples for count in counts]).tolist()
    tried = dead_end(ends, split.bad.keys()) if split.num_bad == len(split.bad) else []
    if tried:
        return (
            2,
            f"{told}; a run ends at {split.bad[tried[-1]]}, where {len(tried)} in a row are bad: pack the data again",
        )
    if too_many(num_bad, num_samples, num_samples, MAX_BAD_SHARE):
        return 2, (
            f"{told}; a run ends, as that is more than data.max_bad_share={MAX_BAD_SHARE:g}, unless it permits more"
        )
    return 1, f"{told}; a run shows a neighbour instead"


def _widened(sides: list[int], side: int) -> list[int]:
    return [min(sides[0] or side, side), max(sides[1], side)]


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], count: int
) -> Iterator[_Result]:
    """`map`, in order and no more than `count` items ahead of what is used."""
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _judge(piece: _Piece, channels: int | None, frames: int) -> list[_Judged]:
    try:
        with piece.shard.open("rb") as file:
            return [_judge_one(piece, row, file.fileno(), channels, frames) for row in piece.rows]
    except OSError as error:  # a file system that fails once is not asked again for the others of the piece
        verdict = Verdict(shown(str(error)), "unreadable")
        entries = [piece.samples.entry(0, row) for row in piece.rows]
        return [_Judged(piece.shard.name, entry.key, entry.image_size, verdict) for entry in entries]


def _judge_one(piece: _Piece, row: int, descriptor: int, channels: int | None, frames: int) -> _Judged:
    entry = piece.samples.entry(0, row)
    size = min(entry.image_size, MAX_FILE_BYTES + 1)  # see Dataset.read
    before = min(BLOCK, entry.image_offset)  # with its header before it; a stack at the start of a shard has none
    content = os.pread(descriptor, before + size, entry.image_offset - before)
    image = content[before:]
    members = frames_in(image, entry.key)
    if members or frames > 1:
        image = members[0] if members else image
        verdict = validate_stack(Sample(entry.key, piece.shard, image, None, members), channels=channels)
    else:
        verdict = validate(image, suffix_in(content[:before]), channels=channels)
    maps = {kind: piece.samples.beside(kind, 0, row) for kind in KINDS if piece.samples.has(kind)}
    stored = {kind: os.pread(descriptor, size, offset) for kind, (offset, size) in maps.items() if size}
    bad_maps = problems_of(stored, image) if stored and verdict.case is None else ()
    return _Judged(piece.shard.name, entry.key, entry.image_size, verdict, bad_maps)


def _check(view: LocalView, shard: Path, listed: Listed, quick: bool) -> ShardCheck:
    try:
        view.bring(shard)
    except OSError as error:
        return unreadable(shard, error)
    return check_shard(shard, listed, quick)


def _all_in(folder: str | Path) -> str | Path:
    return inside(str(folder), "*.tar") if is_url(folder) else Path(folder).expanduser() / "*.tar"


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:  # told by `check_shard`
        return 0


def _print(result: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for severity, told in (("error", result["problems"]), ("note", result["notes"])):
        for sentence in told:
            console.print(f"{severity}: {visible(sentence)}", markup=False)
    kinds = len(result["problems"])
    state = "no error" if result["ok"] else f"{kinds} {'kind' if kinds == 1 else 'kinds'} of error"
    console.print(f"{samples_in(result['samples'], result['shards'])}: {state}; {result['run']}")
