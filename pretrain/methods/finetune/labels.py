"""The labels of a run's images as tables in memory, and all that is refused about them before a run starts.

A batch says of each row which sample it shows, so its labels are looked up on the host by number: the loader carries
none but those of .cls, and runs without labels pay nothing for these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.datasets import maps
from data_pipelines.datasets.dataset import NO_LABEL, Dataset
from data_pipelines.datasets.fields import is_no_value, read_field, read_texts
from data_pipelines.datasets.held_out import held_out_of, open_held_out
from data_pipelines.datasets.narrowed import only
from data_pipelines.images.issues import shown
from data_pipelines.remote.remote_files import Shard
from data_pipelines.remote.urls import redact
from data_pipelines.wording import counted
from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.methods.finetune.masks import levels_of, names_of
from pretrain.stream.datasets import open_datasets, sources, training_datasets

_MOST_NAMED = 5


@dataclass(frozen=True)
class LabelSpace:
    """What labels there are.

    classes: their names, in the order of the head's outputs; of numbers, the name of each.
    mean, std: (k,) of each number over the training images; the head predicts them standardised. Empty for classes.
    """

    task: str
    classes: tuple[str, ...]
    keys: tuple[Any, ...] = ()  # the classes as they are stored, ascending
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Table(NamedTuple):
    """The labels of the samples 0 .. n - 1 of a data set.

    values: one_label: (n,) int64 places among the classes. several_labels: (m,) int64, those of all samples one after
    the other. numbers: (n, k) float32, standardised.
    ends: of several_labels, where each sample's end in `values`, (n,).
    """

    values: np.ndarray
    ends: np.ndarray | None = None

    def rows(self, samples: np.ndarray, num_classes: int) -> np.ndarray:
        """Of these samples (b,): (b,) int64 classes, (b, c) float32 of 0 and 1, or (b, k) float32 numbers."""
        if self.ends is None:
            return self.values[samples]
        found = np.zeros((len(samples), num_classes), dtype=np.float32)
        for row, sample in enumerate(samples.tolist()):
            found[row, self.values[self.ends[sample - 1] if sample else 0 : self.ends[sample]]] = 1
        return found


class HeldOut(NamedTuple):
    """What a run is measured on."""

    dataset: Dataset
    table: Table
    name: str  # of the split, or where it lies


class Labels(NamedTuple):
    """All labels of a run: a table for each training data set, and for the held-out one, if there is one."""

    space: LabelSpace
    train: tuple[Table, ...]
    val: HeldOut | None


def check_labels(config: Config) -> None:
    """Raise ValueError unless there are labels that can be learned, and those held out are of the same kinds."""
    read_labels(config)


def are_labelled(config: Config, dataset: Dataset) -> np.ndarray:
    """(n,) bool: the samples of a data set that have a label of the run's task."""
    method = config.method
    if method.task == "segmentation":
        return maps.which_have(dataset, "mask")
    if method.label is None:
        return np.asarray(dataset.labels != NO_LABEL)
    no_text = method.task in ("several_labels", "numbers")  # whatever is no value of a text is no name of a class
    return np.array(
        [not (value is None or (no_text and is_no_value(value))) for value in read_field(dataset, method.label)]
    )


def left_out(config: Config) -> list[str]:
    """A line for each data set, and for the held-out one, of which some samples have no label, or mask."""
    names = [redact(source.path) for source in sources(config.data)]
    asked = list(zip(open_datasets(config.data), names, strict=True))
    held_out = _held_out(config)
    lines = []
    for dataset, name in [*asked, *([held_out] if held_out is not None else [])]:
        missing = np.flatnonzero(~are_labelled(config, dataset))
        if 0 < len(missing) < dataset.num_samples:
            key, _ = dataset.key(int(missing[0]))
            lines.append(
                f"{len(missing):,} of {dataset.num_samples:,} samples of {name} have {_lacking(config)}, such as "
                f"{shown(key)}, and are left out"
            )
    return lines


def _lacking(config: Config) -> str:
    """What a sample without a label has none of."""
    if config.method.task == "segmentation":
        return "no mask"
    return "no .cls" if config.method.label is None else f"no {config.method.label!r} in their .json"


def read_labels(config: Config) -> Labels:
    """The labels that `config` names, of the samples that have one.

    Raises ValueError where none has, for labels of another kind than `method.task`, fewer than two
    classes, and classes of the held-out images that training never shows; FileNotFoundError for a `val_data` that is
    not there.
    """
    method = config.method
    if method.task == "segmentation":
        return _masks(config)
    names = [redact(source.path) for source in sources(config.data)]
    train = [_raw(dataset, config, name) for dataset, name in zip(training_datasets(config), names, strict=True)]
    space = _space(method.task, method.label, train, names)
    held_out = _labelled(config, _held_out(config))
    val = None
    if held_out is not None:
        dataset, name = held_out
        val = HeldOut(dataset, _table(space, _raw(dataset, config, name), name), name)
    return Labels(space, tuple(_table(space, raw, name) for raw, name in zip(train, names, strict=True)), val)


def _masks(config: Config) -> Labels:
    """The classes of the masks beside the images; tables hold nothing, as pixels have their classes in each batch."""
    names = [redact(source.path) for source in sources(config.data)]
    datasets = training_datasets(config)
    levels = [levels_of(dataset, name) for dataset, name in zip(datasets, names, strict=True)]
    keys = tuple(sorted({level for each in levels for level in each}))
    if len(keys) < 2:
        raise ValueError(f"the masks of {' and '.join(names)} have {len(keys)} classes; there must be two at least")
    space = LabelSpace("segmentation", names_of(datasets, names, keys), keys)
    held_out = _labelled(config, _held_out(config))
    val = None
    if held_out is not None:
        dataset, name = held_out
        _check_known(Counter(level for level in levels_of(dataset, name) if level not in keys), name)
        val = HeldOut(dataset, Table(np.zeros(0)), name)
    return Labels(space, tuple(Table(np.zeros(0)) for _ in datasets), val)


def _held_out(config: Config) -> tuple[Dataset, str] | None:
    """The images to measure on, and what they are called; None where the run's data have none beside them."""
    spec = config.method.val_data
    if spec is None:
        assert isinstance(config.data.train, str) or len(config.data.train) == 1
        folder = Path(sources(config.data)[0].path).expanduser()
        if not folder.is_dir() or held_out_of(folder) is None:
            return None
        spec = str(folder)
    try:
        dataset, split = open_held_out(spec)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"method.val_data: {error}") from error
    name = f"{split} of {PurePath(redact(spec)).name}"
    for learned in open_datasets(config.data):
        both = {str(shard) for shard in map(_place, learned.shards)} & {
            str(shard) for shard in map(_place, dataset.shards)
        }
        if both:
            raise ConfigError(
                f"method.val_data: {counted(len(both), 'shard')} of {name} are learned from, too, the first of them "
                f"{redact(min(both))}; hold images back that training never sees"
            )
        if learned.checksum == dataset.checksum:
            raise ConfigError(f"method.val_data: {name} holds the very samples that are learned from")
    return dataset, name


def _place(shard: Shard) -> str:
    return str(shard.resolve()) if isinstance(shard, Path) else shard.url


def _labelled(config: Config, held_out: tuple[Dataset, str] | None) -> tuple[Dataset, str] | None:
    """The same without the images that have no label."""
    if held_out is None:
        return None
    dataset, name = held_out
    wanted = are_labelled(config, dataset)
    return (dataset if wanted.all() or not wanted.any() else only(dataset, wanted)), name


class _Raw(NamedTuple):
    """Labels as stored: an integer or any JSON a sample; names of integers, as far as dataset.json tells."""

    values: Sequence[Any] | np.ndarray
    names: tuple[str, ...] | None
    dataset: Dataset
    field: str | None

    def told(self, sample: int) -> str:
        """A sample's label and where it lies, in words."""
        key, shard = self.dataset.key(sample)
        return f"{self.field or '.cls'} of sample {shown(key)} in {shard} is {shown(repr(self.values[sample]))}"


def _raw(dataset: Dataset, config: Config, name: str) -> _Raw:
    field = config.method.label
    if not are_labelled(config, dataset).all():  # of all samples, else they were left out
        key, shard = dataset.key(0)
        raise ValueError(
            f"all of {dataset.num_samples} samples of {name} have {_lacking(config)}, such as {shown(key)} in {shard}; "
            "fine-tuning learns from labels: pack those that have (a folder a class, or --labels), or name a field of "
            "the .json, method.label=FIELD"
        )
    if field is None:
        return _Raw(dataset.labels, dataset.classes, dataset, field)
    values = read_field(dataset, field)
    texts = read_texts(values) if config.method.task == "several_labels" else None  # lists of a CSV packed before
    return _Raw(values if texts is None else texts, None, dataset, field)


def _space(task: str, field: str | None, train: Sequence[_Raw], names: Sequence[str]) -> LabelSpace:
    if task == "numbers":
        together = np.concatenate([_numbers(raw, name) for raw, name in zip(train, names, strict=True)])
        mean, std = together.mean(axis=0), together.std(axis=0)
        if not (std > 0).all():
            raise ValueError(f"method.label {field}: all samples have the same number, so there is nothing to predict")
        count = together.shape[1]
        called = (str(field),) if count == 1 else tuple(f"{field}.{place}" for place in range(count))
        return LabelSpace(task, called, (), tuple(mean.tolist()), tuple(std.tolist()))
    if len({raw.names for raw in train}) > 1:
        raise ValueError(
            f"{' and '.join(names)} name their classes differently in dataset.json, so that a number of one may stand "
            "for another class of the other; pack them together"
        )
    counts: Counter[Any] = Counter()
    for raw, name in zip(train, names, strict=True):
        if isinstance(raw.values, np.ndarray):
            keys, times = np.unique(raw.values, return_counts=True)
            counts.update(dict(zip(keys.tolist(), times.tolist(), strict=True)))
        else:
            for value in raw.values:
                counts.update(_keys(value, task, name))
    keys = sorted(counts, key=lambda key: (isinstance(key, str), key))
    where = " and ".join(names)
    if len(keys) < 2:
        of = f"one class, {shown(_class_name(train[0], keys[0]))}" if keys else "no class"
        raise ValueError(f"the samples of {where} are of {of}; there must be two at least to tell apart")
    total = sum(counts.values())
    if task == "one_label" and len(keys) == total:
        raise ValueError(
            f"each of the {total} samples of {where} has a class of its own, such as {shown(str(keys[0]))}: nothing "
            "can be learned of that; is method.label the field that was meant?"
        )
    named = train[0].names
    is_named = named is not None and all(0 <= key < len(named) for key in keys)
    return LabelSpace(task, tuple(_class_name(train[0], key) if is_named else str(key) for key in keys), tuple(keys))


def _class_name(raw: _Raw, key: Any) -> str:
    """What the data call a class."""
    is_named = raw.names is not None and isinstance(key, int) and 0 <= key < len(raw.names)
    return raw.names[key] if raw.names is not None and is_named else str(key)


def _keys(value: Any, task: str, name: str) -> list[Any]:
    """What of a sample's label is counted."""
    values = value if task == "several_labels" else [value]
    if not isinstance(values, list):
        raise ValueError(
            f"a label of {name} is {shown(repr(value))}, and method.task several_labels takes lists; set "
            "method.task=one_label"
        )
    for key in values:
        if not isinstance(key, str | int):
            advice = {list: "several_labels", float: "numbers"}.get(type(key))
            advice = f"set method.task={advice}" if advice else "name another method.label"
            raise ValueError(f"a label of {name} is {shown(repr(key))}, not a class's name or number; {advice}")
    return list(dict.fromkeys(values))


def _numbers(raw: _Raw, name: str) -> np.ndarray:
    """(n, k) float64."""
    try:
        found = np.array(raw.values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        odd = next((sample for sample, value in enumerate(raw.values) if not _is_number(value)), None)
        such = str(error) if odd is None else raw.told(odd)
        raise ValueError(
            f"the labels of {name} are not a number each, or equally many ({such}); set method.task, or another "
            "method.label"
        ) from None
    found = found.reshape(len(found), -1)
    endless = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if len(endless):
        raise ValueError(
            f"{raw.told(int(endless[0]))}, no finite number{_and_others(len(endless))}: nothing can be learned of it; "
            "mend it, or let it be null and it is left out"
        )
    return found


def _and_others(count: int) -> str:
    return f" (and so of {count - 1:,} more)" if count > 1 else ""


def _is_number(value: Any) -> bool:
    """Whether a label is a number, or several."""
    try:
        return bool(np.array(value, dtype=np.float64).size)
    except (ValueError, TypeError):
        return False


def _table(space: LabelSpace, raw: _Raw, name: str) -> Table:
    if space.task == "numbers":
        found = _numbers(raw, name)
        if found.shape[1] != len(space.mean):
            raise ValueError(
                f"the labels of {name} are {found.shape[1]} numbers each, and those of training {len(space.mean)}"
            )
        return Table(((found - space.mean) / space.std).astype(np.float32))
    if isinstance(raw.values, np.ndarray):
        known = np.array(space.keys)
        places = np.searchsorted(known, raw.values).clip(max=len(known) - 1)
        _check_known(Counter(raw.values[known[places] != raw.values].tolist()), name)
        return Table(places)
    place_of = {key: place for place, key in enumerate(space.keys)}
    listed = [_keys(value, space.task, name) for value in raw.values]
    _check_known(Counter(key for keys in listed for key in keys if key not in place_of), name)
    values = np.array([place_of[key] for keys in listed for key in keys], dtype=np.int64)
    return Table(values, np.cumsum([len(keys) for keys in listed]) if space.task == "several_labels" else None)


def _check_known(unknown: Counter[Any], name: str) -> None:
    if not unknown:
        return
    told = ", ".join(f"{shown(str(key))} ({count} images)" for key, count in unknown.most_common(_MOST_NAMED))
    number = "1 class" if len(unknown) == 1 else f"{len(unknown)} classes"
    raise ValueError(
        f"{number} of {name} in no training image: {told}; the head has no output for it. Divide the data so that "
        "train has every class"
    )
