"""Where the time of a step goes, and its trace."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from pretrain.tracking import step_profile
from pretrain.tracking.step_clock import MANY_MARKS, PARTS, StepClock
from pretrain.tracking.step_profile import StepProfile

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_shares_are_of_the_seconds_since_the_last_reading() -> None:
    clock = Clock()
    steps = StepClock(CPU, clock)
    for _ in range(2):
        with steps.part("forward"):
            clock.now += 1.0
        with steps.part("backward"):
            clock.now += 2.0
        clock.now += 1.0
    shares = steps.read(8.0)
    assert shares == {**{f"{part}_share": 0.0 for part in PARTS}, "forward_share": 0.25, "backward_share": 0.5}
    assert set(steps.read(8.0).values()) == {0.0}


def test_a_part_that_fails_is_counted() -> None:
    clock = Clock()
    steps = StepClock(CPU, clock)

    def fail() -> None:
        with steps.part("forward"):
            clock.now += 1.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert steps.read(4.0)["forward_share"] == 0.25


class Event:
    """A CUDA event on a device that is behind by as much as a test says."""

    clock = Clock()
    passed = 0.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        self.at = Event.clock.now

    def query(self) -> bool:
        return self.at <= Event.passed

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


def test_on_a_gpu_nothing_waits_and_what_is_not_over_counts_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    steps = StepClock(torch.device("cuda"))
    for _ in range(4):
        with steps.part("forward"):
            Event.clock.now += 1.0
    Event.passed = 3.0  # the device has passed three of them
    assert steps.read(10.0)["forward_share"] == pytest.approx(0.3)
    Event.passed = 4.0
    assert steps.read(10.0)["forward_share"] == pytest.approx(0.1)
    made = Event.made
    for _ in range(4 * MANY_MARKS):  # no log line for long: the marks are read and used again
        with steps.part("backward"):
            Event.clock.now += 1.0
        Event.passed = Event.clock.now
    assert Event.made <= made + 2 * MANY_MARKS


def test_a_part_costs_next_to_nothing() -> None:
    steps, start = StepClock(CPU), time.perf_counter()
    for _ in range(2000):
        with steps.part("forward"):
            pass
    assert (time.perf_counter() - start) / 2000 < 200e-6


def trace(folder: Path, steps: tuple[int, int] | None, rank: int = 0, last: int = 5, ends: bool = False) -> list[str]:
    """Run steps 101 to 100 + `last` of a run, which perhaps `ends` with that; what is told."""
    clock = StepClock(CPU)
    profile = StepProfile(folder, CPU, clock, steps, rank)
    told = []
    for step in range(101, 101 + last):
        profile.begin()
        with clock.part("forward"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        told += [profile.end(step, last=ends and step == 100 + last)]
    assert not clock.tracing or (last < (steps or (0, 0))[1] and not ends)
    told += [profile.close(100 + last)]
    return [line for line in told if line]


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    (line,) = trace(tmp_path, (2, 4))
    (path,) = (tmp_path / "profile").iterdir()
    assert str(path) in line
    assert path.name == "steps-102-104.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "step: forward" for event in events) == 3
    assert sum(event.get("name") == "aten::mm" for event in events) == 3


def test_a_run_that_ends_before_leaves_what_there_is(tmp_path: Path) -> None:
    trace(tmp_path, (4, 9))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-104-105.json.gz"]


def test_the_last_step_ends_a_trace_before_what_comes_after_it(tmp_path: Path) -> None:
    (line,) = trace(tmp_path, (4, 9), ends=True)  # with an assertion that nothing is traced from there on
    assert "a trace of steps 104 to 105 is in" in line


def test_a_trace_that_never_began_is_told_of(tmp_path: Path) -> None:
    (line,) = trace(tmp_path, (6, 9))
    assert line == ("no trace was made: tracking.profile_steps is [6, 9], counted from this start, which made 5 steps")
    assert not list(tmp_path.iterdir())


def test_other_ranks_and_others_leave_none(tmp_path: Path) -> None:
    assert trace(tmp_path, (2, 4), rank=1) == trace(tmp_path, None) == []
    assert not list(tmp_path.iterdir())


def test_a_trace_that_is_too_large_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile, "MOST_BYTES", 10)
    (line,) = trace(tmp_path, (2, 2))
    assert "is not kept" in line
    assert not list((tmp_path / "profile").iterdir())
