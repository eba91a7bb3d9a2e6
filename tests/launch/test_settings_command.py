from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
import yaml
from pydantic import TypeAdapter
from typer.testing import CliRunner

from launch.cli import app, main
from pretrain.config import Config
from pretrain.config.annotations import all_settings
from pretrain.config.describe import EXAMPLES, default_of, example_of, is_section, meaning
from pretrain.config.keys import RENAMED, SYNONYMS, nearest


def shown(*args: str) -> str:
    result = CliRunner().invoke(app, ["settings", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_setting_says_what_it_means_and_its_example_is_allowed() -> None:
    """A new setting needs a comment behind it, or a string below it."""
    for setting in all_settings(Config):
        assert meaning(setting), setting.path
        if not is_section(setting):
            TypeAdapter(setting.annotation).validate_python(yaml.safe_load(" ".join(shlex.split(example_of(setting)))))


def test_what_is_said_beside_the_sections_names_settings_that_there_are() -> None:
    paths = {setting.path for setting in all_settings(Config)}
    assert set(EXAMPLES) <= paths
    assert set(RENAMED.values()) | set(SYNONYMS.values()) <= paths
    assert not set(RENAMED) & paths


def test_a_key_is_told_with_meaning_default_values_and_an_example() -> None:
    assert shown("checkpoint.on_failure") == (
        "checkpoint.on_failure\n  when none can be written, as on a full disk\n  takes    continue | stop\n"
        "  default  continue\n  example  checkpoint.on_failure=stop\n"
    )
    assert "default  none: it has to be set" in shown("optim.lr")


def test_positions_in_lists_are_no_part_of_a_setting() -> None:
    assert shown("views.global_crops.0.size") == shown("views.global_crops.size")


def test_a_section_of_several_kinds_lists_them_and_shows_the_one_asked_for() -> None:
    assert all(f"\n{kind} " in shown("method") for kind in ("mae", "mim", "dino", "dvae", "vqkd"))
    dino = shown("method", "--of", "dino")
    assert "method.prototypes" in dino
    assert "method.decoder_dim" not in dino


def test_the_default_is_that_of_the_kind() -> None:
    defaults = {s.kind: default_of(s) for s in all_settings(Config) if s.path == "method.mask.ratio"}
    assert {kind: defaults[kind] for kind in ("mae", "mim")} == {"mae": "0.75", "mim": "0.6"}


def test_a_word_is_looked_for_in_names_and_meanings() -> None:
    found = shown("temperature")
    assert "method.student_temperature" in found
    assert "optim.lr" not in found
    assert "checkpoint.on_failure" in shown("full disk")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["learning_rate"], "did you mean optim.lr?"),
        (["train.accumulation"], "is called train.grad_accum_steps now"),
        (
            ["method", "--of", "moco"],
            "there are clip, dino, distill, dvae, finetune, ijepa, lejepa, mae, mim, mp3",
        ),
        (["optim", "--of", "adam"], "it has one kind only"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["settings", *args])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_settings_are_shown_without_torch() -> None:
    code = (
        "from launch.cli import app; import sys\n"
        "try: app(['settings', 'optim'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_nearest_setting_says_whose_it_is() -> None:
    assert nearest(Config, "prototypes") == [
        "method.prototypes (of method dino)",
        "method.ibot.prototypes (of method dino)",
    ]
