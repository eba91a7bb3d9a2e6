from __future__ import annotations

import subprocess

import pytest

from launch.cluster.quoting import bash_word, bash_words, log_pattern, sbatch_line

NASTY = [
    "",
    "plain",
    "with space",
    "it's",
    'a "quote"',
    "$(touch INJECTED)",
    "`touch INJECTED`",
    "${HOME} $HOME",
    "a;touch INJECTED",
    "a&&b||c|d>e<f",
    "two\nlines",
    "dos\r\nlines",
    "tab\there",
    "bell\x07 escape\x1b[31m del\x7f",
    "octal \\012 after a\n1",
    "back\\slash'and\nquote'",
    "!history! ~ * ? [a-z] {1..3}",
    "-n",
    "--help",
    "100%j%%",
    "ünïcödé 日本 🙂",
    "#comment",
    "=cmd",
    "\udcff\udc80",  # bytes that are no UTF-8, as Python passes them on
]


def test_every_argument_arrives_byte_for_byte() -> None:
    script = f"set -- {bash_words(NASTY)}\nprintf '%s\\0' \"$@\"\n"
    done = subprocess.run(["bash"], input=script.encode("utf-8", "surrogateescape"), capture_output=True, check=True)
    assert done.stderr == b""
    assert done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == NASTY


@pytest.mark.parametrize("text", NASTY)
def test_a_word_is_one_line(text: str) -> None:
    assert "\n" not in bash_word(text)
    assert "\r" not in bash_word(text)


def test_nul_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        bash_word("a\0b")


def test_sbatch_lines() -> None:
    assert sbatch_line("requeue") == "#SBATCH --requeue"
    assert sbatch_line("nodes", 4) == "#SBATCH --nodes=4"
    assert sbatch_line("constraint", "a100&ib") == '#SBATCH --constraint="a100&ib"'
    assert sbatch_line("chdir", '/a "b\\') == '#SBATCH --chdir="/a \\"b\\\\"'


@pytest.mark.parametrize("text", ["a\nb", "a\n#SBATCH --uid=0", "a\rb", "a\0b", "\x1b"])
def test_an_sbatch_line_has_no_control_characters(text: str) -> None:
    with pytest.raises(ValueError, match="no line breaks"):
        sbatch_line("account", text)


def test_percent_signs_of_a_folder_are_no_pattern() -> None:
    assert log_pattern("/runs/100%u", "%j.out") == "/runs/100%%u/%j.out"
    with pytest.raises(ValueError, match="backslash"):
        log_pattern("/runs/a\\b", "%j.out")
