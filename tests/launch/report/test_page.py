from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from eval.report import Measured
from launch.cli import app
from launch.report.dots import axis_of
from launch.report.page import refresh, write_report
from launch.report.read import read_run

ROOT = Path(__file__).parents[3]
#: What would run as code, end an element or a script, or leave the page, if anything let it.
EVIL = (
    "</script><script>document.title='owned'</script><img src=http://evil.example/x onerror=alert(1)>\"'&\u2028\udc80"
)


class Seen(HTMLParser):
    """The elements and attributes of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data + "\n"

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def charts(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def chart(page: str, title: str) -> dict[str, Any]:
    (found,) = [each for group in charts(page)["groups"] for each in group["charts"] if each["title"] == title]
    return found


def page_of(*folders: Path, out: Path | None = None) -> str:
    return write_report(folders, out).read_text(encoding="utf-8")


def test_a_page_has_all_that_a_run_left(make_run: Any) -> None:
    folder = make_run()
    page = page_of(folder)
    seen = Seen(page)
    for told in (
        "finished", "of 200", "dino, prototypes 64", "4,800 images (4.00 epochs)", "24 = 4 ranks x 3 x 2 accumulated",
        "0.00 million", "50.0 ± 1.0", "+20.0 ± 1.4 points",
        "Better than untrained, better than raw pixels, at step 200, on shards.",
        "node0, node2", "2 h 0 min", "stopped; requeued: preempted",
        "a gradient spike", "2.14.1", "prototypes: 64", "7.out",
    ):  # fmt: skip
        assert told in seen.text, told
    for rows in re.findall(r"<thead>(.*?)</tbody>", page, re.DOTALL):
        assert len({len(re.findall(r"<t[hd][ >]", row)) for row in rows.split("</tr>")[:-1]}) == 1, rows
    assert len(seen.attributes("img")) == 6
    assert all(str(image["src"]).startswith("data:image/") for image in seen.attributes("img"))
    groups = {group["title"]: group for group in charts(page)["groups"]}
    assert list(groups) == ["Loss", "Probes over checkpoints", "Diagnostics", "Schedules", "Speed and memory", "Nodes"]
    assert groups["Schedules"]["constant"] == ["weight decay 0.05"]
    (processor,) = groups["Nodes"]["charts"]
    assert [series["label"] for series in processor["series"]] == ["node0", "node1"]
    assert (processor["title"], groups["Nodes"]["constant"]) == ("cpu percent", ["swap used gb 0"])
    assert charts(page)["marks"] == [
        {"step": 100, "kind": "restart", "label": "start 2 on node0, node2"},
        {"step": 60, "kind": "alarm", "label": "spike: a gradient spike"},
    ]
    assert chart(page, "k-NN class")["series"][0]["y"] == [0.4, 0.5]
    assert chart(page, "gradient norm")["log"]
    assert chart(page, "loss")["references"] == [{"label": "ln K", "y": pytest.approx(4.1589, abs=1e-3)}]


def test_it_asks_nobody_for_anything(make_run: Any) -> None:
    seen = Seen(page_of(make_run()))
    (policy,) = [each for each in seen.attributes("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy["content"]).startswith(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    assert {tag for tag, _ in seen.elements}.isdisjoint({"link", "iframe", "object", "embed", "base", "audio", "video"})
    for tag, attributes in seen.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith(("file://", "#"))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", (ROOT / "launch/report/assets/report.js").read_text())
    assert "url(" not in (ROOT / "launch/report/assets/report.css").read_text()


def test_no_text_becomes_code(make_run: Any) -> None:
    folder = make_run()
    config = {"name": EVIL, "description": EVIL, "data": {"train": EVIL}, "method": {"name": EVIL}, "encoder": EVIL}
    (folder / "config.yaml").write_text(json.dumps(config))
    row = {"step": 201, f"loss {EVIL}": 1.0, "loss": 1.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n" + json.dumps(row | {"step": 202, f"loss {EVIL}": 2.0}) + "\n")
    log = folder / "evil.log"
    log.write_bytes(EVIL.encode("utf-8", "surrogateescape"))
    with (folder / "history.jsonl").open("a") as file:
        for event in ("started", "alarm", "requeued", "submitted", "preflight", EVIL):
            fields = ("text", "reason", "nodes", "job", "time", "host", "code", "sick", "name", "ranks")
            told = dict.fromkeys(fields, EVIL) | {"versions": {EVIL: EVIL}, "command": [EVIL], "log": str(log)}
            file.write(json.dumps({"event": event, "step": 150, **told}) + "\n")
        file.write(json.dumps({"event": "submitted", "log": "javascript:alert(1)"}) + "\n")
    (folder / "system.jsonl").write_text(json.dumps({"step": 1, f"system/{EVIL}/{EVIL}": 1}) + "\n")
    probe = json.loads((folder / "eval" / "probe-200.json").read_text())
    probe["target"]["name"] = EVIL
    (folder / "eval" / "probe-200.json").write_text(json.dumps(probe))
    (folder / "pictures" / "crops-00000200.png").rename(
        folder / "pictures" / f"{EVIL[:9].replace('/', '')}-00000200.png"
    )
    page = page_of(folder)
    seen = Seen(page)
    assert [tag for tag, _ in seen.elements].count("script") == 2
    assert all(str(image["src"]).startswith("data:") for image in seen.attributes("img"))
    assert all(str(link["href"]).startswith(("file://", "#")) for link in seen.attributes("a"))
    assert "evil.example" in seen.text  # there, as text
    assert "owned" in seen.text


def test_several_runs_are_compared(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("one"), make_run("two", lr=2e-3, steps=100, whole=False), make_run("three", lr=3e-3)]
    page = page_of(*runs, out=tmp_path / "pages" / "all.html")
    assert [series["label"] for series in chart(page, "loss")["series"]] == ["one", "two", "three"]
    assert len(chart(page, "loss")["series"][1]["x"]) == 100
    text = Seen(page).text
    assert "optim.lr" in text
    assert "train.batch_size" not in text
    assert len(Seen(page).attributes("img")) == 4  # the last of each
    with pytest.raises(ValueError, match="--out FILE"):
        write_report(runs)
    with pytest.raises(ValueError, match="13 runs are more"):
        write_report([runs[0]] * 13, tmp_path / "x.html")


def test_the_folder_of_a_sweep_stands_for_those_of_its_runs_that_have_begun(make_run: Any) -> None:
    runs = [make_run("one"), make_run("two", lr=2e-3)]
    sweep = runs[0].parent / "sweep"
    sweep.mkdir()
    names = [{"name": name} for name in ("one", "two", "queued")]
    (sweep / "sweep.json").write_text(json.dumps({"job": "1", "runs": names}))
    page = write_report([sweep])
    assert page == sweep / "report.html"
    assert [series["label"] for series in chart(page.read_text(), "loss")["series"]] == ["one", "two"]
    (sweep / "sweep.json").write_text(json.dumps({"job": "1", "runs": names[2:]}))
    with pytest.raises(FileNotFoundError, match=r"no run of the sweep .* has begun"):
        write_report([sweep])


def test_what_is_missing_or_broken_is_told_and_the_rest_is_shown(make_run: Any) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 201, "loss": NaN, "grad_norm": Infinity, "bad_samples": 1e999}\nnot a row\n[1]\n{"loss": 1}\n'
        )
        file.write('{"step": "no", "loss": 2}\n{"step": 202, "loss": "text", "nested": {}, "flag": true}\n{"step": 20')
    (folder / "eval" / "broken.json").write_text("{")
    (folder / "eval" / "other.json").write_text("[1]")
    huge = json.loads((folder / "eval" / "probe-200.json").read_text())
    (folder / "eval" / "endless.json").write_text(json.dumps(huge | {"target": {"step": float("inf")}}))
    huge["rows"]["pretrained"]["linear"]["top1"] = 10**400
    (folder / "eval" / "huge.json").write_text(json.dumps(huge))
    (folder / "pictures" / "crops-00000300.png").write_bytes(b"\x89PNG half a")
    (folder / "history.jsonl").write_text('{"event": "started"}\n{"event": "ended"}\n{"event": "alarm", "step": "x"}\n')
    (folder / "system.jsonl").write_text('{"step": 1}\n{"system/a": 1}\n{"step": 2, "system/a": "x"}\n{')
    page = page_of(folder)
    text = Seen(page).text
    for told in (
        "5 lines are no rows",
        "eval/broken.json can't be read",
        "eval/other.json is not",
        "eval/huge.json is not",
        "crops-00000300.png is left out",
    ):
        assert told in text, told
    (loss,) = chart(page, "loss")["series"]
    assert loss["bad"] == [201]
    assert len(loss["x"]) == 200


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "name: [", "\x00", "name: ünï\n", "train: 5\nmethod: x\nviews: 3\n"]
)
def test_half_a_run_is_a_page_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
    assert "No step is logged yet" in Seen(page_of(tmp_path)).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert chart(page_of(tmp_path), "loss")["series"][0]["y"] == [2.5]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder of a run"):
        write_report([tmp_path / "missing"])
    with pytest.raises(FileNotFoundError, match="holds neither"):
        write_report([tmp_path])
    assert not list(tmp_path.iterdir())


def test_the_command(make_run: Any, tmp_path: Path) -> None:
    folder = make_run()
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"wrote {folder / 'report.html'}" in done.output.replace("\n", "")
    failed = subprocess.run(
        [sys.executable, "-m", "launch", "report", str(tmp_path / "nothing")], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert "is no folder of a run" in failed.stderr


def test_refreshing_finds_the_run_and_never_raises(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    for target in (folder, folder / "encoder", folder / "checkpoints" / "step-00000200" / "encoder"):
        refresh(target)
        (folder / "report.html").unlink()
    refresh(tmp_path / "elsewhere")
    (folder / "report.html").mkdir()
    refresh(folder)
    assert "no report.html" in capsys.readouterr().out


def test_reading_a_run_needs_no_torch(make_run: Any) -> None:
    code = f"import sys; from launch.cli import main; main(['report', {str(make_run())!r}])"
    ours = "sorted(set(sys.modules) & {'torch', 'wandb', 'matplotlib'})"
    check = f"try:\n    {code}\nexcept SystemExit: pass\nprint({ours})"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{check}"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_long_run_makes_a_small_page_whose_spike_stays(make_run: Any) -> None:
    folder = make_run(steps=1)
    start = time.monotonic()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 60_001):
            file.write(f'{{"step": {step}, "loss": {1 + step % 13 / 10 + 500 * (step == 40_001)}, "lr": {1 / step}}}\n')
    page = page_of(folder)
    (loss,) = chart(page, "loss")["series"]
    assert max(loss["hi"]) == pytest.approx(501, abs=2)
    assert len(loss["x"]) <= 1000
    assert len(page) < 4_000_000
    assert time.monotonic() - start < 120


def test_pictures_are_few_and_small_enough(make_run: Any) -> None:
    import numpy as np
    from PIL import Image

    folder = make_run()
    for step in range(1, 40):
        noise = np.random.default_rng(step).integers(0, 256, (600, 600, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"noise-{step:08d}.png")
    page = page_of(folder)
    assert len(page) < 10_000_000
    shown = [figure["data-step"] for figure in Seen(page).attributes("figure")]
    assert "39" in shown
    assert "1" in shown


def test_a_page_is_there_whole_or_not_at_all(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run()
    before = page_of(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report([folder])
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    assert not list(folder.glob("*.tmp"))


def test_steps_done_again_are_counted(make_run: Any) -> None:
    from launch.report.chronicle import jobs_of

    history = [
        {"time": "2026-11-21T09:00:00+00:00", "event": "started", "step": 0},
        {"time": "2026-11-21T09:10:00+00:00", "event": "ended", "step": 70, "reason": "hung"},
        {"time": "2026-11-21T09:15:00+00:00", "event": "started", "step": 50},
        {"time": "2026-11-21T09:20:00+00:00", "event": "started", "step": 50},
    ]
    first, second, third = jobs_of(history)
    assert (first.outcome, first.last_step, first.repeated) == ("hung", 70, None)
    assert (second.waited, second.repeated) == (300, 20)
    assert second.outcome.startswith("ended without a word")
    assert (third.waited, third.outcome) == (None, "")


def test_rows_of_a_run_that_came_back_count_once(make_run: Any) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(150, 170):
            file.write(json.dumps({"step": step, "loss": 9.0}) + "\n")
    metrics = read_run(folder).metrics
    assert metrics.last_step == 169
    assert metrics.series["loss"].columns()["x"] == list(range(1, 170))
    assert metrics.series["loss"].columns()["y"][149:] == [9] * 20


@pytest.mark.parametrize(
    ("name", "preset", "command", "shown"),
    [
        ("photos", "mae_own_data", ["selfsight", "pretrain", "--data", "raw"], "mae_own_data"),  # picked for images
        ("photos", "mae_own_data", ["selfsight", "pretrain", "--data", "demo"], "mae_own_data"),
        ("demo", "own.yaml", ["selfsight", "pretrain", "own.yaml"], None),
        ("demo", None, ["selfsight", "pretrain", "demo"], None),
        ("demo", ..., ["selfsight", "pretrain", "own.yaml", "name=demo"], None),  # of a version that told no preset
        ("photos", ..., ["selfsight", "pretrain", "demo", ["odd"]], "demo"),
    ],
)
def test_the_preset_that_settings_are_compared_with_is_that_of_the_start(
    make_run: Any, name: str, preset: Any, command: list[Any], shown: str | None
) -> None:
    folder = make_run(name, steps=1, whole=False)
    started = {"event": "started", "step": 0, "command": command, **({} if preset is ... else {"preset": preset})}
    (folder / "history.jsonl").write_text(json.dumps({"event": "submitted"}) + "\n" + json.dumps(started) + "\n")
    text = Seen(page_of(folder)).text
    assert ("Differs from the preset" in text) == (shown is not None)
    assert shown is None or f"Differs from the preset {shown} in" in text


def test_an_alarm_that_is_over_is_named_and_counts_once(make_run: Any) -> None:
    folder = make_run()
    with (folder / "history.jsonl").open("a") as file:
        over = {"event": "alarm", "step": 90, "name": "spike", "text": "over since step 90", "begins": False}
        file.write(json.dumps(over) + "\n")
    page = page_of(folder)
    text = " ".join(Seen(page).text.split())
    assert "1 alarm " in text
    assert "step 90, spike is over since step 90" in text
    assert [mark["step"] for mark in charts(page)["marks"] if mark["kind"] == "alarm"] == [60]


def test_an_alarm_is_not_counted_again_when_a_run_continues(make_run: Any) -> None:
    from launch.report.chronicle import alarms_of

    def alarm(step: int, **more: Any) -> dict[str, Any]:
        return {"event": "alarm", "step": step, "name": "slow", "text": "slow", **more}

    def start(step: int) -> dict[str, Any]:
        return {"event": "started", "step": step}

    assert alarms_of([start(0), alarm(50), start(60), alarm(65)]) == [(50, "slow: slow")], "it stood all the time"
    assert alarms_of([start(0), alarm(50), start(40), alarm(52)]) == [(52, "slow: slow")], "its steps were done again"
    over = alarm(55, begins=False)
    assert [step for step, _ in alarms_of([start(0), alarm(50), over, start(60), alarm(65)])] == [50, 65]
    later = alarm(90, begins=False)
    assert alarms_of([start(0), alarm(50), later, start(60), alarm(61)]) == [(50, "slow: slow")], "it stood at step 60"
    assert alarms_of([start(0), alarm(50), later, start(95), alarm(96)]) == [(50, "slow: slow"), (96, "slow: slow")]
    lost = {"event": "saved_not", "step": 50, "reason": "disk full"}
    assert alarms_of([start(0), lost, start(40)]) == [(50, "no checkpoint: disk full")], (
        "the disk was full all the same"
    )


def test_only_logs_in_the_folder_of_the_run_or_its_sweep_are_quoted(make_run: Any, tmp_path: Path) -> None:
    folder = make_run("one", steps=1, whole=False)
    other, sweep = folder.parent / "other", folder.parent / "sweep"
    for place, listed in ((other, "two"), (sweep, "one")):
        (place / "logs").mkdir(parents=True)
        (place / "sweep.json").write_text(json.dumps({"job": "7", "runs": [{"name": listed}]}))
    secrets = [tmp_path / "secret.txt", other / "logs" / "7.out", folder.parent / "one-more.txt"]
    for secret in secrets:
        secret.write_text("the secret\n")
    (folder / "link.out").symlink_to(secrets[0])
    os.mkfifo(folder / "pipe.out")
    (folder / "loop.out").symlink_to("loop.out")
    within = [folder / "7.out", folder / "logs" / ".." / "8.out", sweep / "logs" / "7_0.out"]
    (folder / "logs").mkdir()
    for log in within:
        log.write_text("a line of training\n")

    def page(log: Path | str) -> str:
        (folder / "history.jsonl").write_text(json.dumps({"event": "submitted", "log": str(log)}) + "\n")
        return page_of(folder)

    for log in (*secrets, "../../secret.txt", "link.out", "pipe.out", "loop.out", "a\0b", "x" * 5000):
        shown = page(log)
        assert "the secret" not in shown, log
        assert str(log)[:100].replace("\0", "\ufffd") in shown, "its name is told all the same"
    for log in (*within, "7.out"):
        assert "a line of training" in page(log), log
    away = tmp_path / "away"  # the folder of a run may itself be a link
    away.symlink_to(folder)
    assert "a line of training" in page_of(away)


def test_a_long_history_with_secrets_makes_a_small_page_without_them(make_run: Any) -> None:
    folder = make_run(steps=5)
    secret = "https://me:hunter2@host/set?token=hunter3"
    (folder / "jobs.out").write_text(f"reading {secret}\n")
    events = [
        {"event": "submitted", "command": ["selfsight", "submit", secret], "log": "jobs.out"},
        {"event": "ended", "step": 4, "reason": f"{secret} is gone {'x' * 5_000_000}"},
        *(
            {"event": "alarm", "step": step, "name": "damaged_checkpoint", "text": "slow " * 20}
            for step in range(20_000)
        ),
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = page_of(folder)
    assert "hunter" not in page
    assert "https://***@host/set?***" in page
    assert len(page) < 2_000_000
    alarms = [mark["step"] for mark in charts(page)["marks"]]
    assert (len(alarms), alarms[0], alarms[-1]) == (200, 0, 19_999)
    assert "20000 alarms" in " ".join(Seen(page).text.split())


def _with_numbers(folder: Path) -> dict[str, Any]:
    """A probe whose columns are a share, an error of which less is better, and one that not all look at."""
    path = folder / "eval" / "probe-200.json"
    probe: dict[str, Any] = json.loads(path.read_text())
    number = {"unit": "number", "key": "value", "chance": None, "paths": [[]]}
    probe["columns"] = [
        {"probe": "age", "name": "age", "title": "age, years off", "headline": True, **number, "lower_is_better": True},
        {"probe": "rank", "name": "rank", "title": "RankMe", "headline": True, **number, "label_free": True},
        {"probe": "age", "name": "age_r2", "title": "R2", "headline": False, **number, "more": True},
        *probe["columns"],
    ]
    rows = probe["rows"]
    for row, years in ((rows["pretrained"], 3.5), (rows["untrained"][0], 7.25)):
        row["age"] = {"value": years, "standard_error": 0.2, "interval": [years - 0.4, years + 0.4]}
        row["rank"] = {**row["age"], "value": 41.0, "interval": [40.0, 42.0]}
    path.write_text(json.dumps(probe))
    return probe


def test_numbers_that_are_no_shares_keep_their_unit_and_which_way_is_better(make_run: Any) -> None:
    folder = make_run()
    _with_numbers(folder)
    page = page_of(folder)
    seen = Seen(page)
    for told in ("3.50 ± 0.20 [3.10, 3.90]", "age, years off ↓", "less is better", "1 further number", "-3.75 ± 0.29"):
        assert told in seen.text, told
    verdict = page[page.index('class="verdict') : page.index('class="tiles"')]
    assert "age, years off</b> 3.5 against 7.25 untrained" in verdict
    assert "better than untrained" in verdict.lower()
    assert "worse" not in verdict.split("<ul>")[0].lower()
    assert "RankMe" not in verdict  # without labels nothing says which is better
    assert "RankMe" in seen.text


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([0.2, 0.9], "percent", (0.0, 0.956, 0.2)),
        ([0.5, 0.999], "percent", (0.0, 1.0, 0.2)),
        ([-0.5, 0.5], "number", (-0.5, 0.58, 0.25)),
        ([100.0, 104.0], "number", (100.0, 104.32, 1.0)),
        ([3.0, 3.0], "number", (2.5, 3.5, 0.2)),
        ([], "percent", (0.0, 1.0, 0.2)),
    ],
)
def test_an_axis_holds_all_its_numbers_with_few_round_ticks(
    values: list[float], unit: Any, expected: tuple[float, float, float]
) -> None:
    low, high, step = axis_of([Measured(value, None, None, unit) for value in values])
    assert (low, high, step) == pytest.approx(expected, abs=0.02)


def test_all_checkpoints_stand_in_one_table_with_what_is_confused_and_how_sure_it_is(make_run: Any) -> None:
    folder = make_run()
    path = folder / "eval" / "probe-200.json"
    probe = json.loads(path.read_text())
    probe["data"]["classes"] = ["cat", EVIL]
    probe["rows"]["pretrained"]["linear"]["measures"] = {
        "confusion": [[40, 10], [2, 48]],
        "reliability": [
            {"confidence": 0.55, "accuracy": 0.5, "count": 20},
            {"confidence": 0.9, "accuracy": 0.8, "count": 80},
        ],
    }
    path.write_text(json.dumps(probe))
    further = {**probe, "columns": [probe["columns"][1] | {"probe": "ridge", "name": "ridge", "title": "ridge"}]}
    further["rows"] = {
        name: row if name == "chance" else [{"ridge": each["linear"]} for each in row] if isinstance(row, list)
        else {"ridge": row["linear"]} for name, row in probe["rows"].items()
    }  # fmt: skip
    (folder / "eval" / "probe-200-further.json").write_text(json.dumps({**further, "started": "2026"}))
    page = page_of(folder)
    seen = Seen(page)
    assert "All checkpoints of photos: top-1 % on" in seen.text
    assert "best checkpoint: step 200 by k-NN class, linear" in seen.text
    assert "1 earlier probe" in seen.text  # both of step 200 are one
    assert f"{EVIL} for cat 4 %" not in page
    assert "cat for " in seen.text
    assert "on average 9.0 points apart" in seen.text
    assert len(re.findall(r'class="cell (?:right|wrong)"', page)) == 8  # linear's and ridge's
    assert "by k-NN class, linear, ridge" not in seen.text.split("best checkpoint")[0]
    measured = json.loads(path.read_text())
    measured["rows"]["pretrained"]["linear"]["measures"] = {"confusion": [["x"]], "reliability": [{}]}
    path.write_text(json.dumps(measured))
    assert "All checkpoints" in page_of(folder)  # of another version: left out


def test_every_result_of_the_newest_step_is_shown_whole_with_its_classes_of_pixels(make_run: Any) -> None:
    folder = make_run()
    probe = json.loads((folder / "eval" / "probe-200.json").read_text())
    probe["data"] |= {"label": None, "label_kind": None}
    score = {"iou": {"value": 0.4, "standard_error": 0.1, "interval": [0.2, 0.6]}}
    heads = {"linear": {**score, "of_class": {"0": 0.875, "7": None}}, "knn": {**score, "of_class": {"0": 0.5, "7": 0}}}
    probe["rows"] = {
        "chance": {}, "untrained": [], "pixels": {},
        "pretrained": {"segmentation": {**heads, "names": {"0": EVIL}}},
    }  # fmt: skip
    probe["columns"] = [
        {"probe": "segmentation", "name": "s", "title": "linear seg. mIoU", "paths": [["linear", "iou"]],
         "headline": True, "key": "value", "chance": None},
    ]  # fmt: skip
    (folder / "eval" / "probe-200-pixels.json").write_text(json.dumps(probe))
    seen = Seen(page_of(folder))
    assert "segmentation: classes" in seen.text
    assert {"87.5", "50.0", "-", "0.0"} <= set(seen.text.split("\n"))
    assert not seen.text.count("earlier probe") or "1 earlier probe\n" in seen.text  # those of another step alone
