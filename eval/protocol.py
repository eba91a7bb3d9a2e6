"""The one protocol under which everything is probed: the encoder, its untrained self, raw pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval import registry
from eval.base import ProbeSpec, Scores, Store, settings_as_json


@dataclass(frozen=True)
class Protocol:
    """What is measured and how. Part of every result, and of the key under which baselines are kept."""

    probes: tuple[tuple[ProbeSpec, Any], ...]  # with the settings of each
    seeds: tuple[int, ...] = (0, 1, 2)
    last_blocks: int = 4
    features: str = "cached centre crops"

    @classmethod
    def of(cls, also: Sequence[str], seeds: Sequence[int], options: Mapping[str, Any]) -> Protocol:
        """The probes that always run and those that are named, with their settings.

        `options` set what the settings of any probe have by that name; ValueError for one that none of them has.
        """
        probes = tuple((spec, spec.configured(options)) for spec in registry.chosen(tuple(also)))
        for name in options:
            if not any(hasattr(settings, name) for _, settings in probes):
                raise ValueError(
                    f"{name} is a setting of none of {', '.join(spec.name for spec, _ in probes)}; add the probe that "
                    f"has it by --also, such as one of {', '.join(registry.names())}"
                )
        return cls(probes, tuple(seeds))

    def as_json(self) -> dict[str, Any]:
        """Everything that may change a number."""
        return {
            "seeds": list(self.seeds),
            "last_blocks": self.last_blocks,
            "features": self.features,
            **{spec.name: settings_as_json(settings) for spec, settings in self.probes},
            "plug_ins": {s.name: found for s, _ in self.probes if (found := registry.origin(s.name)) is not None},
        }


def score(store: Store, protocol: Protocol) -> Scores:
    """The result of every probe on one row's features, by its name, as plain JSON values.

    Raises ValueError, with its name, where a probe of another distribution fails.
    """
    scores: Scores = {
        "num_train": len(store.train.labels),
        "num_val": len(store.val.labels),
        "headline": store.headline,
        "dim": store.train.inputs[store.headline].shape[1],
    }
    for spec, settings in protocol.probes:
        # as it will be read back: a row that was kept equals one that is computed
        scores[spec.name] = _by_name(
            spec, lambda spec=spec, settings=settings: json.loads(json.dumps(spec.run(store, settings)))
        )
    return scores


def described(scores: Scores, protocol: Protocol) -> tuple[list[dict[str, Any]], list[str]]:
    """Columns and notes of every probe of the pretrained row."""
    columns: list[dict[str, Any]] = []
    notes: list[str] = []
    for spec, settings in protocol.probes:
        found = _by_name(
            spec,
            lambda spec=spec, settings=settings: spec.described(scores[spec.name], settings, scores["headline"]),
        )
        columns += found[0]
        notes += found[1]
    return columns, notes


def _by_name(spec: ProbeSpec, run: Any) -> Any:
    """What `run` gives; what another distribution's probe raises, as a line with its name."""
    if (whose := registry.origin(spec.name)) is None:
        return run()
    try:
        return run()
    except Exception as error:
        raise ValueError(f"the probe {spec.name} of {whose} failed: {error!r}") from error
