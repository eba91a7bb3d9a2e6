"""k-NN accuracy of the frozen encoder while it trains, on labelled images that are not trained on.

The run's data stay unlabelled to it: the labels are only looked at here, and nothing of what comes out is learned from.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipelines.datasets.dataset import NO_LABEL, Dataset
from data_pipelines.datasets.groups import groups_of
from data_pipelines.datasets.held_out import held_out_of, open_held_out
from data_pipelines.eval_loader import center_crops
from data_pipelines.remote.urls import redact
from eval.probes.knn import knn_accuracy
from pretrain.config import Config
from pretrain.config.load import ConfigError
from pretrain.diagnostics.features import frozen_features
from pretrain.diagnostics.online import measured
from pretrain.encoders import Encoder
from pretrain.encoders.saved import headline_feature
from pretrain.engines.collectives import all_gather_objects
from pretrain.methods.registry import spec_of

CHUNK = 64  # images of a forward pass: always the same ones together, so that their number of ranks changes no bit
FEWEST = 30  # labelled samples of which an accuracy says anything
MOST_LOOKED_AT = 4  # times the samples that are wanted, of data in groups
SEED = 0  # of which samples are taken: the same ones in every run, so that runs compare


@dataclass(frozen=True)
class KnnData:
    """The labelled samples that vote and those that are classified."""

    dataset: Dataset
    bank: np.ndarray  # sample numbers
    queries: np.ndarray
    classes: np.ndarray  # their labels, ascending; k-NN counts them from 0, as they may be any integers

    @property
    def digest(self) -> str:
        """Equal where the same samples vote and are classified, with the same labels."""
        digest = hashlib.sha256(self.dataset.checksum.encode())
        for values in (self.bank, self.queries, self.dataset.labels[self.bank], self.dataset.labels[self.queries]):
            digest.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
        return digest.hexdigest()


def find_data(config: Config) -> tuple[str | None, str]:
    """The shards that k-NN takes, and a line that says so; None with the reason where there are none.

    Reads the names of files only.
    """
    settings = config.diagnostics
    if settings.knn_every_epochs is None or spec_of(config.method).exports != "encoder":
        return None, ""
    height, width = config.views.global_size
    off = "online k-NN is off: "
    if height != width:
        return None, f"{off}it takes squares and views.global_crops are {height}x{width} px"
    if settings.knn_data is not None:
        return settings.knn_data, _on(config, settings.knn_data)
    advice = "; diagnostics.knn_data=LABELLED_SHARDS turns it on, knn_every_epochs=null drops this line"
    if not isinstance(config.data.train, str):
        return None, f"{off}the run learns from several data sets{advice}"
    folder = Path(config.data.train).expanduser()
    split = held_out_of(folder) if folder.is_dir() else None
    if split is None:
        return None, f"{off}there are no val-*.tar in {redact(config.data.train)}, nor test-*.tar{advice}"
    return config.data.train, _on(config, config.data.train) + (
        " (its test split: there is no val)" * (split == "test")
    )


def _on(config: Config, spec: str) -> str:
    settings = config.diagnostics
    return (
        f"online k-NN every {settings.knn_every_epochs:g} epochs: up to {settings.knn_queries} labelled samples "
        f"of {redact(spec)} by the nearest of up to {settings.knn_bank} others"
    )


def open_data(spec: str, num_bank: int, num_queries: int) -> KnnData:
    """Bank and queries out of the labelled samples of `spec`, without overlap: of a folder, of its held-out split.

    Of fewer than are asked for, the shares stay. Raises ValueError where there are too few, or one class.
    """
    dataset, _ = open_held_out(spec)
    labelled = np.flatnonzero(dataset.labels != NO_LABEL)
    wanted = num_bank + num_queries
    if len(labelled) < min(FEWEST, wanted):
        raise ValueError(
            f"{redact(spec)} has {len(labelled)} labelled samples of {dataset.num_samples}; k-NN needs {FEWEST} at "
            "least"
        )
    share = min(1.0, len(labelled) / wanted)
    chosen = np.random.default_rng(SEED).permutation(labelled)
    num_bank, num_queries = max(1, int(num_bank * share)), max(1, int(num_queries * share))
    bank, queries = _drawn(dataset, chosen, num_bank, num_queries)
    classes = np.unique(dataset.labels[np.concatenate([bank, queries])])
    if len(classes) < 2:
        raise ValueError(f"all labelled samples of {redact(spec)} are of one class; k-NN tells classes apart")
    return KnnData(dataset, np.sort(bank), np.sort(queries), classes)


def _drawn(dataset: Dataset, order: np.ndarray, num_bank: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """The samples that vote and those that are classified, in this order of them.

    Where the data were packed by groups, such as of patients, no group is among both; unless there is one only, or a
    sample belongs to none.
    """
    plain = order[:num_bank], order[num_bank : num_bank + num_queries]
    if dataset.group_key is None:
        return plain
    order = order[: MOST_LOOKED_AT * (num_bank + num_queries)]
    try:
        groups = groups_of(dataset, np.isin(np.arange(dataset.num_samples), order), dataset.group_key, {})[order]
    except ValueError:
        return plain
    of_queries = np.zeros(len(order), dtype=bool)
    for group in list(dict.fromkeys(groups.tolist()))[:-1]:  # the last one is left to vote
        if of_queries.sum() >= num_queries:
            break
        of_queries |= groups == group
    if not of_queries.any():
        return plain
    return order[~of_queries][:num_bank], order[of_queries][:num_queries]


def named_data(config: Config) -> KnnData | None:
    """The data that the configuration names for k-NN, where it does; ConfigError where they do not serve."""
    settings = config.diagnostics
    if find_data(config)[0] is None or settings.knn_data is None:
        return None
    try:
        return open_data(settings.knn_data, settings.knn_bank, settings.knn_queries)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"diagnostics.knn_data: {error}") from error


def knn_line(metrics: Mapping[str, float]) -> str:
    """`k-NN 31.0% (standard error 1.5%), 5-shot 24.1%, RankMe 31.2 in 1.2 s; 0.40% of the time so far`."""
    accuracy, error = (metrics[name] for name in ("knn_top1", "knn_standard_error"))
    beside = f", 5-shot {metrics['few_shot_5']:.1%}" if "few_shot_5" in metrics else ""
    beside += f", RankMe {metrics['held_out_rankme']:.1f}" if "held_out_rankme" in metrics else ""
    return (
        f"k-NN {accuracy:.1%} (standard error {error:.1%}){beside} in {metrics['knn_seconds']:.1f} s; "
        f"{metrics['knn_share']:.2%} of the time so far"
    )


class OnlineKnn:
    """Measures the accuracy, and what `diagnostics.online` names beside it, on all ranks together. The data are opened
    when they are first needed, but where they are named by the configuration in `agree`, so that a mistake shows before
    training.

    Whether there is something to measure is rank 0's decision, which looks at the disk: each rank sees the files of its
    own node. normalise: from crops as stored to what the encoder takes.
    """

    def __init__(
        self, config: Config, normalise: Callable[[Tensor], Tensor], device: torch.device, rank: int = 0
    ) -> None:
        self.settings, self.config = config.diagnostics, config
        self.headline = headline_feature(config)
        self.normalise, self.device = normalise, device
        self.seconds = 0.0  # spent here since the start
        #: The shards and the line of `find_data`, which are rank 0's to tell.
        self.found: tuple[str | None, str] = find_data(config) if rank == 0 else (None, "")
        self._data: KnnData | None = None

    @property
    def is_on(self) -> bool:
        return self.found[0] is not None

    @property
    def line(self) -> str:
        """Whether and on what it is measured, or why not."""
        return self.found[1]

    def agree(self, found: tuple[str | None, str] | list[str | None]) -> str:
        """Take over what rank 0 has `found`, and the line to say. Collective: where a rank can't open shards that the
        configuration names, k-NN is off on all of them."""
        spec, line = found
        self.found = spec, line or ""
        if self.is_on and self.settings.knn_data is not None:
            self._fails(self._open(), trains=False)
        return self.line

    def _differs(self) -> str | None:
        """The reason where this rank sees other data than rank 0, as on a node with a stale copy: it would give numbers
        of its own, or none. Collective."""
        data = self._data
        mine = None if data is None else data.digest
        told = all_gather_objects(mine, self.device)
        if mine is not None and told[0] is not None and mine != told[0]:
            return f"{redact(str(self.found[0]))} holds other labelled samples here than rank 0 sees"
        return None

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """knn_top1 of the queries, its standard error, what is measured beside it, and the seconds all of it took;
        inside of `evaluating`. Collective.

        The same to the last bit on any number of ranks of one kind. Without data that serve, {} and never again.
        """
        began = time.monotonic()
        reason, other = self._open(), self._differs()  # both by every rank
        if self._fails(reason or other):
            return {}
        assert self._data is not None
        data = self._data
        samples = np.concatenate([data.bank, data.queries])
        features, read, reason = self._features(encoder, samples)
        if self._fails(reason):
            return {}
        numbers = np.searchsorted(data.classes, data.dataset.labels[samples])
        labels = torch.from_numpy(numbers.astype(np.int64)).to(self.device)
        bank, queries = torch.zeros_like(read), torch.zeros_like(read)
        bank[: len(data.bank)], queries[len(data.bank) :] = read[: len(data.bank)], read[len(data.bank) :]
        if not bank.any() or not queries.any():
            return {}
        k = min(self.settings.knn_k, int(bank.sum()))
        given = features[bank], labels[bank], features[queries], labels[queries]
        with torch.autocast(self.device.type, enabled=False):  # votes and spectra are not the encoder's to round
            accuracy = knn_accuracy(*given, num_classes=len(data.classes), ks=(k,))[k]["top1"]
            beside = measured(self.settings.online, *given)
        seconds = time.monotonic() - began
        self.seconds += seconds
        error = (accuracy * (1 - accuracy) / int(queries.sum())) ** 0.5
        return {"knn_top1": accuracy, "knn_standard_error": error, **beside, "knn_seconds": seconds}

    def _open(self) -> str | None:
        """Open the data, if they are not open yet; the reason where that fails."""
        if self._data is None:
            try:
                spec = self.found[0]
                assert spec is not None
                self._data = open_data(spec, self.settings.knn_bank, self.settings.knn_queries)
            except Exception as error:  # whatever it is: the other ranks wait to be told
                return str(error) or repr(error)
        return None

    def _fails(self, reason: str | None, *, trains: bool = True) -> bool:
        """Whether any rank has a reason not to go on: then k-NN is off, and training is not. Collective.

        The line that says so is printed where the run `trains` already.
        """
        told = all_gather_objects(reason, self.device)
        reasons = [f"rank {rank}: {each}" if len(told) > 1 else each for rank, each in enumerate(told) if each]
        if reasons:
            self.found = None, f"online k-NN is off{' from here on' if trains else ''}: {reasons[0]}"
            if trains and dist.get_rank() == 0:
                print(self.line, flush=True)
        return bool(reasons)

    def _features(self, encoder: Encoder, samples: np.ndarray) -> tuple[Tensor, Tensor, str | None]:
        """Features (n, d) of all samples on every rank, which of them are images (n,) bool, and what failed here.

        Chunk c is rank c mod R's.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        chunks = [samples[first : first + CHUNK] for first in range(0, len(samples), CHUNK)]
        mine = chunks[rank::world_size]
        size, data = self.config.views.global_size[0], self.config.data
        read = torch.zeros(len(samples), device=self.device)
        place = {int(sample): position for position, sample in enumerate(samples)}
        features = reason = None
        crops = self._crops(mine, size)
        while True:
            try:
                images, numbers = next(crops)
            except StopIteration:
                break
            except Exception as error:  # a file system that fails is no reason not to train, nor to let others wait
                reason = str(error) or repr(error)
                break
            values = frozen_features(encoder, self.normalise(images.to(self.device)), self.headline)
            features = values.new_zeros(len(samples), values.shape[1]) if features is None else features
            where = torch.tensor([place[number] for number in numbers.tolist()], device=self.device)
            features[where], read[where] = values, 1.0
        if features is None:  # more ranks than chunks, or nothing could be read: only its width is wanted
            kind = torch.uint16 if data.bits == 16 else torch.uint8
            blank = torch.zeros(1, data.planes, size, size, dtype=kind, device=self.device)
            width = frozen_features(encoder, self.normalise(blank), self.headline).shape[1]
            features = torch.zeros(len(samples), width, device=self.device)
        if world_size > 1:  # each row is some rank's, and zero on the others
            dist.all_reduce(features)
            dist.all_reduce(read)
        return features, read > 0, reason

    def _crops(self, chunks: list[np.ndarray], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The readable images of each chunk, with their sample numbers."""
        assert self._data is not None
        data = self.config.data
        samples = [int(sample) for chunk in chunks for sample in chunk]
        for images, _, numbers in center_crops(
            self._data.dataset, size, batch_size=CHUNK, channels=data.channels, bits=data.bits, samples=samples,
            frames=data.frames, frame_stride=data.frame_stride, threads=data.threads,
        ):  # fmt: skip
            yield images, numbers
