"""Whether a store was made of the images that its data hold now."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.store.encoding import Crops, digests_of

if TYPE_CHECKING:
    from data_pipelines.datasets.dataset import Dataset

MOST_COMPARED = 32  # images of a store, or of a part of it


def check_same_images(
    samples: np.ndarray, digests: np.ndarray, dataset: Dataset, crops: Crops, patch: int, place: Path
) -> None:
    """Raise ValueError where `samples` (n,) of `dataset` are other images than those of which a store at `place` keeps
    the `digests` (n,): some of them, evenly spaced, are read and compared.

    The identity of a store has names and lengths of the data, which may be the same for other images.
    """
    from data_pipelines.eval_loader import center_crops, whole_images

    rows = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), MOST_COMPARED)).round().astype(np.int64))
    wanted = dict(zip(samples[rows].tolist(), digests[rows].tolist(), strict=True))
    asked: dict[str, Any] = {"channels": crops.channels, "bits": crops.bits, "samples": list(wanted)}
    found: Iterable[tuple[Any, Any, Any]]
    if crops.native:
        found = whole_images(dataset, (crops.size // patch) ** 2, patch, batch_size=MOST_COMPARED, **asked)
    else:
        asked |= {"frames": crops.frames, "frame_stride": crops.frame_stride}
        found = center_crops(dataset, crops.size, batch_size=MOST_COMPARED, **asked)
    for images, _, numbers in found:
        for image, number in zip(images, numbers.tolist(), strict=True):
            if digests_of(np.asarray(image)[None])[0] != wanted[number]:
                key, shard = dataset.key(number)
                raise ValueError(
                    f"{place} was made when {key} of {shard} was another image; make it again with `selfsight embed`, "
                    "into another folder, or remove that one"
                )
