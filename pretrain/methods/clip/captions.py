"""The captions of a run's images: which is learned from at a step, and the vocabulary that they are written in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data_pipelines.datasets.captions import Captions
from data_pipelines.files import atomic_write
from data_pipelines.remote.urls import redact
from data_pipelines.rng import Purpose, Stream
from pretrain.config import Config
from pretrain.encoder_folder import TIMM_PREFIX, find_encoder
from pretrain.stream.datasets import open_datasets, sources
from pretrain.text.saved import has_text, read_vocabulary
from pretrain.text.vocabulary import FILE, Vocabulary, check_package, clip_vocabulary, trained

MOST_TRAINED_ON = 2**16  # samples whose captions a vocabulary is trained on, spread evenly over the data


class DrawnCaptions:
    """The captions of a step's rows as tokens."""

    def __init__(self, captions: Sequence[Captions], vocabulary: Vocabulary, context: int, seed: int) -> None:
        self.captions, self.vocabulary, self.context, self.seed = captions, vocabulary, context, seed

    def __deepcopy__(self, memo: object) -> DrawnCaptions:
        return self  # nothing of it changes, and open files have no copy

    def tokens(self, ids: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
        """(b, context) int64 of the samples `ids` (b, 2), data set and number, in `rows` (b,) of the global batch.

        Of several captions one is drawn, a function of (seed, step, row).
        """
        return self.vocabulary.encode(self.texts(ids, rows, step), self.context)

    def texts(self, ids: np.ndarray, rows: np.ndarray, step: int) -> list[str]:
        """The captions that `tokens` are of."""
        found = []
        for (number, sample), row in zip(ids.tolist(), rows.tolist(), strict=True):
            several = self.captions[number].of(sample)
            one = several[0]
            if len(several) > 1:
                one = several[Stream(self.seed, Purpose.CAPTIONS, step, row).integer(len(several))]
            found.append(one)
        return found


def check_captions(config: Config) -> None:
    """Raise ValueError unless every image has a caption, and what takes captions apart is there."""
    check_package()
    names = [redact(source.path) for source in sources(config.data)]
    for captions, name in zip(captions_of(config), names, strict=True):
        captions.check(name)
    if config.method.tower.vocabulary == "clip":
        clip_vocabulary()


def captions_of(config: Config) -> list[Captions]:
    """Of each data set of a run."""
    return [Captions(dataset, config.method.text) for dataset in open_datasets(config.data)]


def vocabulary_of(config: Config, captions: Sequence[Captions]) -> Vocabulary:
    """The vocabulary that the run began with, or that of the run whose weights it starts from, or a new one, which is
    kept with the run. All ranks find the same."""
    run = Path(config.runs) / config.name
    if (run / FILE).is_file():
        return read_vocabulary(run)
    made = _inherited(config.init_from)
    if made is None and config.method.tower.vocabulary == "clip":
        made = clip_vocabulary()
    if made is None:
        made = trained(_spread(captions), config.method.tower.vocab_size)
    if run.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        with atomic_write(run / FILE) as file:
            file.write(made.as_json().encode())
    return made


def _inherited(source: str | None) -> Vocabulary | None:
    if source is None or source.startswith(TIMM_PREFIX):
        return None
    folder = find_encoder(Path(source).expanduser())
    return read_vocabulary(folder) if has_text(folder) else None


def _spread(captions: Sequence[Captions]) -> Iterator[str]:
    total = sum(each.dataset.num_samples for each in captions)
    for each in captions:
        count = each.dataset.num_samples
        share = max(1, min(count, MOST_TRAINED_ON * count // total))
        for place in range(share):
            yield from each.of(place * count // share)
