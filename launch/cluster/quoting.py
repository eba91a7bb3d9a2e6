"""Text of users inside batch scripts, byte for byte and never as code (imports no torch)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def bash_word(text: str) -> str:
    """`text` as one word of a bash script, always on one line.

    shlex's single quotes, which nothing leaves; where there are control characters, bash's $'...', because SLURM
    reads scripts by lines and refuses those with DOS line breaks.
    """
    if "\0" in text:
        raise ValueError(f"{text!r} holds a NUL character, which no program can be given; leave it out")
    if not _CONTROL.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(lambda found: f"\\{ord(found[0]):03o}", escaped) + "'"


def bash_words(words: Sequence[str]) -> str:
    """Several words with spaces between them."""
    return " ".join(bash_word(word) for word in words)


def sbatch_line(option: str, value: str | int | None = None) -> str:
    """`#SBATCH --option=value`; raises ValueError for a value that such a line cannot hold.

    SLURM takes double quotes and backslashes in them as a shell does, and no $ or backtick.
    """
    if value is None:
        return f"#SBATCH --{option}"
    text = str(value)
    if _CONTROL.search(text):
        raise ValueError(
            f"--{option} is {text!r}, and a line of a batch script can hold no line breaks or other control "
            "characters; choose another"
        )
    if not re.fullmatch(r"[A-Za-z0-9_./:,%@+=~^\[\]-]+", text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{option}={text}"


def log_pattern(folder: str, pattern: str) -> str:
    """`folder/pattern` for --output, in which SLURM replaces the % of `pattern` only.

    Raises ValueError for a folder with a backslash, which switches all replacement off.
    """
    if "\\" in folder:
        raise ValueError(
            f"the run folder {folder} has a backslash in its path, which SLURM can't have in the name of a log; choose "
            "another runs=... or name=..."
        )
    return f"{folder.replace('%', '%%')}/{pattern}"
