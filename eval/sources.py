"""Where a probe's features come from: a store that is given, what an earlier command has kept, or the encoder now."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from data_pipelines.remote.cache_folder import gigabytes
from eval.base import Change, FeatureSet
from eval.embed import versions
from eval.features import extract
from eval.store.cache import FeatureCache, NoRoomError
from eval.store.decode import row_bytes
from eval.store.description import VERSION, Description, descriptions
from eval.store.encoding import Crops, FrozenEncoder, encoder_digest
from eval.store.growing import write_arrays
from eval.store.precision import Precision
from eval.store.reading import StoredFeatures, open_store
from eval.store.same_images import check_same_images
from eval.target import Target, open_target

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset
    from pretrain.encoders import Encoder

#: What of two stores' identities must agree so that one is read in the other's place.
_MUST_AGREE = ("encoder", "data", "crops", "last_blocks")


@dataclass
class FeatureSource:
    """Features of the centre crops of a target's data.

    precision: of what is computed here. tokens: whether the patch tokens are wanted, too.
    store: by the data's checksum, of the target's own encoder; empty without one.
    say: is told a line that matters.
    """

    target: Target
    precision: Precision
    device: str
    batch_size: int
    last_blocks: int
    tokens: bool
    progress: bool
    say: Callable[[str], None]
    store: dict[str, StoredFeatures] = field(default_factory=dict)
    cache: FeatureCache = field(default_factory=FeatureCache)

    @property
    def crops(self) -> Crops:
        """As the target takes them."""
        target = self.target
        told: dict[str, Any] = {"frames": target.frames, "frame_stride": target.frame_stride, "native": target.native}
        return Crops(target.image_size, target.channels, target.bits, target.mean, target.std, **told)

    @property
    def arithmetic(self) -> str:
        """Of the target's own features."""
        for stored in self.store.values():
            return str(stored.description.identity["arithmetic"])
        return self.precision.arithmetic

    def features(
        self, encoder: Encoder, dataset: Dataset, samples: np.ndarray, change: Change | None = None
    ) -> FeatureSet:
        """Features of these ascending `samples` (n,), less those that can't be read; what is changed is never kept."""
        if change is None and encoder is self.target.encoder and self.store:
            return self.store[dataset.checksum].feature_set(samples)
        if change is not None:
            return self._in_memory(encoder, dataset, samples, change)
        frozen = FrozenEncoder(
            encoder, self.crops, device=self.device, arithmetic=self.precision.arithmetic,
            last_blocks=self.last_blocks, tokens=self.tokens,
        )  # fmt: skip
        key = self._key(frozen, dataset, samples)
        beside = 6 if self.tokens and self.target.native else 3  # numbers of an image
        num_bytes = len(samples) * (row_bytes(key) + beside * np.dtype(np.int64).itemsize) + (1 << 16)

        def make(folder: Path, digest: str) -> None:
            write_arrays(
                frozen, dataset, samples, self.precision.dtype, folder, digest, batch_size=self.batch_size,
                progress=self.progress,
            )  # fmt: skip

        try:
            return self.cache.open(key, frozen.layout, num_bytes, make, self.say).feature_set()
        except NoRoomError as error:
            why = str(error)
        free = psutil.virtual_memory().available
        in_memory = len(samples) * frozen.layout.dim * 4
        advice = "write a store where there is room (selfsight embed) and name it by --store"
        if self.tokens:
            raise ValueError(f"the patch tokens can't be kept for the probe: {why}; {advice} (--tokens)")
        if in_memory > free:
            raise ValueError(
                f"the features can't be kept: {why}. In memory they would take {gigabytes(in_memory)}, and "
                f"{gigabytes(free)} is free; {advice}"
            )
        self.say(f"features are held in memory ({gigabytes(in_memory)}) and not kept: {why}")
        return self._in_memory(encoder, dataset, samples)

    def _in_memory(
        self, encoder: Encoder, dataset: Dataset, samples: np.ndarray, change: Change | None = None
    ) -> FeatureSet:
        target = self.target
        return extract(
            encoder, dataset, size=target.image_size, mean=target.mean, std=target.std, channels=target.channels,
            bits=target.bits, frames=target.frames, frame_stride=target.frame_stride,
            device=self.device, batch_size=self.batch_size, last_blocks=self.last_blocks,
            arithmetic=self.precision.arithmetic, progress=self.progress, samples=samples, change=change,
            native=target.native,
        )  # fmt: skip

    def _key(self, encoder: FrozenEncoder, dataset: Dataset, samples: np.ndarray) -> dict[str, Any]:
        """Everything that makes them other features."""
        return {
            "version": VERSION,
            "libraries": versions(("torch", "timm", "pillow")),  # any of them may change the numbers
            "encoder": encoder_digest(encoder.encoder, self.target.architecture),
            "data": dataset.checksum,
            "state": dataset.state,
            "samples": hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest(),
            "crops": self.crops.as_json(),
            "arithmetic": self.precision.arithmetic,
            "features": self.precision.features,
            "layout": encoder.layout.as_json(),
            "tokens": "float16" if self.tokens else None,
            "last_blocks": self.last_blocks,
        }

    def read_store(self, folder: str | Path, datasets: dict[str, Dataset]) -> None:
        """Take the target's features of the `datasets` from a store from now on.

        Raises ValueError where it holds those of another encoder or of other data or crops, or no tokens where they are
        wanted; and as `open_store`.
        """
        found = {str(each.identity["data"]): (place, each) for place, each in descriptions(folder).values()}
        digest = encoder_digest(self.target.encoder, self.target.architecture)
        for name, dataset in datasets.items():
            wanted = {
                "encoder": digest, "data": dataset.checksum, "crops": self.crops.as_json(),
                "last_blocks": self.last_blocks,
            }  # fmt: skip
            if dataset.checksum not in found:
                raise ValueError(
                    f"{folder} holds no features of {name} ({dataset.num_samples:,} samples, the first shard "
                    f"{dataset.shards[0]}): it is of other data, or of other splits; make them with `selfsight embed`"
                )
            place, there = found[dataset.checksum]
            part = Description({key: there.identity[key] for key in _MUST_AGREE}, {})
            if differences := part.differences(Description(wanted, {})):
                raise ValueError(f"{place} holds other features than are to be probed ({'; '.join(differences)})")
            if self.tokens and there.identity["tokens"] is None:
                raise ValueError(f"{place} holds no patch tokens, and a probe reads them; make it again with --tokens")
            (stored,) = open_store(place, self.say).values()
            patch = self.target.encoder.patch
            check_same_images(stored.samples, stored.digests, dataset, self.crops, patch, place)
            self.store[dataset.checksum] = stored


def target_of_store(folder: str, image_size: int | None = None, native: bool = False) -> tuple[str, Target]:
    """The encoder that a store was made with, and its name for `open_target`; `native` where the store's images were.

    Raises ValueError where it is not there any more, or is another one by now.
    """
    _, description = next(iter(descriptions(folder).values()))
    source = str(description.about["source"])
    advice = f"name the encoder as TARGET, and this folder by --store {folder}"
    crops = description.identity["crops"]
    try:
        target = open_target(source, image_size or int(crops["size"]), native=native or crops.get("native", False))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder} was made with {source}, which can't be opened ({error}); {advice}") from error
    if encoder_digest(target.encoder, target.architecture) != description.identity["encoder"]:
        raise ValueError(f"{folder} was made with what {source} was then; by now it is another encoder; {advice}")
    return source, target
