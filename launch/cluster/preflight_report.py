"""What a preflight says in the end: a line a check, the sick nodes, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launch.cluster.checks import DISTRIBUTIONS
from launch.cluster.diagnose import Findings
from launch.cluster.rendezvous import Report

CHECKS = ("tasks", "versions", "code", "master", "GPUs", "shards", "disk", "clock", "limits", "all-reduce", "speed")
_SHOWN = {"ok": "ok", "warn": "warn", "bad": "BAD", "sick": "SICK"}


def verdict(
    run: Path, reports: Mapping[int, Report], world_size: int, found: Findings, seconds: Mapping[str, float]
) -> str:
    """The table; its last lines are `sick: NODE NODE` where nodes are, and what to do."""
    nodes = list(dict.fromkeys(reports[rank].node for rank in sorted(reports)))
    shown = ", ".join(nodes) if len(nodes) <= 8 else f"{', '.join(nodes[:7])} and {len(nodes) - 7} more"
    lines = [f"preflight of {run}: {len(reports)} of {world_size} tasks on {_count(len(nodes), 'node')} ({shown})"]
    for check in (*CHECKS, *(name for name, _, _ in found.lines if name not in CHECKS)):
        findings = found.of(check)
        if not findings and (summary := _summary(check, reports)):
            findings = [("ok", summary)]
        lines += [f"  {_SHOWN[level]:<5}{check:<11}{text}" for level, text in findings]
    parts = ", ".join(f"{value:.1f} s {name}" for name, value in seconds.items() if name != "in all")
    lines.append(f"preflight took {seconds['in all']:.1f} s: {parts}")
    if found.sick:
        lines.append(f"sick: {' '.join(found.sick)}")
    elif found.code:
        lines.append("this is not the fault of single nodes: mend it, and submit again")
    return "\n".join(lines)


def _summary(check: str, reports: Mapping[int, Report]) -> str:
    """What is said of a check in which nothing was found."""
    first = reports[min(reports)]
    facts, reduced = first.facts, [report for report in reports.values() if "sum" in report.reduce]
    if check == "versions":
        return ", ".join(f"{name} {facts.get(name)}" for name in ("python", *DISTRIBUTIONS))
    if check == "code":
        return f"checksum {facts.get('code')}" + (f", commit {facts['commit']}" if facts.get("commit") else "")
    if check == "master" and "master" in facts:
        return str(facts["master"])
    if check == "GPUs":
        count = facts.get("GPUs", 0)
        return f"{count} x {facts.get('GPU model')} a node, driver {facts.get('driver')}" if count else "none used"
    if check == "shards" and "shards" in facts:
        return f"index {facts['shards']}; a few samples read in {_range(reports, 'reading samples')} s"
    if check == "disk" and "room in the run folder" in facts:
        return f"{facts['room in the run folder'] / 1e9:.0f} GB free in the run folder"
    if check == "clock" and "clock" in facts:
        clocks = [float(report.facts["clock"]) for report in reports.values() if "clock" in report.facts]
        return f"within {max(clocks) - min(clocks):.2f} s of each other, {clocks[0]:+.2f} s of the file system's"
    if check == "limits" and "open files" in facts:
        return f"{facts['open files']} open files"
    if not reduced:
        return ""
    if check == "all-reduce":
        sums, bandwidth = reduced[0].reduce, reduced[0].reduce["bandwidth"]
        speeds = ", ".join(f"{value / 1e6:,.0f} MB/s at {int(size) // 1024:,} KiB" for size, value in bandwidth.items())
        rest = f": {speeds}" if len(reports) > 1 else ""
        return f"{sums['backend']}, sum {sums['sum']:g} over {len(reduced)} ranks{rest}"
    if check == "speed":
        products = [1000 * report.reduce["products"] for report in reduced]
        links = [report.reduce["link"] / 1e6 for report in reduced if report.reduce["link"] is not None]
        rest = f"; links between nodes {min(links):,.0f} to {max(links):,.0f} MB/s" if links else ""
        return f"matrix products in {min(products):.0f} to {max(products):.0f} ms{rest}"
    return ""


def _range(reports: Mapping[int, Report], name: str) -> str:
    values = [report.seconds[name] for report in reports.values() if name in report.seconds]
    return f"{min(values):.2f} to {max(values):.2f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
