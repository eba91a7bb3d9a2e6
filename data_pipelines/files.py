"""Files that are there whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

_log = logging.getLogger(__name__)
TEMPORARY_SUFFIX = ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` when the block ends well, its bytes on the disk by then."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("xb") as file:  # with the rights that the umask leaves, unlike mkstemp's
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            error.filename = str(path)  # which write() does not tell
        raise
    finally:
        temporary.unlink(missing_ok=True)  # still there only if the block failed
    sync(path.parent)


def in_memory(name: str) -> int:
    """The descriptor of an empty file in memory, for the caller to close.

    It has no place among others, and is gone with the last process that has it open or mapped.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(f"selfsight-{name}", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # of an interpreter built for older systems
        return os.dup(file.fileno())


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be made in a folder, which may be still to be made.

    For before long work whose result goes there.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, and {folder} was to be a folder in it; choose another place")
    try:
        with tempfile.TemporaryFile(dir=there):  # asks the file system itself, whatever the mode of the folder says
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A place where the file or folder `out` is made; it goes to where it belongs if the block ends well, and else
    nowhere. Files made beside it go along."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=TEMPORARY_SUFFIX))
    try:
        (folder / "new").mkdir()
        (folder / "old").mkdir()
        yield folder / "new" / out.name
        for path in (folder / "new").rglob("*"):
            sync(path)
        for path in sorted((folder / "new").iterdir(), key=lambda path: path.name == out.name):  # `out` itself last
            final = out.parent / path.name
            if final.exists():
                if not overwrite:
                    raise FileExistsError(f"{final} appeared meanwhile; choose another place")
                final.rename(folder / "old" / path.name)
            path.rename(final)
        sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[Any]) -> bool:
    """Hold an open file against other processes until it is closed; False: another process holds it.

    The kernel lets go when the process ends, however it does. NFS locks only files that are open for writing. Where
    the file system cannot lock at all, a warning is logged.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _log.warning("%s cannot be locked (%s); see to it that it is used once at a time", file.name, error.strerror)
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write `value`, readable by people, whole or not at all; ValueError for what JSON has no word for, as NaN."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except RecursionError as error:
        raise ValueError(f"{path} is not written: its values are nested too deep") from error
    write_text(path, text + "\n")


def read_json(path: Path) -> Any | None:
    """What the file holds; None if there is no such file."""
    try:
        return parse_json(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it or write it again") from error


def parse_json(text: str | bytes) -> Any:
    """What a text says that may be a stranger's; ValueError for what is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
