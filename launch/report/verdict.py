"""Whether pretraining was worth it: the pretrained encoder against the untrained one and raw pixels, in words."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from eval.report import Measured
from eval.scores import Z95
from launch.report.probes import newest
from launch.report.read import Run

Kind = Literal["good", "bad", "unsure", "unknown"]
#: Errors of the difference from which on a gain or a loss is told, and from which on a loss is hinted at. The worst of
#: four comparisons decides: without a difference each is beyond two errors in 1 of 44, so at most 1 page in 11 is red.
GAIN, LOSS, HINT = 2.0, 2.0, 1.0
MOST_MEASURES = 2  # the first, which run unasked: the more there are, the more often one is worse by chance
#: What is said of a comparison, the worst first, and its colour.
_KINDS: dict[str, Kind] = {
    "worse than {}": "bad",
    "perhaps worse than {}": "unsure",
    "no difference shown to {}": "unsure",
    "better than {}": "good",
}


class Comparison(NamedTuple):
    """One number beside that of a baseline on the same images; `points` is ours less theirs, with one standard error:
    of shares in percent."""

    measure: str
    ours: Measured
    baseline: str
    theirs: Measured
    points: float
    error: float
    said: str  # one of `_KINDS`

    @property
    def kind(self) -> Kind:
        return _KINDS[self.said]

    @property
    def words(self) -> str:
        return self.said.format(self.baseline)

    @property
    def numbers(self) -> str:
        """`43.8 % against 30.4 %`."""
        sign = " %" if self.ours.unit == "percent" else ""
        return " against ".join(
            f"{each._replace(error=None, interval=None)}{sign}" for each in (self.ours, self.theirs)
        )

    @property
    def difference(self) -> str:
        """`+13.4 ± 0.6 points`."""
        if self.ours.unit == "percent":
            return f"{self.points:+.1f} ± {self.error:.1f} points"
        return f"{self.points:+.3g} ± {self.error:.2g}"


class Verdict(NamedTuple):
    """`kind` is the colour, `words` the sentence; `comparisons` what it rests on."""

    kind: Kind
    words: str
    comparisons: list[Comparison]


def compare(measure: str, ours: Measured, baseline: str, theirs: Measured, lower_is_better: bool = False) -> Comparison:
    """The difference with the standard error of two independent numbers, as what the baseline answered each image is
    not kept. The true error is smaller where both tend to be right on the same images, as is usual, and larger where
    one tends to be right where the other is wrong."""
    points, error = ours.share - theirs.share, math.hypot(_error_of(ours), _error_of(theirs))
    worse, perhaps, unsure, better = _KINDS
    gain = -points if lower_is_better else points
    lost = worse if gain < -LOSS * error else perhaps if gain < -HINT * error else unsure
    scale = 100 if ours.unit == "percent" else 1
    return Comparison(
        measure, ours, baseline, theirs, scale * points, scale * error, better if gain > GAIN * error else lost
    )


def verdict_of(run: Run) -> Verdict:
    """Of a run's newest probe; the worst of its measures against the untrained encoder decides, then raw pixels."""
    probe = newest(run)
    if probe is None:
        return Verdict("unknown", "Not probed yet: what the encoder is worth is not known.", [])
    step, told = probe
    rows = dict(told.rows)
    found = []
    for place in told.judged[:MOST_MEASURES]:
        for baseline, row in (("untrained", "untrained"), ("raw pixels", "raw pixels")):
            ours, theirs = rows["pretrained"][place], rows.get(row, [None] * len(told.columns))[place]
            if ours is not None and theirs is not None:
                measure, falling = told.columns[place].rstrip("*"), place in told.falling
                found.append(compare(measure, ours, baseline, theirs, falling))
    if not found:
        return Verdict("unknown", "The probe has nothing beside it to compare with.", [])
    worst_first = list(_KINDS)
    parts: list[str] = []
    for baseline in dict.fromkeys(each.baseline for each in found):
        of = [each for each in found if each.baseline == baseline]
        worst = min(of, key=lambda each: worst_first.index(each.said))
        by = [each.measure for each in of if each.said == worst.said]
        parts.append(worst.words + (f" (by {' and '.join(by)})" if len(by) < len(of) else ""))
    words, on = ", ".join(parts), f", on {told.data}" if told.data else ""
    kind = _KINDS[min((each.said for each in found), key=worst_first.index)]
    return Verdict(kind, f"{words[0].upper()}{words[1:]}, at step {step:,}{on}.", found)


def _error_of(measured: Measured) -> float:
    """Its standard error; where all or none were right that would be 0, and a part of the 95 % interval says more."""
    low, high = measured.interval or (0.0, 0.0)
    return max(measured.error or 0.0, (high - low) / 2 / Z95)
