"""Lines and bar of a run, by a clock that the tests turn."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from pretrain.tracking.log_file import LOG, logged
from pretrain.tracking.progress import Watched, Window, progress_line

VALUES = {"loss": 0.5, "lr": 1e-3}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(watched: Watched, clock: Clock, first: int, last: int, seconds: float, every: int = 10**6) -> None:
    """Make steps of so many seconds, a fifth of them waiting for data; told of every so many."""
    for step in range(first + 1, last + 1):
        clock.now += seconds
        told = step % every == 0
        watched.step(step, step / 10, VALUES, waited=(step - first) * seconds / 5, told=told)


def test_a_line_after_the_first_step_and_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    watched = Watched(40, 400, 8, Window(40, clock))
    steps(watched, clock, first=40, last=60, seconds=4.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["41/400", "49/400", "57/400"]
    assert lines[1] == "step 49/400  epoch 4.90  loss 0.5000  lr 1.00e-03  2 img/s  data 20%  eta 23:24"


def test_a_log_line_puts_the_next_line_off(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    steps(Watched(0, 400, 8, Window(0, clock)), clock, first=0, last=60, seconds=10.0, every=2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/400"]
    steps(Watched(0, 400, 8, Window(0, clock)), clock, first=0, last=10, seconds=10.0, every=5)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/400", "4/400", "8/400"]


def test_steps_longer_than_30_seconds_have_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    steps(Watched(0, 5, 8, Window(0, clock)), clock, first=0, last=5, seconds=70.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("eta 4:40")
    assert lines[-1].endswith("eta 0:00")


def test_the_speed_is_of_the_last_30_seconds_without_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    window = Window(0, clock)
    watched = Watched(0, 10_000, 100, window)
    steps(watched, clock, first=0, last=1, seconds=500.0)  # a slow start
    for step in range(2, 202):
        clock.now += 1.0
        if step == 190:
            with window.paused():
                clock.now += 25.0
        watched.step(step, 0.0, VALUES, 100.0, told=False)
    assert all(" 100 img/s  data 0% " in line for line in capsys.readouterr().out.splitlines()[2:])


def test_a_window_leaves_out_what_is_paused() -> None:
    class Loader:
        wait_seconds = 1.0

        def fetch_metrics(self) -> dict[str, float]:
            return {}

    clock = Clock()
    window = Window(0, clock)
    clock.now += 10.0
    with window.paused():
        clock.now += 90.0
    assert window.measure(5, 8, Loader()) == {"images_per_second": 4.0, "data_wait": 0.1}  # type: ignore[arg-type]
    assert window.seconds_per_step == 2.0


def test_at_a_terminal_a_bar_and_in_the_log_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = Terminal(), Clock()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with logged(tmp_path):
        ours = sys.stdout
        watched = Watched(0, 20, 8, Window(0, clock))
        steps(watched, clock, first=0, last=10, seconds=4.0)
        print("ALARM of [bold]brackets[/bold] " + "and length " * 20, file=ours, flush=True)
        assert re.search(r"10/20\S* 2 img/s  data 20%  eta 0:40", terminal.getvalue())
        watched.close()
        assert ours.terminal is terminal  # type: ignore[attr-defined]
    shown = terminal.getvalue()
    assert "loss" not in shown  # the bar shows it
    assert "ALARM of [bold]brackets[/bold] " + "and length " * 20 in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there
    log = [line for line in (tmp_path / LOG).read_text().splitlines() if not line.startswith("---")]
    assert [line.split()[1] for line in log] == ["1/20", "9/20", "of"]
    assert "\x1b" not in "".join(log)


@pytest.mark.parametrize("kind", ["file", "dumb terminal"])
def test_no_bar_where_none_can_be_shown(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = Terminal() if kind == "dumb terminal" else io.StringIO(), Clock()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "dumb" if kind == "dumb terminal" else "xterm")
    with logged(tmp_path):
        watched = Watched(0, 20, 8, Window(0, clock))
        steps(watched, clock, first=0, last=10, seconds=4.0)
        watched.close()
    assert "\x1b" not in stream.getvalue()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/20", "9/20"]


def test_the_line_of_a_long_run() -> None:
    values = {**VALUES, "images_per_second": 293.6, "data_wait": 0.021}
    line = progress_line(120, 1875, 0.768, values, 10.0)
    assert line == "step 120/1875  epoch 0.77  loss 0.5000  lr 1.00e-03  294 img/s  data 2%  eta 4:52:30"


@pytest.mark.parametrize(
    ("rates", "shown"),
    [
        ({"tokens_per_second": 870.0, "teraflops": 0.0583}, "294 img/s  870 tok/s  58.3 GFLOP/s  data 2%"),
        ({"tokens_per_second": 3651.0, "teraflops": 402.0, "mfu": 0.407}, "294 img/s  3.7k tok/s  mfu 41%  data 2%"),
        ({"tokens_per_second": 12.3e6}, "294 img/s  12M tok/s  data 2%"),
    ],
)
def test_the_line_tells_how_much_is_computed(rates: dict[str, float], shown: str) -> None:
    values = {**VALUES, "images_per_second": 293.6, "data_wait": 0.021, **rates}
    assert shown in progress_line(120, 1875, 0.768, values, 10.0)


def test_a_window_measures_what_follows_from_the_speed() -> None:
    class Loader:
        wait_seconds = 0.0

        def fetch_metrics(self) -> dict[str, float]:
            return {}

    clock = Clock()
    window = Window(0, clock)
    window.rates = lambda images_per_second: {"teraflops": images_per_second / 100}
    clock.now += 10.0
    measured = window.measure(5, 8, Loader())  # type: ignore[arg-type]
    assert measured == {"images_per_second": 4.0, "teraflops": 0.04, "data_wait": 0.0}
