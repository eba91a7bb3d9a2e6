"""The rows of a probe's table: the encoder, untrained ones, raw pixels; each measured under the same protocol."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from data_pipelines.datasets.captions import Captions
from eval.base import Again, Change, FeatureSet, NativeTokens, Painted, Store
from eval.dense import maps_for, native_pixel_tokens, pixel_tokens
from eval.features import Keys, centred, pixels
from eval.outcomes import DRAWS, Outcome, undefined_draws
from eval.patches import AnyTokens
from eval.protocol import Protocol, score
from eval.sources import FeatureSource
from eval.splits import Splits
from eval.stratified import classes_not_held_out
from eval.target import Target

if TYPE_CHECKING:
    from pretrain.encoders import Encoder


_MOST_NAMED = 5


class Rows:
    """Both splits' features under one protocol.

    warnings: what makes the numbers worth less, told as it is found. outcomes, ids, groups: of the pretrained row, of
    each val image.
    """

    def __init__(
        self,
        target: Target,
        splits: Splits,
        protocol: Protocol,
        source: FeatureSource,
        console: Console,
    ) -> None:
        self.target, self.splits, self.train, self.val = target, splits, splits.train, splits.val
        self.protocol, self.source, self.console = protocol, source, console
        self.warnings: list[str] = []
        self.painted: dict[str, Painted] = {}  # of the pretrained row, by probe
        self.outcomes: dict[str, Outcome] = {}  # of the pretrained row
        self.ids = torch.empty(0)
        self.groups: torch.Tensor | None = None
        self.patches: tuple[AnyTokens, AnyTokens] | None = None  # of the pretrained row, where a probe reads them
        for line in splits.notes:
            self.say(line)
        for line in splits.warnings():
            self.warn(line)
        self._warn_of_choosing()

    def encoder(self, row: str, encoder: Encoder) -> dict[str, Any]:
        """Scores of an encoder."""
        self.say(f"{row}: features of {self.train.num_samples:,} and {self.val.num_samples:,} samples")
        train, val = (self._features(encoder, of_val) for of_val in (False, True))
        if row == "pretrained":
            self._warn_of_twins(train, val)
            self.patches = None if train.tokens is None or val.tokens is None else (train.tokens, val.tokens)
        encoder.cpu()  # a large one and the probe's batches need not share the device

        def again(change: Change, of_train: bool, samples: torch.Tensor | None = None) -> FeatureSet:
            return self._described(self._features(encoder, not of_train, change, samples), not of_train)

        return self._score(row, train, val, self.target.headline or train.pooled_as, again)

    def untrained(self, seed: int) -> dict[str, Any]:
        """Scores of the same encoder with the fresh weights of `seed`."""
        return self.encoder(f"untrained, seed {seed}", self.target.untrained(seed))

    def pixels(self, size: int) -> dict[str, Any]:
        """Scores of raw pixels, centred by train's mean."""
        self.say("pixels: reading them")

        def read(of_val: bool, change: Change | None = None, samples: torch.Tensor | None = None) -> FeatureSet:
            return pixels(
                self.val if of_val else self.train,
                size,
                channels=self.target.channels,
                bits=self.target.bits,
                frames=self.target.frames,
                frame_stride=self.target.frame_stride,
                batch_size=self.source.batch_size,
                progress=not self.console.quiet,
                samples=self._wanted(of_val, samples),
                change=change,
            )

        train, val = read(False), read(True)
        if self.patches is not None and (self.protocol.needs("mask") or self.protocol.needs("depth")):
            train, val = self._with_patches(train, val, *self.patches)
        mean = train.inputs["pixels"].mean(dim=0)

        def again(change: Change, of_train: bool, samples: torch.Tensor | None = None) -> FeatureSet:
            changed = read(not of_train, change, samples)
            changed.inputs["pixels"].sub_(mean)
            return self._described(changed, not of_train)

        return self._score("pixels", *centred(train, val), "pixels", again)

    def _with_patches(
        self, train: FeatureSet, val: FeatureSet, of_train: AnyTokens, of_val: AnyTokens
    ) -> tuple[FeatureSet, FeatureSet]:
        """Both sets of pixels with those of patches as large as the encoder's."""
        if isinstance(of_train, NativeTokens) and isinstance(of_val, NativeTokens):
            places = (self.train, train.ids, of_train.grids), (self.val, val.ids, of_val.grids)
            native = native_pixel_tokens(*places, self.target)
            return replace(train, tokens=native[0]), replace(val, tokens=native[1])
        assert not isinstance(of_train, NativeTokens)
        tokens = pixel_tokens(
            (self.train, train.ids), (self.val, val.ids), self.target.image_size, of_train.grid, self.target.channels,
            self.target.bits,
        )  # fmt: skip
        return replace(train, tokens=tokens[0]), replace(val, tokens=tokens[1])

    def _features(
        self, encoder: Encoder, of_val: bool, change: Change | None = None, samples: torch.Tensor | None = None
    ) -> FeatureSet:
        dataset = self.val if of_val else self.train
        return self.source.features(encoder, dataset, self._wanted(of_val, samples), change)

    def _wanted(self, of_val: bool, samples: torch.Tensor | None) -> np.ndarray:
        return self.splits.wanted()[of_val] if samples is None else samples.numpy()

    def say(self, line: str, always: bool = False) -> None:
        """A line where no bar is shown, as in a job's log, which would stay empty for as long as the probe takes."""
        if self.console.quiet or always:
            print(line, file=sys.stderr, flush=True)

    def warn(self, line: str) -> None:
        """Into the result, and onto the screen at once."""
        self.warnings.append(line)
        self.say(f"warning: {line}", always=True)

    def _warn_of_choosing(self) -> None:
        """Classes that the part of train lacks on which heads and their strengths are chosen."""
        splits = self.splits
        shares = [
            settings.held_out for spec, settings in self.protocol.probes
            if hasattr(settings, "held_out") and spec.labels not in ("mask", "depth", "none", "several")
        ]  # fmt: skip
        if splits.unlabelled or splits.labels.kind not in ("class", "grade") or not shares:
            return
        groups = None
        if splits.groups is not None and splits.choose_by_groups:
            groups = torch.from_numpy(splits.groups[0][splits.wanted()[0]])
        labels = splits.strata()
        absent = classes_not_held_out(labels, shares[0], self.protocol.seeds[0], groups).tolist()
        if absent:
            unit = "image" if groups is None else "group"
            named = ", ".join(str(splits.labels.name(place)) for place in absent[:_MOST_NAMED])
            self.warn(
                f"{len(absent):,} of {len(labels.unique()):,} classes ({named}"
                f"{', ...' if len(absent) > _MOST_NAMED else ''}) have no {unit} to spare for the part of train that "
                "heads and their strengths are chosen on: what is chosen suits the others"
            )

    def _warn_of_twins(self, train: FeatureSet, val: FeatureSet) -> None:
        """Images of val that are in train as well, to the pixel of their crops."""
        twins = np.flatnonzero(np.isin(val.digests.numpy(), train.digests.numpy()))
        if len(twins):
            keys = ", ".join(self.val.key(int(val.ids[row]))[0] for row in twins[:3])
            self.warn(
                f"{len(twins):,} of {len(val.ids):,} {self.splits.held_out} images are in train as well, to the pixel "
                f"({keys}{', ...' if len(twins) > 3 else ''}): every accuracy here is too good"
            )

    def _described(self, features: FeatureSet, of_val: bool) -> FeatureSet:
        """The features of train or val with labels, groups and keys, and with masks and depths where they are read."""
        splits, ids = self.splits, features.ids
        dataset = self.val if of_val else self.train
        labels = splits.labels.val if of_val else splits.labels.train
        return replace(
            features,
            labels=torch.from_numpy(labels)[ids],
            groups=(
                None
                if splits.groups is None or not (of_val or splits.choose_by_groups)
                else torch.from_numpy(splits.groups[of_val])[ids]
            ),
            keys=Keys(dataset, ids),
            **maps_for(self.protocol, dataset, ids, self.target),  # type: ignore[arg-type]
        )

    def _score(
        self,
        row: str,
        train: FeatureSet,
        val: FeatureSet,
        headline: str,
        again: Again,
    ) -> dict[str, Any]:
        text = self.target.text if row == "pretrained" and self.protocol.needs("text") else None
        with self.console.status(row) as status:

            def tell(what: str) -> None:
                status.update(f"{row}: {what}")
                self.say(f"{row}: {what}")

            store = Store(
                self._described(train, False), self._described(val, True), self.splits.num_classes, headline,
                self.protocol.seeds, self.source.device, tell, self.splits.labels.kind,
                tuple(map(self.splits.labels.name, range(self.splits.num_classes))), again,
                self.train.mask_names, self.painted.__setitem__ if row == "pretrained" else None,
                text, None if text is None else Captions(self.val, text.card.captions).of,
            )  # fmt: skip
            scores, outcomes = score(store, self.protocol)
            if row == "pretrained":
                self.outcomes, self.ids, self.groups = outcomes, store.val.ids, store.val.groups
                for path, lost in undefined_draws(scores):
                    self.warn(
                        f"{path}: {lost:,} of up to {DRAWS:,} draws of val held nothing that it is of, so that its "
                        "error and interval are of the others: too few images or groups have what it needs"
                    )
            return scores
