"""Files of any of fsspec's file systems: object stores, the Hugging Face Hub, and what else there is a package for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipelines.remote.remote_files import REQUEST_BYTES, ChangedError, FileState, check_same, refusal
from data_pipelines.remote.urls import redact, scheme_of

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # selfsight's own, by scheme
#: What fsspec's file systems call that which changes with a file, the surest first.
_VERSIONS = ("xet_hash", "ETag", "etag", "md5Hash", "sha256", "generation", "blob_id", "checksum")
_TIMES = ("LastModified", "last_modified", "last_commit", "mtime", "updated", "modified", "created")


class FsspecSource:
    """A file of any of fsspec's file systems, with the credentials and settings that those find by themselves."""

    def __init__(self, url: str) -> None:
        self._fs, self._path = file_system(url)

    def state(self) -> FileState:
        self._fs.invalidate_cache()  # else a listing of an hour ago might answer
        return state_of_info(_translated(self._fs.info, self._path))

    def stream(self, start: int, known: FileState) -> tuple[FileState, Iterator[tuple[int, bytes]]]:
        found = self.state()
        check_same(known, found)
        return found, self._body(start, found)

    def _body(self, position: int, found: FileState) -> Iterator[tuple[int, bytes]]:
        with _translated(self._fs.open, self._path, "rb", cache_type="none") as file:
            file.seek(position)
            while piece := _translated(file.read, REQUEST_BYTES):
                yield position, piece
                position += len(piece)
        check_same(found, self.state())  # the pieces are requests of their own, between which it may have changed


def state_of_info(info: dict[str, Any]) -> FileState:
    """What a file system's own description says."""
    version = next((f"{name} {info[name]}" for name in (*_VERSIONS, *_TIMES) if info.get(name) is not None), None)
    return FileState(info.get("size"), version)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it."""
    import fsspec

    scheme = scheme_of(url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = f"pip install '.[{_EXTRAS[scheme]}]' in the checkout of selfsight" if scheme in _EXTRAS else str(error)
        raise ValueError(f"{redact(url)}: {scheme}:// needs a package that is not installed: {extra}") from None
    except ValueError as error:
        raise ValueError(
            f"{redact(url)}: {scheme}:// is no known kind of place ({redact(str(error))}); known are local "
            "paths, https://, s3://, gs://, hf://datasets/ and what else fsspec has"
        ) from None


def _translated(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a file system; errors that no other try mends become those of the head of this file."""
    try:
        return call(*args, **kwargs)
    except (FileNotFoundError, PermissionError, ChangedError):
        raise
    except (IsADirectoryError, NotImplementedError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    except Exception as error:
        status = getattr(error, "status", None) or getattr(error, "code", None)
        status = status or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int) and 400 <= status < 600:
            raise refusal(status, str(error)) from None
        if "Credentials" in type(error).__name__:  # botocore's and google-auth's share no base class with anything
            raise PermissionError(f"{type(error).__name__}: {error}") from None
        raise
