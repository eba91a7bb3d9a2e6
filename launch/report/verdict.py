"""Whether pretraining was worth it: the pretrained encoder against the untrained one and raw pixels, in words."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from eval.report import Measured
from eval.scores import Z95
from launch.report.probes import newest
from launch.report.read import Run

Kind = Literal["good", "bad", "unsure", "unknown"]
#: Errors of the difference from which on a gain is believed, and from which on a loss is told: who claims to have
#: gained something has to show it, so the bar for bad news is lower.
GAIN, LOSS = 2.0, 1.0
_WORST_FIRST: tuple[Kind, ...] = ("bad", "unsure", "good")
_WORDS = {"good": "better than {}", "bad": "worse than {}", "unsure": "no difference shown to {}"}


class Comparison(NamedTuple):
    """One accuracy beside that of a baseline on the same images; `points` are percent, with one standard error."""

    measure: str
    ours: Measured
    baseline: str
    theirs: Measured
    points: float
    error: float
    kind: Kind

    @property
    def words(self) -> str:
        return _WORDS[self.kind].format(self.baseline)


class Verdict(NamedTuple):
    """`kind` is the colour, `words` the sentence; `comparisons` what it rests on."""

    kind: Kind
    words: str
    comparisons: list[Comparison]


def compare(measure: str, ours: Measured, baseline: str, theirs: Measured) -> Comparison:
    """The difference with the standard error of two independent proportions: what each image was answered is not kept,
    so that both are of the same images can only make the true error smaller."""
    points, error = ours.share - theirs.share, math.hypot(_error_of(ours), _error_of(theirs))
    kind: Kind = "good" if points > GAIN * error else "bad" if points < -LOSS * error else "unsure"
    return Comparison(measure, ours, baseline, theirs, 100 * points, 100 * error, kind)


def verdict_of(run: Run) -> Verdict:
    """Of a run's newest probe; the worst of its measures against the untrained encoder decides, then raw pixels."""
    probe = newest(run)
    if probe is None:
        return Verdict("unknown", "Not probed yet: what the encoder is worth is not known.", [])
    step, told = probe
    rows = dict(told.rows)
    found = []
    for place in told.headlines:
        for baseline, row in (("untrained", "untrained"), ("raw pixels", "raw pixels")):
            ours, theirs = rows["pretrained"][place], rows.get(row, [None] * len(told.columns))[place]
            if ours is not None and theirs is not None:
                found.append(compare(told.columns[place].rstrip("*"), ours, baseline, theirs))
    if not found:
        return Verdict("unknown", "The probe has nothing beside it to compare with.", [])
    parts: list[str] = []
    kinds: list[Kind] = []
    for baseline in dict.fromkeys(each.baseline for each in found):
        of = [each for each in found if each.baseline == baseline]
        kind = next(kind for kind in _WORST_FIRST if any(each.kind == kind for each in of))
        by = [each.measure for each in of if each.kind == kind]
        parts.append(_WORDS[kind].format(baseline) + (f" (by {' and '.join(by)})" if len(by) < len(of) else ""))
        kinds.append(kind)
    words = ", ".join(parts)
    return Verdict(min(kinds, key=_WORST_FIRST.index), f"{words[0].upper()}{words[1:]}, at step {step:,}.", found)


def _error_of(measured: Measured) -> float:
    """Its standard error; where all or none were right that would be 0, and a part of the 95 % interval says more."""
    low, high = measured.interval or (0.0, 0.0)
    return max(measured.error or 0.0, (high - low) / 2 / Z95)
