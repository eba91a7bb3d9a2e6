from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

from pretrain.survival.heartbeat import FOLDER, Beat, Heartbeat, read_beats, where, whom_all_wait_for

BEAT = Beat(0, "n1", 7, "step", 12.0, "torch/distributed/c10d.py:1 all_reduce", collective=True, left=0.0, count=3)


def later(*beats: Beat) -> dict[int, Beat]:
    return {beat.rank: replace(beat, count=beat.count + 2) for beat in beats}


def group(*changes: dict[str, object]) -> list[Beat]:
    return [replace(BEAT, rank=rank, **change) for rank, change in enumerate(changes)]  # type: ignore[arg-type]


def waited_for(before: list[Beat], now: dict[int, Beat], world_size: int) -> list[str]:
    return [line.split(" is ")[0].split(" gives ")[0] for line in whom_all_wait_for(_by_rank(before), now, world_size)]


def _by_rank(beats: list[Beat]) -> dict[int, Beat]:
    return {beat.rank: beat for beat in beats}


def test_the_silent_rank_is_named_before_all_else() -> None:
    beats = group({}, {"step": 6}, {})
    now = later(*beats) | {2: beats[2]}
    assert waited_for(beats, now, 3) == ["rank 2 on n1"]


def test_a_rank_that_never_began_is_named() -> None:
    beats = group({}, {})
    assert "rank 2 has given no sign of life" in whom_all_wait_for(_by_rank(beats), later(*beats), 3)[0]


def test_the_rank_of_the_earliest_step_is_named() -> None:
    beats = group({"step": 8}, {"step": 7, "phase": "data", "at": "loader.py:3 get"}, {"step": 8})
    (line,) = whom_all_wait_for(_by_rank(beats), later(*beats), 3)
    assert line == "rank 1 on n1 is in `data` of step 7 for 12 s (loader.py:3 get); others wait for it in step 8"


def test_in_one_step_it_is_those_outside_of_the_collective() -> None:
    beats = group({}, {"collective": False}, {}, {"collective": False})
    assert waited_for(beats, later(*beats), 4) == ["rank 1 on n1", "rank 3 on n1"]


def test_where_all_do_the_same_nobody_is_accused() -> None:
    beats = group({}, {})
    assert whom_all_wait_for(_by_rank(beats), later(*beats), 2) == []
    assert whom_all_wait_for({}, {}, 2) == []


def test_what_is_written_is_read(tmp_path: Path) -> None:
    mine = Heartbeat(tmp_path, 3)
    mine.beat(5, "data", 1.26, 0.0, sys._getframe())
    mine.beat(5, "data", 2.26, 0.0, sys._getframe())
    (tmp_path / "heartbeats" / "rank-00004.json").write_text('{"rank": 4, "ho')  # being written
    (beat,) = read_beats(tmp_path).values()
    assert (beat.rank, beat.step, beat.phase, beat.seconds, beat.count) == (3, 5, "data", 2.3, 2)
    assert "test_what_is_written_is_read" in beat.at
    mine.close()
    assert read_beats(tmp_path) == {}


def test_no_trouble_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mine = Heartbeat(tmp_path / "file", 0)
    mine.beat(1, "data", 0.0, 0.0, None)
    mine.close()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert read_beats(tmp_path / "file") == {}


def test_a_stack_that_waits_for_other_ranks_is_told_from_one_that_does_not() -> None:
    assert where(sys._getframe())[1] is False
    names: dict[str, object] = {"sys": sys}
    exec(compile("def all_reduce(): return sys._getframe()", "/x/torch/distributed/c10d.py", "exec"), names)
    at, collective = where(names["all_reduce"]())  # type: ignore[operator]
    assert (at, collective) == ("distributed/c10d.py:1 all_reduce", True)


def test_a_beat_that_is_being_written_is_waited_for(tmp_path: Path) -> None:
    """Else its rank would be taken for silent, and blamed."""
    heart = Heartbeat(tmp_path, 3)
    heart.beat(7, "step", 0.1, 0.0, None)
    path = tmp_path / FOLDER / "rank-00003.json"
    whole = path.read_text()
    path.write_text("")
    later = threading.Timer(0.06, path.write_text, [whole])
    later.start()
    assert read_beats(tmp_path)[3].step == 7
    later.join()
    path.write_text(whole[:20])
    assert read_beats(tmp_path) == {}
