"""From the reports of all tasks to what is said of them: which checks are fine, and which node is the odd one."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from launch.cluster.rendezvous import DONE, FAILED, REDUCED, Report

#: Facts that must be the same on all nodes, by what it means if they are not.
MUST_AGREE = {
    "versions": ("python", "torch", "deepspeed", "timm", "numpy", "selfsight", "CUDA of torch", "NCCL"),
    "code": ("code",),
    "shards": ("shards",),
    "GPUs": ("GPUs",),
}
SHOULD_AGREE = {"GPUs": ("driver", "GPU model", "GPU memory"), "limits": ("open files",)}
#: Seconds by which a node's clock may differ from the others'. Logs of nodes a few seconds apart can still be read
#: together; credentials of SLURM and of object stores fail at minutes.
CLOCK_WARN, CLOCK_SICK = 5.0, 60.0
#: Times as slow as the median at which a node is named. What is measured lasts moments on a network that others use,
#: so it is only named. Matrix products share nothing with others: a GPU whose clock is throttled shows at less.
SLOW, SLOW_PRODUCTS = 4.0, 1.5
#: Reading a few samples faster than this is fast, whatever the median.
FAST_READING = 1.0  # seconds


@dataclass
class Findings:
    """What is known so far. `of(check)` is its worst level: ok, warn, bad (of all nodes) or sick."""

    sick: dict[str, list[str]] = field(default_factory=dict)  # node: reasons
    lines: list[tuple[str, str, str]] = field(default_factory=list)  # check, level, text

    @property
    def code(self) -> int:
        """The exit code: 3 where nodes are sick, 1 where all nodes share what is wrong, else 0."""
        return 3 if self.sick else int(any(level == "bad" for _, level, _ in self.lines))

    def add(self, check: str, level: str, text: str, node: str | None = None) -> None:
        """A finding; of the level sick, of that node."""
        if level == "sick":
            assert node is not None
            self.sick.setdefault(node, []).append(f"{check}: {text}")
        line = (check, level, f"{node}: {text}" if node is not None else text)
        if line not in self.lines:
            self.lines.append(line)

    def of(self, check: str) -> list[tuple[str, str]]:
        """Level and text of what was found by a check."""
        return [(level, text) for name, level, text in self.lines if name == check]


def judge_presence(
    reports: Mapping[int, Report], world_size: int, expected: Mapping[str, int] | None, seconds: float, found: Findings
) -> None:
    """Who did not come, or came and got stuck. `expected` is the number of tasks of every node, where it is known."""
    for report in _by_rank(reports):
        if report.phase not in (DONE, REDUCED, FAILED):
            text = f"rank {report.rank} is stuck {report.phase}, for {seconds:.0f} s"
            found.add("tasks", "sick", text, report.node)
    missing = sorted(set(range(world_size)) - set(reports))
    if not missing:
        return
    there = Counter(report.node for report in reports.values())
    if expected is None:
        if len({report.local_tasks for report in reports.values()} | {world_size}) == 1:
            expected = {next(iter(reports.values())).node: world_size}  # all of them on this machine
        else:
            found.add("tasks", "bad", f"{_ranks(missing)} left no report within {seconds:.0f} s")
            return
    for node, tasks in expected.items():
        if there[node] < tasks:
            text = (
                f"{tasks - there[node]} of {tasks} tasks left no report within {seconds:.0f} s: not started, hanging, "
                "or the run folder is not shared with this node"
            )
            found.add("tasks", "sick", text, node)


def judge_facts(reports: Mapping[int, Report], found: Findings) -> None:
    """Compare what the nodes say of themselves. Of differing ones, those in the minority are sick; where there are as
    many on both sides, those that differ from rank 0's node."""
    nodes = list(dict.fromkeys(report.node for report in _by_rank(reports)))
    for level, table in (("sick", MUST_AGREE), ("warn", SHOULD_AGREE)):
        for check, names in table.items():
            for name in names:
                _compare(reports, check, name, level, found)
    _judge_clocks(reports, found)
    alike: dict[tuple[str, str], dict[str, str]] = {}
    for report in _by_rank(reports):
        for check, level, text in report.troubles:
            if level == "bad":
                alike.setdefault((check, level), {})[report.node] = text
            else:
                found.add(check, level, text, report.node)
    for (check, _), texts in alike.items():
        if len(texts) == len(nodes):
            for text, count in Counter(texts.values()).items():
                found.add(check, "bad", text if count > 1 or len(nodes) == 1 else f"{_who(texts, text)}: {text}")
        else:
            for node, text in texts.items():
                found.add(check, "sick", text, node)
    reading = {report.node: report.seconds.get("reading samples") for report in _by_rank(reports)}
    _judge_speed("shards", "takes {:.1f} s to read a few samples", reading, SLOW, found, FAST_READING)


def judge_sums(reports: Mapping[int, Report], seconds: float, found: Findings) -> None:
    """What came of the all-reduce. One lost rank makes it fail on all: the one that got least far is to blame."""
    silent = [report for report in _by_rank(reports) if report.phase not in (REDUCED, FAILED)]
    failed = [report for report in _by_rank(reports) if report.phase == FAILED]
    for report in silent:
        text = f"rank {report.rank} is stuck {report.reduce.get('at', report.phase)}, for {seconds:.0f} s"
        found.add("all-reduce", "sick", text, report.node)
    if failed and not silent:
        order = list(dict.fromkeys(_order(report.reduce.get("at", "")) for report in failed))
        first = [report for report in failed if _order(report.reduce.get("at", "")) == min(order)]
        blamed = first if len({report.node for report in first}) < len({r.node for r in reports.values()}) else []
        for report in blamed:
            text = f"rank {report.rank} failed {report.reduce.get('at')}: {report.reduce.get('error')}"
            found.add("all-reduce", "sick", text, report.node)
        if not blamed:
            found.add("all-reduce", "bad", f"{failed[0].reduce.get('at')}: {failed[0].reduce.get('error')}")
    if silent or failed:
        return
    wrong = [report for report in _by_rank(reports) if report.reduce["sum"] != report.reduce["expected"]]
    everywhere = len({report.node for report in wrong}) == len({report.node for report in reports.values()})
    for report in wrong:
        text = f"rank {report.rank} got the sum {report.reduce['sum']:g} instead of {report.reduce['expected']:g}"
        found.add("all-reduce", "bad" if everywhere else "sick", text, report.node)
    products: dict[str, float | None] = {}
    for report in _by_rank(reports):
        products[report.node] = max(products.get(report.node) or 0.0, report.reduce["products"])
    cpu = any(report.reduce["backend"] == "gloo" for report in reports.values())  # whose cores others may use
    _judge_speed(
        "speed",
        "takes {:.3f} s for matrix products",
        products,
        SLOW if cpu else SLOW_PRODUCTS,
        found,
        0.5 if cpu else 0.0,
    )
    _judge_links(reports, found)


def _compare(reports: Mapping[int, Report], check: str, name: str, level: str, found: Findings) -> None:
    """Name the nodes whose value of a fact is not the usual one."""
    values: dict[str, str] = {}
    for report in _by_rank(reports):
        if name in report.facts:
            values.setdefault(report.node, str(report.facts[name]))
    if len(set(values.values())) < 2:
        return
    counts = Counter(values.values())
    first = next(iter(values.values()))
    usual = max(counts, key=lambda value: (counts[value], value == first))
    tie = counts[usual] == sum(counts.values()) - counts[usual]
    for node, value in values.items():
        if value != usual:
            others = [other for other, its in values.items() if its == usual]
            text = f"{name} is {value}, but {usual} on {_names(others)}"
            if tie:
                text += f" (as many on either side: {others[0]}, where the run starts, is taken to be right)"
            found.add(check, level, text, node)


def _judge_clocks(reports: Mapping[int, Report], found: Findings) -> None:
    clocks = {report.node: float(report.facts["clock"]) for report in _by_rank(reports) if "clock" in report.facts}
    if not clocks:
        return
    first = next(iter(clocks.values()))
    middle = statistics.median(clocks.values()) if len(clocks) > 2 else first
    for node, clock in clocks.items():
        ahead = clock - middle
        if abs(ahead) > CLOCK_WARN:
            level = "sick" if abs(ahead) > CLOCK_SICK else "warn"
            text = f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the others'"
            found.add("clock", level, text, node)
    if abs(middle) > CLOCK_WARN:
        text = f"all clocks are {abs(middle):.0f} s {'ahead of' if middle > 0 else 'behind'} the file system's"
        found.add("clock", "warn", text)


def _judge_speed(
    check: str, text: str, seconds: Mapping[str, float | None], factor: float, found: Findings, fast: float
) -> None:
    known = {node: value for node, value in seconds.items() if value is not None}
    if len(known) < 2:
        return
    for node, value in known.items():
        others = statistics.median(other for name, other in known.items() if name != node)
        if value > max(factor * others, fast):
            found.add(check, "warn", f"{text.format(value)}, {value / max(others, 1e-9):.1f} times the others'", node)


def _judge_links(reports: Mapping[int, Report], found: Findings) -> None:
    """A node is slow if both of its links are: what comes in, and what the next node gets of it."""
    into = {r.node: float(r.reduce["link"]) for r in _by_rank(reports) if r.reduce.get("link") is not None}
    nodes = list(into)
    if len(nodes) < 3:
        return
    usual = statistics.median(into.values())
    slow = [node for node in nodes if into[node] < usual / SLOW]
    for place, node in enumerate(nodes):
        after = nodes[(place + 1) % len(nodes)]
        if node in slow and after in slow:
            text = f"its links carry {into[node] / 1e6:.0f} and {into[after] / 1e6:.0f} MB/s, others {usual / 1e6:.0f}"
            found.add("speed", "warn", text, node)


_PHASES = ("importing", "multiplying", "reaching", "joining", "adding", "sending")


def _order(at: str) -> int:
    """How far an all-reduce had come."""
    return next((place for place, word in enumerate(_PHASES) if at.startswith(word)), len(_PHASES))


def _by_rank(reports: Mapping[int, Report]) -> Iterable[Report]:
    return (reports[rank] for rank in sorted(reports))


def _names(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 4 else f"{', '.join(nodes[:3])} and {len(nodes) - 3} more"


def _who(texts: Mapping[str, str], text: str) -> str:
    return _names([node for node, its in texts.items() if its == text])


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
