"""The one protocol under which everything is probed: the encoder, its untrained self, raw pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from eval import registry
from eval.base import LabelKind, ProbeSpec, Scores, Store
from eval.outcomes import Outcome, without_outcomes


@dataclass(frozen=True)
class Protocol:
    """What is measured and how. Part of every result, and of the key under which baselines are kept."""

    probes: tuple[tuple[ProbeSpec, Any], ...]  # with the settings of each
    seeds: tuple[int, ...] = (0, 1, 2)
    last_blocks: int = 4
    features: str = "cached centre crops"
    labels: LabelKind = "class"

    @classmethod
    def of(
        cls,
        also: Sequence[str],
        seeds: Sequence[int],
        options: Mapping[str, Any],
        only: Sequence[str] = (),
        kind: LabelKind = "class",
    ) -> Protocol:
        """The probes that always run on labels of that kind and those that are named, with their settings.

        `options` set what the settings of any probe have by that name; ValueError for one that none of them has, but
        `epochs`, which is always given.
        """
        probes = tuple((spec, spec.configured(options)) for spec in registry.chosen(also, only, kind))
        for name in options:
            if name != "epochs" and not any(hasattr(settings, name) for _, settings in probes):
                raise ValueError(
                    f"{name} is a setting of none of {', '.join(spec.name for spec, _ in probes)}; add the probe that "
                    f"has it by --also, such as one of {', '.join(registry.names())}"
                )
        return cls(probes, tuple(seeds), labels=kind)

    def needs(self, what: str) -> bool:
        """Whether a probe reads `tokens`, or takes labels of kind `mask`."""
        return any(what in (spec.needs, spec.labels) for spec, _ in self.probes)

    @property
    def chooses(self) -> bool:
        """Whether a probe chooses on a part of train that is held out."""
        return any(hasattr(settings, "held_out") for _, settings in self.probes)

    def check_native(self) -> None:
        """Raise ValueError where a probe takes no images at their own shape."""
        for spec, _ in self.probes:
            if spec.needs != "pooled" and not spec.native:
                what = "patch tokens on one grid" if spec.needs == "tokens" else "crops of one size"
                raise ValueError(f"the probe {spec.name} reads {what}, and --native has images of many; leave out one")

    def as_json(self) -> dict[str, Any]:
        """Everything that may change a number, as it is read back from a result."""
        found = {
            "seeds": list(self.seeds),
            "last_blocks": self.last_blocks,
            "features": self.features,
            **({} if self.labels == "class" else {"labels": self.labels}),
            **{spec.name: asdict(settings) for spec, settings in self.probes},
            "plug_ins": {s.name: whose for s, _ in self.probes if (whose := registry.origin(s.name)) is not None},
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain


def score(store: Store, protocol: Protocol) -> tuple[Scores, dict[str, Outcome]]:
    """The result of every probe on one row's features, by its name, as plain JSON values; and the outcomes in them, by
    the name of the probe and the path in its result.

    Raises ValueError, with its name, where a probe of another distribution fails, and for features that are not finite.
    """
    _check_finite(store)
    outcomes: dict[str, Outcome] = {}
    scores: Scores = {
        "num_train": len(store.train.labels),
        "num_val": len(store.val.labels),
        "headline": store.headline,
        "dim": store.train.inputs[store.headline].shape[1],
    }
    for spec, settings in protocol.probes:
        with _named(spec):
            # as it will be read back: a row that was kept equals one that is computed
            scores[spec.name] = json.loads(
                json.dumps(without_outcomes(spec.run(store, settings), outcomes, (spec.name,)))
            )
    return scores, outcomes


def _check_finite(store: Store) -> None:
    for name, split in (("train", store.train), ("val", store.val)):
        for what, values in split.inputs.items():
            finite = torch.cat([part.isfinite().all(dim=1) for part in values.split(8192)])
            if not finite.all():
                first = int(split.ids[int((~finite).nonzero()[0])])
                raise ValueError(
                    f"the feature {what} of {int((~finite).sum()):,} of {len(finite):,} {name} images is not finite, "
                    f"first that of sample {first}: the encoder's weights are damaged, or its training diverged; probe "
                    "an earlier checkpoint"
                )


def described(scores: Scores, protocol: Protocol) -> tuple[list[dict[str, Any]], list[str]]:
    """Columns and notes of every probe of the pretrained row."""
    columns: list[dict[str, Any]] = []
    notes: list[str] = []
    for spec, settings in protocol.probes:
        with _named(spec):
            of_columns, of_notes = spec.described(scores[spec.name], settings, scores["headline"])
            columns += of_columns
            notes += of_notes
    return columns, notes


@contextmanager
def _named(spec: ProbeSpec) -> Iterator[None]:
    """What another distribution's probe raises, as a line with its name."""
    try:
        yield
    except Exception as error:
        if (whose := registry.origin(spec.name)) is None:
            raise
        raise ValueError(f"the probe {spec.name} of {whose} failed: {error!r}") from error
