"""The page in a real browser: what is drawn, what moves, what is asked of the network. Skipped where there is none."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.report.page import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or google-chrome; on Debian: apt-get install chromium"
)

BEFORE, AFTER = (
    f"<script>{(Path(__file__).parent / name).read_text()}</script>"
    for name in ("watched_before.js", "watched_after.js")
)


def opened(page: Path, tmp_path: Path, size: tuple[int, int] = (1300, 1000)) -> dict[str, Any]:
    """What the page in the browser says of itself; asserts that nothing went wrong and nothing was asked for."""
    text = page.read_text(encoding="utf-8")
    watched = tmp_path / "watched.html"
    first = text.index("<title>")
    watched.write_text(text[:first] + BEFORE + text[first:].replace("</body>", AFTER + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-extensions", f"--window-size={size[0]},{size[1]}"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--timeout=60000"]
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *options, "--dump-dom", watched.as_uri()], capture_output=True, text=True, timeout=240
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr
    found = json.loads(html.unescape(match[1]))
    assert found["broken"] is None
    assert found["wrong"] == []
    assert found["requests"] == []
    assert found["nan"] == 0
    assert int(found["drawn"]) == len(found["titles"])
    return found


def test_everything_is_drawn_and_moves(make_run: Any, tmp_path: Path) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "loss": NaN, "epoch": 4.02}\n')
    found = opened(write_report([folder]), tmp_path)
    assert found["titles"][:3] == ["loss", "k-NN class", "linear"]
    assert {"gradient norm", "images per second", "cpu percent"} <= set(found["titles"])
    assert len(found["lines"]) == len(found["titles"]) + 1  # two nodes in one of them
    assert max(found["lines"]) == 200
    assert min(found["lines"]) == 2
    assert (found["labelled"], found["outside"]) == (len(found["titles"]), 0)
    assert (found["restarts"], found["bad"]) == (len(found["titles"]), 1)
    assert found["alarms"] >= len(found["titles"])
    assert sorted(found["pictures"]) == [128] * 3 + [192] * 3
    assert found["tables"] >= 4
    assert all(found[move] for move in ("smoothed", "restored", "logarithmic", "zoomed", "whole"))
    assert any("step 1" in told and "1." in told for told in found["told"])
    assert found["crosses"] >= len(found["titles"]) - 2
    assert [told.partition(":")[0] for told in found["typed"]] == ["step 1", "step 2", "step 200"]
    assert found["single"] == [True, False, False]
    assert found["turned"] != found["paper"]
    header, first, *rest = found["csv"].splitlines()
    assert (header, first) == ("series,step,value,low,high", '"photos",1,4.95031,,')
    assert len(rest) == 199
    assert (found["svg"], found["svgLines"]) == ("svg", 1)


def test_a_narrow_screen_shows_it_all(make_run: Any, tmp_path: Path) -> None:
    found = opened(write_report([make_run()]), tmp_path, size=(400, 900))
    assert found["wide"] <= 0
    assert found["outside"] == 0


def test_runs_beside_each_other(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("one"), make_run("two", lr=2e-3, steps=100, whole=False)]
    found = opened(write_report(runs, tmp_path / "both.html"), tmp_path)
    assert found["titles"][0] == "loss"
    assert found["lines"][:2] == [200, 100]
    assert found["dashes"][:2] == ["none", "7px, 3px"]  # told apart without their colours
    assert len(found["pictures"]) == 2


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 2.5}],
        [{"step": step, "loss": float("nan"), "lr": 1e-3} for step in range(1, 5)],
        [{"step": 10**9 + step, "loss": -1e30 * step, "lr": 0.0, "tiny": 1e-300 * step} for step in range(5)],
    ],
    ids=["none", "one", "nan", "extreme"],
)
def test_odd_runs_are_drawn_too(rows: list[dict[str, Any]], make_run: Any, tmp_path: Path) -> None:
    folder = make_run(steps=0, whole=False)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert opened(write_report([folder]), tmp_path)["wide"] <= 0
