"""What was found wrong, counted by case, with a few examples: of bounded size however much is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_pipelines.images.issues import CASES, Severity, shown

_MAX_EXAMPLES = 20  # of a case


class Example(NamedTuple):
    """Where a case was found; its strings are fit to be printed."""

    shard: str
    key: str | None  # or the member's name; None where the shard is meant
    reason: str | None


class Tally:
    """Cases of `CASES`, how often each was found, and the first examples of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Example]] = {}

    def add(self, case: str, shard: str, key: str | None = None, reason: str | None = None, count: int = 1) -> None:
        """Count a case, and keep it as an example if it is among the first."""
        assert case in CASES, case
        self.counts[case] += count
        kept = self.examples.setdefault(case, [])
        if len(kept) < _MAX_EXAMPLES:
            key, reason = (None if text is None else shown(text) for text in (key, reason))
            kept.append(Example(shown(shard), key, reason))

    def update(self, other: Tally) -> None:
        """Count what another part of the work found, as if it came after this one."""
        self.counts.update(other.counts)
        for case, examples in other.examples.items():
            kept = self.examples.setdefault(case, [])
            kept.extend(examples[: _MAX_EXAMPLES - len(kept)])

    def of(self, severity: Severity) -> Iterator[str]:
        """The cases of a severity that were found, in the order of `CASES`."""
        return (case for case, known in CASES.items() if known.severity == severity and self.counts[case])

    def sentence(self, case: str, with_shard: bool = True) -> str:
        """How often a case was found, the first example, what it is, and what is done about it."""
        known, first, count = CASES[case], self.examples[case][0], self.counts[case]
        shard = first.shard if with_shard else ""
        where = f"{first.key} of {shard}" if first.key and shard else first.key or shard
        example = ": ".join(text for text in (where, first.reason) if text).rstrip(".")
        told = f"{case} ({count:,})" + (f": {'' if count == 1 else 'the first, '}{example}" if example else "")
        return f"{told}. {known.found[0].upper()}{known.found[1:]}: {known.done}"

    def report(self) -> dict[str, dict[str, Any]]:
        """For JSON, by case."""
        return {
            case: {
                "severity": str(CASES[case].severity),
                "found": CASES[case].found,
                "done": CASES[case].done,
                "count": self.counts[case],
                "examples": [example._asdict() for example in self.examples[case]],
            }
            for severity in Severity
            for case in self.of(severity)
        }
