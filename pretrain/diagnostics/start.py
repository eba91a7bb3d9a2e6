"""How far a run has gone from its start, on images that always are the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.datasets.dataset import Dataset
from data_pipelines.datasets.held_out import held_out_of, open_held_out
from data_pipelines.eval_loader import center_crops
from eval import label_free
from pretrain.config import Config
from pretrain.continuing.low_rank import without_changes
from pretrain.diagnostics.features import headline
from pretrain.encoders import Encoder
from pretrain.encoders.saved import headline_feature
from pretrain.methods.frozen import Frozen
from pretrain.methods.gram import gram_loss

CHUNK = 64  # images of a forward pass


def linear_cka(ours: Tensor, theirs: Tensor) -> float:
    """How alike two sets of features (n, d), (n, e) of the same images are, 1 where one is the other turned and scaled:
    linear CKA (Kornblith et al. 2019, section 3), in fp64."""
    x, y = (features.double() - features.double().mean(dim=0) for features in (ours, theirs))
    within = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / within.clamp_min(1e-30))


def weight_distance(encoder: Encoder, start: Encoder) -> float:
    """Norm of the difference of an encoder's weights, with its changes, from the start's, relative to the latter's."""
    ours, apart, norm = without_changes(encoder, encoder.state_dict()), 0.0, 0.0
    for name, value in start.state_dict().items():
        if value.is_floating_point() and name in ours:
            theirs = value.double()
            apart += float((ours[name].to(theirs.device).double() - theirs).square().sum())
            norm += float(theirs.square().sum())
    return (apart / max(norm, 1e-30)) ** 0.5


class FromStart:
    """Measures an encoder against the start; on one rank, which needs no other.

    datasets: of the run's training images, of which evenly spaced ones are taken where nothing is held out.
    """

    def __init__(
        self, config: Config, start: Frozen, normalise: Callable[[Tensor], Tensor], datasets: list[Dataset],
        device: torch.device,
    ) -> None:  # fmt: skip
        assert config.continuing is not None
        self.config, self.start, self.normalise, self.device = config, start, normalise, device
        self.headline = headline_feature(config)
        self.dataset, self.split = datasets[0], "training"
        if isinstance(config.data.train, str):
            folder = Path(config.data.train).expanduser()
            if folder.is_dir() and held_out_of(folder) is not None:
                self.dataset, self.split = open_held_out(folder)
        count = min(config.continuing.measure_images, self.dataset.num_samples)
        self.samples = np.linspace(0, self.dataset.num_samples - 1, count).astype(np.int64)

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """drift_weights, the relative distance of weights; drift_cka, of features by linear CKA (1: none);
        drift_patches, mean squared difference of the similarities of an image's patches; slice_rankme and
        slice_patch_rank, RankMe of the images and the mean effective rank within an image's patches.

        Of a whole encoder, inside of `evaluating`.
        """
        ours, theirs, patches, ranks, count = [], [], 0.0, 0.0, 0
        for crops in self._crops():
            images = self.normalise(crops.to(self.device))
            now, then = encoder(images), self.start(images)
            ours.append(headline(now, self.headline))
            theirs.append(headline(then, self.headline))
            patches += float(gram_loss(now.tokens, then.tokens)) * len(images)
            ranks += float(label_free.ranks_within(now.tokens.float()).sum())
            count += len(images)
        if not count:
            return {}
        present, past = torch.cat(ours), torch.cat(theirs)
        if not present.isfinite().all():  # the next loss says so, and is told of with the layer
            return {}
        start = self.start.network
        assert isinstance(start, Encoder)
        return {
            "drift_weights": weight_distance(encoder, start),
            "drift_cka": linear_cka(present, past),
            "drift_patches": patches / count,
            "slice_rankme": label_free.rankme(present)["value"],
            "slice_patch_rank": ranks / count,
        }

    def _crops(self) -> Iterator[Tensor]:
        data, size = self.config.data, self.config.views.global_size[0]
        for images, _, _ in center_crops(
            self.dataset, size, batch_size=CHUNK, channels=data.channels, bits=data.bits, samples=self.samples,
            frames=data.frames, frame_stride=data.frame_stride, threads=data.threads,
        ):  # fmt: skip
            yield images
