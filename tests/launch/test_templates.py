from __future__ import annotations

import shutil
import subprocess

import pytest

from pretrain.survival.stopping import EXIT_STOPPED
from slurm import template


@pytest.mark.parametrize("name", ["pretrain", "probe"])
@pytest.mark.parametrize(
    "checker", [["bash", "-n", "/dev/stdin"], ["shellcheck", "--shell=bash", "-"]], ids=lambda c: c[0]
)
def test_batch_scripts_are_sound(name: str, checker: list[str]) -> None:
    if shutil.which(checker[0]) is None:
        pytest.skip(f"{checker[0]} is not installed")
    done = subprocess.run(checker, input=template(name), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "usage"), [("pretrain", "no preset"), ("probe", "usage")])
def test_without_arguments_they_say_how_they_are_used(name: str, usage: str) -> None:
    done = subprocess.run(["bash", "-s"], input=template(name), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert usage in done.stderr


def test_the_script_requeues_on_the_code_that_training_ends_with() -> None:
    assert f"EXIT_STOPPED={EXIT_STOPPED}" in template("pretrain")


def test_an_unknown_template_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no template 'train'; templates: pretrain, probe"):
        template("train")
