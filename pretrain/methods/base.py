"""The seam between the training loop and what is learned: a Method is the one module that DeepSpeed wraps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import repeat
from torch import Tensor, nn

from data_pipelines.loader import Batch
from pretrain.encoders import Encoder, Mask, side_losses
from pretrain.encoders.attention_maps import attention_pictures
from pretrain.encoders.native import PackedImages
from pretrain.engines.ema import share_running_statistics, update_ema
from pretrain.engines.schedules import Timeline
from pretrain.stream import pixels
from pretrain.stream.native_batch import packed_images


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels in 0 .. 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Beside(NamedTuple):
    """What is saved with a frozen encoder, beside it.

    module: holds the encoder as well. write: from a new folder, the module's whole state dict and the encoder's card;
    it makes the folder, which is an encoder folder like any other.
    """

    module: nn.Module
    write: Callable[[Path, dict[str, Tensor], Any], None]


class Method(nn.Module):
    """What is learned from a batch. Subclasses own their encoder, heads, slow averages and state.

    `forward` is called once a micro-batch with that micro-batch and the optimizer step it belongs to; it gives a
    dictionary with a scalar "loss" and further scalars to log. The loss is normalised by counts over the GLOBAL
    batch, so that the mean over ranks and micro-batches is the loss of the whole batch.
    """

    encoder: Encoder | None

    def __init__(self, normalisation: Normalisation, timeline: Timeline) -> None:
        super().__init__()
        self.timeline = timeline
        self.encoder = None  # for a method that has none
        self.register_buffer("mean", torch.tensor(normalisation.mean), persistent=False)
        self.register_buffer("std", torch.tensor(normalisation.std), persistent=False)

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """`forward`, and in its loss what the encoder adds to it."""
        with side_losses.collecting() as beside:
            outputs = super().__call__(batch, step)
        return beside.with_outputs(outputs)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} does not implement forward")

    def before_step(self, step: int, micro_batches: list[Batch], look: Callable[[Batch], object]) -> None:
        """What must be known of all of this rank's micro-batches before the first is learned from; on all ranks.

        `look(batch)` is `forward` without gradients, as the engine runs it: under ZeRO 3 there is no other way.
        """

    def after_step(self, step: int, took: Tensor | None = None) -> None:
        """Slow averages and centres: once after each optimizer step, on all ranks.

        Here the running statistics of batch normalisation, which each rank counts over its own micro-batches, are
        brought together, and the slow averages moved. Subclasses call it first. `took`: () bool on the device, the
        same on all ranks, whether the step was taken or left out; None: it was. What a step that is left out has done
        to buffers is undone by who calls.
        """
        share_running_statistics(self)
        pairs = self.ema_pairs()
        if pairs:
            update_ema(pairs, 1 - self.ema_momentum(step), took)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """While it lasts, what passes leave behind in training, beside buffers, is dropped at its end."""
        yield

    def encoder_loaded(self) -> None:
        """Called when other weights were put into `encoder` before training, for what must follow them."""

    def blocks(self) -> list[nn.Module]:
        """What `engine.compile` compiles and `engine.activation_checkpointing` computes again in the backward pass:
        modules that are called as such and hold most of the work. What is counted or kept happens outside them.

        Those that are only used without gradients, such as a teacher's, are compiled alone.
        """
        return [] if self.encoder is None else self.encoder.blocks()

    def frozen_encoder(self) -> Encoder | None:
        """The encoder that is exported and probed; None for a method that trains a tokenizer."""
        return self.encoder

    def beside_encoder(self) -> Beside | None:
        """What is saved beside the frozen encoder, such as a trained head."""
        return None

    def tokenizer(self) -> nn.Module | None:
        """The tokenizer that is exported, where there is no encoder to export; see `tokenizers/saved.py`."""
        return None

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The slow averages and what each follows: the parameters of the former have the names of the latter's."""
        return []

    def ema_momentum(self, step: int) -> float:
        """The share of the slow averages that stays, at optimizer step `step`."""
        raise TypeError(f"{type(self).__name__} has slow averages and does not implement ema_momentum")

    def pinned(self) -> dict[str, str]:
        """Checksums of the files beside the data that the run learns from: it may be resumed with these only."""
        return {}

    def no_decay(self, name: str) -> bool:
        """Whether a parameter, beside biases, norms and tokens, is exempt from weight decay."""
        return False

    def frozen_until(self, name: str) -> int:
        """Optimizer steps during which a parameter keeps its start value."""
        return 0

    def bounds(self, name: str) -> tuple[float, float] | None:
        """Between which values a parameter is kept by each optimizer step; None: it may go anywhere."""
        return None

    def schedules(self, step: int) -> dict[str, float]:
        """What the method itself changes with time, as of the end of optimizer step `step`, to log."""
        return {}

    def is_measured(self, step: int) -> bool:
        """Whether it is time, after `step` steps, for `measure`; on all ranks alike."""
        return False

    def measure(self, step: int, device: torch.device) -> dict[str, float]:
        """What the method itself finds out on held-out images, to log.

        Called in evaluation mode, without gradients, at the run's precision. Collective.
        """
        return {}

    def measured_line(self, metrics: dict[str, float]) -> str | None:
        """What `measure` has found, in a line for the log; None where it has found nothing."""
        return None

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Named pictures (n, c, h, w) uint8 of what the method does with a batch; by default, of what its encoder sees.

        Called in evaluation mode, of a method whose parameters are whole.
        """
        if self.encoder is None or "global_patches" in batch:
            return {}
        crops = batch["global_crops"][:, 0]
        return attention_pictures(self.encoder, self.normalise(crops), crops, self.show)

    def normalise(self, crops: Tensor) -> Tensor:
        """(..., c, h, w) uint8 or uint16 pixels, of stacks (..., t * c, h, w), to floats of mean 0 and deviation 1 over
        the data set."""
        return pixels.normalised(crops, self.mean, self.std)

    def packed(self, batch: Batch, kind: str = "global") -> PackedImages:
        """The `kind` crops of a batch whose crops keep their own shape, normalised."""
        return packed_images(batch, self.mean, self.std, kind)

    def to_pictures(self, images: Tensor, like: Tensor) -> Tensor:
        """The inverse of `normalise` as uint8: the pixels of 8-bit grey and RGB, else something visible of them. Frames
        of a stack stand beside each other."""
        channels = len(self.mean)
        return pixels.pictures(pixels.strip(images, channels), pixels.strip(like, channels), self.mean, self.std)

    def show(self, crops: Tensor) -> Tensor:
        """Crops (..., c, h, w) as `to_pictures` shows images made from them."""
        shown = pixels.strip(crops, len(self.mean))
        return shown if pixels.is_plain(shown) else self.to_pictures(self.normalise(crops), crops)


def mask_of(batch: Batch, num_visible: int | None = None) -> Mask:
    """The masks that the loader drew for a batch."""
    return Mask(drop=batch.get("drop_mask"), token=batch.get("token_mask"), num_visible=num_visible)


def rows_at(values: Tensor, indices: Tensor) -> Tensor:
    """Rows (b, m, d) of `values` (b, n, d)."""
    return values.gather(1, repeat(indices, "b m -> b m d", d=values.shape[-1]))
