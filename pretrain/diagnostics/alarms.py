"""Alarms: each said once when its trouble begins and once when it is over, however many log lines lie between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: Log lines on which a trouble must be absent before its alarm is over.
CALM_LINES = 3


@dataclass(frozen=True)
class Moment:
    """A log line: its metrics, which hold for all ranks, after `step` optimizer steps."""

    step: int
    epoch: float
    metrics: Mapping[str, float]


class Rule(Protocol):
    """What one alarm looks at."""

    name: str
    lines: int  # of the log, in a row, on which the trouble must be there for the alarm to begin

    def can_tell(self, now: Moment) -> bool:
        """Whether this line says anything of the trouble; if not, the alarm stays as it is."""
        ...

    def trouble(self, now: Moment, standing: bool) -> str | None:
        """What is wrong: the value, what was expected, what to do. None where all is well.

        While the alarm is `standing`, a value just within its limit is still trouble, so that none flickers.
        """
        ...


@dataclass(frozen=True)
class Limit:
    """A metric that should stay on one side of a number.

    says: the text, with {value} and {limit}. since: when the metric begins to count. slack: share of the limit by
    which a metric must be back within it for the alarm to be over. derive: the value from other metrics, where
    `metric` is no single one of them.
    """

    name: str
    metric: str
    limit: float
    high: bool  # whether the trouble is above the limit
    says: str
    since: Callable[[Moment], bool] = lambda now: True
    slack: float = 0.1
    lines: int = 1
    derive: Callable[[Mapping[str, float]], float | None] | None = None

    def _value(self, now: Moment) -> float | None:
        return now.metrics.get(self.metric) if self.derive is None else self.derive(now.metrics)

    def can_tell(self, now: Moment) -> bool:
        return self._value(now) is not None and self.since(now)

    def trouble(self, now: Moment, standing: bool) -> str | None:
        value = self._value(now)
        assert value is not None
        limit = self.limit * (1 + self.slack * (-1 if self.high else 1)) if standing else self.limit
        if value > limit if self.high else value < limit:
            return self.says.format(value=value, limit=self.limit)
        return None


@dataclass
class Standing:
    """An alarm that has begun and is not over."""

    since: int  # step
    text: str
    lines: int = 1  # of the log on which the trouble was there
    calm: int = 0  # in a row on which it was not


@dataclass(frozen=True)
class Change:
    """An alarm that begins, or is over."""

    name: str
    text: str
    begins: bool


@dataclass
class Alarms:
    """Which alarms stand, from one log line to the next.

    patience: log lines on which an alarm of `stop_on` must have stood to end the run, but for rules with one of theirs.
    """

    rules: Sequence[Rule]
    stop_on: Iterable[str] = ()
    patience: int = 10
    standing: dict[str, Standing] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)  # lines in a row on which a trouble was there

    def __post_init__(self) -> None:
        names = Counter(rule.name for rule in self.rules)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two alarms are called {twice[0]}: give those of the method names of their own")

    def restore(self, standing: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with alarms that stood when the run was stopped, as `standing_alarms` has them, so that none of them
        begins, and is counted, a second time. How long they have stood counts anew."""
        for rule in self.rules:
            if (event := standing.get(rule.name)) is not None and isinstance(event.get("step"), int):
                self.standing[rule.name] = Standing(event["step"], str(event.get("text", "")), lines=0)

    def look(self, now: Moment) -> list[Change]:
        """Take a log line in; what begins with it, or is over."""
        changes = []
        for rule in self.rules:
            if not rule.can_tell(now):
                continue
            stands = self.standing.get(rule.name)
            text = rule.trouble(now, stands is not None)
            self._seen[rule.name] = 0 if text is None else self._seen.get(rule.name, 0) + 1
            if text is not None and stands is None:
                if self._seen[rule.name] < rule.lines:
                    continue
                self.standing[rule.name] = Standing(now.step, text)
                changes.append(Change(rule.name, text, begins=True))
            elif text is not None and stands is not None:
                stands.text, stands.calm = text, 0
                stands.lines += 1
            elif stands is not None:
                stands.calm += 1
                if stands.calm >= CALM_LINES:
                    del self.standing[rule.name]
                    changes.append(Change(rule.name, f"over since step {now.step}", begins=False))
        return changes

    def fatal(self) -> str | None:
        """The name of an alarm that has stood for too long to go on."""
        patience = {rule.name: getattr(rule, "patience", self.patience) for rule in self.rules}
        return next(
            (name for name, stands in self.standing.items() if name in self.stop_on and stands.lines >= patience[name]),
            None,
        )

    def metrics(self) -> dict[str, float]:
        """What to log: `alarm/NAME` of those that stand, and how many there are."""
        return {"alarms": float(len(self.standing)), **{f"alarm/{name}": 1.0 for name in self.standing}}
