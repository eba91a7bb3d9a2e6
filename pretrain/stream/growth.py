"""Data that change while a run goes on: noticed, told by name, and refused or taken over at an epoch's end.

What a run is shown is pinned as `data/CHECKSUM.json` in its folder: the shards by name, each with its digest. The
checkpoint's state holds which of them were shown from which step on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.files import read_json, write_json
from data_pipelines.sampler import Sampler, Segment, SegmentPart
from pretrain.config.load import ConfigError

_MOST_NAMED = 5


def pin(folder: Path, datasets: Mapping[int, Dataset]) -> None:
    """Write down which shards these data sets have, unless that is known already."""
    (folder / "data").mkdir(exist_ok=True)
    for dataset in datasets.values():
        place = _pinned_at(folder, dataset.checksum)
        if not place.is_file():
            write_json(place, {"checksum": dataset.checksum, "shards": _listed(dataset)})


def continued(
    state: Mapping[str, Any], fresh: Sampler, step: int, folder: Path, adopt: bool
) -> tuple[Sampler, str | None]:
    """The sampler of a run that has reached `step`, and a line that says so if its data change from here on.

    Args:
        state: What the run's sampler said of itself when the checkpoint was written.
        fresh: That of a new run with the present configuration and data.
        step: The step to go on with.
        folder: Of the run.
        adopt: Go over to changed data at the end of the present epoch.

    Raises:
        ConfigError: The data changed and `adopt` is not set, or shards that are still to be shown are gone; or the
            order is another, whatever the data.
    """
    for what, value in fresh.state().items():
        if what not in ("segments", "rows") and state[what] != value:  # rows stay as the run began with them
            raise _other_order(folder, what, state[what], value)
    past, now = Sampler.continued(state, {}), fresh.segments[0].parts
    if past.segments[-1].start_step >= step and _checksums(past.segments[-2:-1]) == [part.checksum for part in now]:
        past.segments = past.segments[:-1]  # adopted, never shown, and taken back
    pinned = past.segments[-1].parts
    if len(pinned) != len(now):
        raise ConfigError(
            f"the run mixes {len(pinned)} data sets, and {len(now)} are given; start a run of another name"
        )
    changes = [
        (old, change)
        for old, new in zip(pinned, now, strict=True)
        if old.checksum != new.checksum and (change := _difference(folder, old, fresh.datasets[new.dataset]))
    ]
    told = "; ".join(f"{old.name}: {change}" for old, change in changes)
    if changes and not adopt:
        raise ConfigError(
            f"the data are not those that {folder} was started with ({told}), and the run would see other batches. "
            "Bring those back, or go over to these at the end of the present epoch with data.adopt=next_epoch, or "
            "start a run of another name"
        )
    if not changes:
        for old, new in zip(pinned, now, strict=True):
            _check_same_order(folder, old, new)
    sampler = past.grown(fresh, step) if changes else past
    to_come = [sampler.segment(step), *(segment for segment in sampler.segments if segment.start_step > step)]
    sampler.datasets = _open(to_come, fresh, folder)
    if not changes:
        return sampler, None
    start = sampler.segments[-1].start_step
    return sampler, f"from step {start} on the data are others ({told}); the length of the run stays as it is"


def opened_at(step: int, sampler: Sampler, fresh: Sampler, folder: Path) -> Sampler:
    """The sampler with the data sets of one step only, as they were then."""
    sampler.datasets = _open([sampler.segment(step)], fresh, folder)
    return sampler


def _open(segments: Sequence[Segment], fresh: Sampler, folder: Path) -> dict[int, Dataset]:
    """The data sets of these segments, with the present ones for those that are as they were."""
    opened: dict[int, Dataset] = {}
    for segment in segments:
        for number, part in enumerate(segment.parts):
            if part.dataset not in opened:
                near = fresh.datasets[fresh.segments[0].parts[number].dataset]
                opened[part.dataset] = near if near.checksum == part.checksum else _open_pinned(folder, part, near)
    return dict(sorted(opened.items()))


def _open_pinned(folder: Path, part: SegmentPart, near: Dataset) -> Dataset:
    """A data set as it was, from the shards of the present one and those beside them."""
    listed = _read_pinned(folder, part.checksum)
    if listed is None:
        raise ConfigError(
            f"{folder} is to be shown {part.name} as it was before it changed, and does not know its shards: "
            f"{_pinned_at(folder, part.checksum)} is gone. Bring the earlier shards back under data.train"
        )
    there = {shard.name: shard for shard in near.shards}
    first = near.shards[0]
    for name in {entry["name"] for entry in listed} - there.keys():
        if isinstance(first, Path) and first.with_name(name).is_file():  # beside them, though data.train leaves it out
            there[name] = first.with_name(name)
    missing = [entry["name"] for entry in listed if entry["name"] not in there]
    if not missing:
        dataset = near.over([there[entry["name"]] for entry in listed])
        changed = [
            entry["name"] for number, entry in enumerate(listed) if dataset.index.digest(number) != entry["digest"]
        ]
        if dataset.checksum == part.checksum:
            return dataset
    problem = f"missing: {_named(missing)}" if missing else f"changed: {_named(changed)}"
    raise ConfigError(
        f"{folder} is shown {part.name} as it was, up to the end of the present epoch, and some of those shards are "
        f"{problem}. Bring them back, or start a run of another name"
    )


def _difference(folder: Path, old: SegmentPart, now: Dataset) -> str:
    """What became of a pinned data set, by the names of shards."""
    listed = _read_pinned(folder, old.checksum)
    if listed is None:
        return f"{old.num_samples:,} samples then, {now.num_samples:,} now"
    before = Counter((entry["name"], entry["digest"]) for entry in listed)
    after = Counter((entry["name"], entry["digest"]) for entry in _listed(now))
    names = [{name for name, _ in found} for found in (before - after, after - before)]
    told = [
        f"{len(found)} {word} shard{'s' if len(found) > 1 else ''} ({_named(sorted(found))})"
        for word, found in (
            ("new", names[1] - names[0]), ("missing", names[0] - names[1]), ("changed", names[0] & names[1])
        )
        if found
    ]  # fmt: skip
    return ", ".join(told) or "the same shards in another order"


def _checksums(segments: Sequence[Segment]) -> list[str]:
    return [part.checksum for segment in segments for part in segment.parts]


def _check_same_order(folder: Path, old: SegmentPart, new: SegmentPart) -> None:
    for what in ("batch_size", "lanes", "weight"):
        before, after = getattr(old, what), getattr(new, what)
        if before != after:
            raise _other_order(folder, f"{what} of {old.name}", before, after)


def _other_order(folder: Path, what: str, before: object, now: object) -> ConfigError:
    return ConfigError(
        f"{folder} was started with {what} = {before}, now it is {now}: the run would see other batches. Use the "
        "settings it was started with, or start a run of another name"
    )


def _listed(dataset: Dataset) -> list[dict[str, Any]]:
    index = dataset.index
    return [
        {"name": name, "samples": count, "bytes": size, "digest": index.digest(number)}
        for number, (name, count, size) in enumerate(
            zip(index.names, index.counts.tolist(), index.sizes.tolist(), strict=True)
        )
    ]


def _pinned_at(folder: Path, checksum: str) -> Path:
    return folder / "data" / f"{checksum}.json"


def _read_pinned(folder: Path, checksum: str) -> list[dict[str, Any]] | None:
    found = read_json(_pinned_at(folder, checksum))
    return None if found is None else found["shards"]


def _named(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
