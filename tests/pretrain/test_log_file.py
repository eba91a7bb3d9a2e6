from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from pretrain.tracking.log_file import LOG, logged


def test_what_is_printed_and_warned_of_is_kept_over_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("one", "two"):
        with logged(tmp_path):
            print(text)
            print("wrong", text, file=sys.stderr)
            sys.stdout.flush()
    lines = [line for line in (tmp_path / LOG).read_text().splitlines() if not line.startswith("--- started ")]
    assert lines == ["one", "wrong one", "two", "wrong two"]
    assert capsys.readouterr() == ("one\ntwo\n", "wrong one\nwrong two\n")


def test_warnings_are_kept(tmp_path: Path) -> None:
    with logged(tmp_path), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        warnings.warn("be careful", stacklevel=1)
    assert "be careful" in (tmp_path / LOG).read_text()


def test_the_streams_are_the_terminals_again_afterwards(tmp_path: Path) -> None:
    before = sys.stdout, sys.stderr
    with suppress(ValueError), logged(tmp_path):
        assert sys.stdout.isatty() == before[0].isatty()
        raise ValueError("ours")
    assert (sys.stdout, sys.stderr) == before


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOG).mkdir()
    with logged(tmp_path):
        print("trains")
    assert capsys.readouterr().out.splitlines()[-1] == "trains"
