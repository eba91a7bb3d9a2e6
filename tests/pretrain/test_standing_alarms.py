from __future__ import annotations

from typing import Any

from pretrain.diagnostics.alarms import Alarms, Limit, Moment
from pretrain.survival.history import standing_alarms


def alarm(step: int, name: str = "weights_grow", begins: bool = True) -> dict[str, Any]:
    return {"event": "alarm", "step": step, "name": name, "text": "too large", "begins": begins}


def start(step: int) -> dict[str, Any]:
    return {"event": "started", "step": step}


def test_an_alarm_that_stands_when_a_run_continues_does_not_begin_again() -> None:
    alarms = Alarms([Limit("weights_grow", "norm", 10.0, True, "{value} > {limit}")], patience=3)
    alarms.restore(standing_alarms([start(0), alarm(20), start(40)]))
    assert alarms.look(Moment(45, 1.0, {"norm": 50.0})) == []
    assert alarms.standing["weights_grow"].since == 20
    changes = [change for step in (50, 55, 60) for change in alarms.look(Moment(step, 1.0, {"norm": 1.0}))]
    assert [(change.begins, change.text) for change in changes] == [(False, "over since step 60")]


def test_an_alarm_that_went_over_or_whose_step_is_done_again_does_not_stand() -> None:
    assert list(standing_alarms([start(0), alarm(20), alarm(30, begins=False), start(40)])) == []
    assert list(standing_alarms([start(0), alarm(50), start(40)])) == []
    assert list(standing_alarms([start(0), alarm(40), start(40)])) == ["weights_grow"]
    assert list(standing_alarms([start(0), alarm(20), alarm(30, "slow")])) == ["weights_grow", "slow"]


def test_an_alarm_whose_end_is_done_again_still_stands() -> None:
    history = [start(0), alarm(50), alarm(90, begins=False), start(60)]
    assert list(standing_alarms(history)) == ["weights_grow"]
    alarms = Alarms([Limit("weights_grow", "norm", 10.0, True, "{value} > {limit}")], patience=3)
    alarms.restore(standing_alarms(history))
    assert alarms.look(Moment(61, 1.0, {"norm": 50.0})) == []
    assert list(standing_alarms([*history, alarm(80, begins=False), start(70)])) == ["weights_grow"]
    assert list(standing_alarms([*history, alarm(80, begins=False), start(80)])) == []


def test_an_alarm_that_no_rule_watches_any_more_is_not_restored() -> None:
    alarms = Alarms([], patience=3)
    alarms.restore(standing_alarms([alarm(20)]))
    assert alarms.standing == {}
