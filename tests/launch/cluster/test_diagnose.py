"""From reports to findings: the odd node, and what is nobody's fault."""

from __future__ import annotations

from typing import Any

import pytest

from launch.cluster.diagnose import Findings, judge_facts, judge_presence, judge_sums
from launch.cluster.rendezvous import DONE, FAILED, REDUCED, Report


def reports(nodes: int, tasks: int = 2, **facts: Any) -> dict[int, Report]:
    found = {}
    for rank in range(nodes * tasks):
        found[rank] = Report("start", rank, f"n{rank // tasks + 1}", rank % tasks, tasks, f"{rank}", phase=DONE)
        found[rank].facts = {"timm": "1.0", "clock": 0.0, **facts}
        found[rank].phase = REDUCED
        found[rank].reduce = {"sum": 1.0, "expected": 1.0, "products": 0.02, "backend": "gloo", "link": None}
    return found


def judged(given: dict[int, Report]) -> Findings:
    found = Findings()
    judge_facts(given, found)
    return found


def test_the_minority_is_sick() -> None:
    given = reports(3)
    for rank in (0, 1):
        given[rank].facts["timm"] = "0.9"
    found = judged(given)
    assert found.code == 3
    assert found.sick == {"n1": ["versions: timm is 0.9, but 1.0 on n2, n3"]}


def test_of_two_the_one_beside_rank_0_is_sick_and_both_are_named() -> None:
    given = reports(2)
    given[2].facts["timm"] = given[3].facts["timm"] = "0.9"
    (reason,) = judged(given).sick["n2"]
    assert (
        "timm is 0.9, but 1.0 on n1 (as many on either side: n1, where the run starts, is taken to be right)" in reason
    )


def test_what_may_differ_is_only_named() -> None:
    given = reports(3)
    given[4].facts["driver"], given[0].facts["driver"], given[2].facts["driver"] = "550", "570", "570"
    found = judged(given)
    assert found.code == 0
    assert found.lines == [("GPUs", "warn", "n3: driver is 550, but 570 on n1, n2")]


@pytest.mark.parametrize(("ahead", "code"), [(2.0, 0), (-20.0, 0), (300.0, 3)])
def test_clocks(ahead: float, code: int) -> None:
    given = reports(3)
    for rank in (2, 3):
        given[rank].facts["clock"] = ahead
    found = judged(given)
    assert found.code == code
    assert [level for _, level, _ in found.lines] == ([] if abs(ahead) < 5 else ["warn"] if code == 0 else ["sick"])


def test_a_file_systems_own_clock_is_nobodys_fault() -> None:
    found = judged(reports(2, clock=400.0))
    assert found.code == 0
    assert found.lines == [("clock", "warn", "all clocks are 400 s ahead of the file system's")]


def test_a_trouble_of_all_nodes_is_no_nodes_fault() -> None:
    given = reports(2)
    for rank in (0, 2):
        given[rank].trouble("disk", "bad", "1 MiB free in /runs")
    found = judged(given)
    assert (found.code, found.sick) == (1, {})
    assert found.lines == [("disk", "bad", "1 MiB free in /runs")]
    given[2].troubles.clear()
    assert judged(given).sick == {"n1": ["disk: 1 MiB free in /runs"]}


def test_a_broken_gpu_is_its_nodes_fault_though_it_is_the_only_node() -> None:
    given = reports(1)
    given[0].trouble("GPUs", "sick", "GPU 3 has 2 uncorrected memory errors (ECC)")
    assert judged(given).sick == {"n1": ["GPUs: GPU 3 has 2 uncorrected memory errors (ECC)"]}


def test_those_who_left_no_report_are_named_by_what_the_launcher_told() -> None:
    given = reports(3)
    del given[2], given[3]
    found = Findings()
    judge_presence(given, 6, {"n1": 2, "n2": 2, "n3": 2}, 120, found)
    assert list(found.sick) == ["n2"]
    assert found.code == 3


def test_without_a_launcher_that_tells_only_ranks_are_named() -> None:
    given = reports(3)
    del given[2], given[3]
    found = Findings()
    judge_presence(given, 6, None, 120, found)
    assert (found.code, found.sick) == (1, {})
    assert found.lines[0][2].startswith("ranks 2, 3 left no report within 120 s")


def test_one_that_is_stuck_is_named_with_what_it_is_at() -> None:
    given = reports(2)
    given[3].phase = "looking at shards"
    found = Findings()
    judge_presence(given, 4, None, 120, found)
    assert found.sick == {"n2": ["tasks: rank 3 is stuck looking at shards, for 120 s"]}


def test_of_a_failed_sum_the_one_that_got_least_far_is_to_blame() -> None:
    given = reports(3)
    for rank, report in given.items():
        report.phase, report.reduce = FAILED, {"at": "joining the other ranks", "error": "timed out"}
        if rank == 4:
            report.reduce = {"at": "reaching the first node at n1:1234", "error": "no route to host"}
    found = Findings()
    judge_sums(given, 60, found)
    assert found.sick == {"n3": ["all-reduce: rank 4 failed reaching the first node at n1:1234: no route to host"]}


def test_a_silent_one_is_to_blame_before_those_that_failed() -> None:
    given = reports(2)
    for report in given.values():
        report.phase, report.reduce = FAILED, {"at": "adding up", "error": "connection closed"}
    given[2].phase = "adding up over all ranks"
    found = Findings()
    judge_sums(given, 60, found)
    assert found.sick == {"n2": ["all-reduce: rank 2 is stuck adding up, for 60 s"]}


def test_a_failure_of_all_is_no_nodes_fault() -> None:
    given = reports(2)
    for report in given.values():
        report.phase, report.reduce = FAILED, {"at": "importing torch", "error": "no libcudart"}
    found = Findings()
    judge_sums(given, 60, found)
    assert (found.code, found.lines) == (1, [("all-reduce", "bad", "importing torch: no libcudart")])


def test_a_wrong_sum_and_slow_nodes() -> None:
    given = reports(4)
    given[0].reduce["sum"] = 2.0
    given[5].reduce["products"] = 5.0
    for rank, link in ((0, 100e6), (2, 900e6), (4, 100e6), (6, 1000e6)):
        given[rank].reduce["link"] = link
    found = Findings()
    judge_sums(given, 60, found)
    assert found.sick == {"n1": ["all-reduce: rank 0 got the sum 2 instead of 1"]}
    assert [text for check, level, text in found.lines if check == "speed"] == [
        "n3: takes 5.000 s for matrix products, 250.0 times the others'"
    ], "one slow link between two nodes is not either's"
    given[2].reduce["link"], given[4].reduce["link"] = 100e6, 900e6  # what n1 sends, and what it gets
    judge_sums(given, 60, found := Findings())
    assert "n1: its links carry 100 and 100 MB/s, others 500" in [text for _, _, text in found.lines]
