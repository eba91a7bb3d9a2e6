"""Which samples a step sees: of a preset with its data, or of a run, as its checkpoints have written it down."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.balance import BalancedRows
from data_pipelines.datasets.bad_samples import Decoder
from data_pipelines.images.regions import Region, whole
from data_pipelines.sampler import Row, Sampler
from data_pipelines.transforms.backends.any_channels import fitting
from data_pipelines.transforms.frames import Frames
from data_pipelines.transforms.params import draw
from pretrain.checkpoints.folder import CheckpointFolder, damage, read_state
from pretrain.config import Config
from pretrain.config.load import ConfigError, check_batch, load_config
from pretrain.methods.registry import draw_fields_for
from pretrain.stream.datasets import sampler_of, training_datasets
from pretrain.stream.growth import opened_at


class Trace:
    """What is shown of the data of a preset or a run.

    Args:
        target: A preset, or the folder of a run.
        overrides: Changes to its configuration; of a run, where its data lie by now.
    """

    def __init__(self, target: str, overrides: Sequence[str]) -> None:
        folder = Path(target)
        stored = folder / "config.yaml"
        self.run = folder if stored.is_file() else None
        self.config: Config = load_config(stored if self.run else target, overrides)
        self._draw = draw_fields_for(self.config)
        self._fresh = sampler_of(self.config, training_datasets(self.config))
        self._state = None if self.run is None else _last_state(self.run, self.config)
        #: Steps that the run's newest checkpoint has behind it; of a preset, 0.
        self.reached: int = 0 if self._state is None else self._state.step

    def rows(
        self, step: int, rank: int | None = None, world_size: int = 1, crops: bool = False
    ) -> Iterator[dict[str, Any]]:
        """What each row of a step's batch shows, in their order: a dictionary for JSON.

        Args:
            step: Optimizer steps before it.
            rank: Only the rows of this rank of `world_size`.
            world_size: Ranks that share the batch.
            crops: Also decode each sample for its size, and tell the parameters of its crops (boxes in px of the
                image), the frames of a stack that are shown, a digest of its mask, and which sample took its place if
                it is bad.
        """
        check_batch(self.config, world_size)
        if rank is not None and not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}; ranks count from 0 to world size - 1")
        sampler = self._sampler(step)
        share = sampler.batch_size // world_size
        numbers = range(sampler.batch_size) if rank is None else range(rank * share, (rank + 1) * share)
        names = {part.dataset: part.name for part in sampler.segment(step).parts}
        data = self.config.data
        decoders = {key: Decoder(d, data.channels, 1.0, bits=data.bits) for key, d in sampler.datasets.items()}
        for number, row in zip(numbers, BalancedRows(sampler, self.config.views).rows(step, numbers), strict=True):
            key, shard = sampler.datasets[row.dataset].key(row.sample)
            told = {
                "row": number,
                "rank": number // share,
                "dataset": row.dataset,
                "name": names[row.dataset],
                "sample": row.sample,
                "epoch": row.epoch,
                "repeat": row.repeat,
                "key": key,
                "shard": str(shard),
            }
            if crops:
                told |= self._crops(decoders[row.dataset], row, sampler.seed) | self._mask(sampler.seed, step, number)
            yield told

    def _sampler(self, step: int) -> Sampler:
        if self._state is None or self.run is None:
            return self._fresh
        return opened_at(step, Sampler.continued(self._state.order, {}), self._fresh, self.run)

    def _crops(self, decoder: Decoder, row: Row, seed: int) -> dict[str, Any]:
        sizes: list[tuple[int, int]] = []

        def note(size: tuple[int, int]) -> Region:
            sizes.append(size)
            return whole(size)

        data, frames = self.config.data, list[int]()

        def wanted(available: int) -> list[int]:
            showing = (seed, row.dataset, row.epoch, row.sample)
            frames[:] = Frames(data.frames, data.frame_stride).drawn(showing, available)
            return frames

        shown = decoder.read(row.sample, note, wanted if data.frames > 1 else None).sample
        told = {"frames": frames} if data.frames > 1 else {}
        params = draw(fitting(self.config.views, self.config.data.channels)[0], row.identity(seed), sizes[-1])
        crops = [crop._asdict() for crop in params]
        return {"shown_sample": shown, "image_size": list(sizes[-1]), **told, "crops": crops}

    def _mask(self, seed: int, step: int, row: int) -> dict[str, Any]:
        if self._draw is None:
            return {"mask": None}
        digest = hashlib.sha256()
        for name, field in sorted(self._draw(seed, step, row).items()):
            digest.update(name.encode() + field.tobytes())
        return {"mask": digest.hexdigest()[:16]}


def _last_state(run: Path, config: Config) -> Any:
    for path in reversed(CheckpointFolder(run, config.checkpoint).all()):
        if damage(path) is None:
            return read_state(path)
    return None
