from __future__ import annotations

import errno
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import launch.demo
import launch.local
import launch.pretrain_command
from launch.cli import app, is_user_error, main, told

SUBCOMMANDS = ["demo", "pack", "verify", "pretrain", "launch", "probe", "export", "demo-data"]


@pytest.fixture
def run() -> object:
    return lambda *args: CliRunner().invoke(app, list(args))


def test_help_lists_the_subcommands_in_the_order_of_the_work(run) -> None:
    text = run("--help").output
    positions = [text.index(f" {name} ") for name in SUBCOMMANDS]
    assert positions == sorted(positions)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_explains_itself(run, name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", [(), ("pretrain",), ("data",), ("data", "trace")])
def test_flags_take_no_value_and_other_options_say_of_what_type_theirs_is(run, command: tuple[str, ...]) -> None:
    for _ in range(2):  # a second look at the same command
        text = run(*command, "--help").output
        assert "<bool>" not in text
        assert "--help" in text
    assert ("<str>" in text or "TEXT" in text) == (len(command) > 0 and command != ("data",))


def test_launch_says_what_may_follow(run) -> None:
    text = " ".join(run("launch", "--help").output.split())
    assert "a PRESET, KEY=VALUE, --data, --val-share, --profile" in text
    assert "`selfsight embed --help`" in text


def test_drawing_the_built_in_images_says_how_far_it_is_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for drawn in (True, False):
        with pytest.raises(SystemExit) as ended:
            main(["demo-data", str(tmp_path / "images"), "--train", "20", "--val", "10"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out.replace("\n", "")
        assert f"20 training and 10 validation images are in {tmp_path / 'images'}; next: selfsight pack" in shown
        assert ("drawing" in shown and "30/30" in shown) == drawn


def test_user_errors_are_one_message_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["pretrain", "no_such_preset"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: there is no preset 'no_such_preset'")
    assert "Traceback" not in err


def test_the_traceback_is_there_for_those_who_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no_such_preset"):
        main(["pretrain", "no_such_preset"])


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.demo, "run_demo", lambda out: int("a mistake in a library call"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["demo"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("shards/ holds no train-*.tar"), True),
        (PermissionError(13, "Permission denied", "runs"), True),
        (BrokenPipeError(32, "Broken pipe"), False),
    ],
)
def test_which_system_errors_are_the_users(error: OSError, expected: bool) -> None:
    assert is_user_error(error) is expected


def test_the_systems_errors_say_what_to_do() -> None:
    error = OSError(errno.EROFS, "Read-only file system", "/data/look")
    assert told(error) == "/data/look: read-only file system; choose a place that can be written to"
    assert told(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "x: no such file"
    assert told(OSError("ours")) == "ours"


def test_shards_without_their_option_are_asked_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "mae_vit_cifar_cpu", "shards/"])
    assert "or --data shards/ for shards" in capsys.readouterr().err


def test_pretrain_passes_preset_and_overrides(run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launch.pretrain_command, "train", lambda preset, overrides: seen.append((preset, overrides)))
    # the deepspeed launcher puts --local_rank before all
    result = run("pretrain", "--local_rank=1", "mine.yaml", "train.epochs=3", "name=x", "--data", "shards/")
    assert result.exit_code == 0, result.output
    assert seen == [("mine.yaml", ["train.epochs=3", "name=x", "data.train=shards/"])]


def test_pretrain_without_a_preset_says_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain"])
    assert "selfsight pretrain --list" in capsys.readouterr().err


def test_pretrain_lists_presets(run) -> None:
    assert "mae_vit_cifar_cpu" in run("pretrain", "--list").output


def test_launch_runs_the_pretrain_command(run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launch.local, "launch_local", lambda command, nproc: seen.append((command, nproc)) or 3)
    result = run("launch", "--nproc", "2", "mine.yaml", "--data", "shards/", "name=x")
    assert result.exit_code == 3
    assert seen == [
        ([sys.executable, "-P", "-m", "launch", "pretrain", "mine.yaml", "--data", "shards/", "name=x"], 2),
    ]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["probe", "runs/nothing", "--data", "shards"], "runs/nothing is not a folder"),
        (["probe", "timm:a model", "--data", "shards"], "names no model"),
        (["probe", "timm:resnet18", "--data", "no_shards"], "no_shards"),
        (["export", "runs/nothing", "out", "--to", "hf"], "runs/nothing is not a folder"),
        (["pretrain", "mae_vit_cifar_cpu", "--data", "no_shards"], "no_shards"),
        (["pretrain", "no_preset"], "there is no preset"),
        (["pretrain", "--data", "photoz/"], "--data is photoz/, and there is no such file or folder"),
        (["settings", "--of", "simclr"], "there is no kind 'simclr'; there are"),
        (["settings", "temperature", "--of", "mae"], "leave out --of mae"),
        (
            ["settings", "views.global_crops.0.grey"],
            "views.global_crops.0.grey is called views.global_crops.grayscale now",
        ),
        (["pretrain", "mae_vit_cifar_cpu", "data.train=x", "seed=99999999999999999999"], "seed"),
        (["pretrain", "beit2_vitb16_in1k_300"], "is called beitv2_vitb16_in1k_300 now"),
        (["probe", "timm:resnet18", "--data", "no_shards", "--also", "nope"], "there is no probe 'nope'"),
        (["pretrain", "mae_vit_cifar_cpu", "learning_rate=1"], "did you mean optim.lr?"),
        (["report", "runs/nothing"], "runs/nothing"),
        (["status", "runs/nothing"], "runs/nothing"),
        (["settings", "learning_rate"], "did you mean optim.lr?"),
    ],
)
def test_what_needs_no_torch_is_refused_before_it_is_imported(command: list[str], told: str, tmp_path: Path) -> None:
    code = (
        "import sys; from launch.cli import main\n"
        f"try: main({command!r})\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1:] == ["2 False"], done.stdout + done.stderr
    assert told in done.stderr


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"selfsight {version('selfsight')}\n")
