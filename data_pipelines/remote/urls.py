"""Where things lie that are no local files, and how to speak of it without giving secrets away."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_NAME_BYTES = 240  # file systems permit 255, and an index has a suffix
_USER = re.compile(r"://[^/\s]*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>?]*)[?][^\s'\"<>]+")


def is_url(text: object) -> bool:
    """Whether it begins like a URL, `scheme://`; `file://` is one too."""
    return _URL.match(str(text)) is not None


def scheme_of(url: str) -> str:
    """`https`, `s3` and so on, in small letters."""
    return url.partition("://")[0].lower()


def is_http(url: str) -> bool:
    """Whether it is spoken to by HTTP directly: such a place cannot be listed."""
    return scheme_of(url) in ("http", "https")


def redact(text: str) -> str:
    """A text as it may be shown and written down: of every URL in it, user, password and query are hidden.

    A query may hold a signature or a token under any name, so that none of its values is taken for harmless.
    """
    return _QUERY.sub(r"\1?***", _USER.sub("://***@", text))


def without_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without user and password, and the two of them."""
    parts = urlsplit(url)
    user, found, place = parts.netloc.rpartition("@")
    if not found:
        return url, None
    name, _, password = user.partition(":")
    return urlunsplit(parts._replace(netloc=place)), (unquote(name), unquote(password))


def name_of(place: str) -> str:
    """The last part of the path of a URL, or of a local one."""
    if not is_url(place):
        return Path(place).name
    name = urlsplit(place).path.rstrip("/").rpartition("/")[2]
    return unquote(name) if is_http(place) else name


def check_names(names: Iterable[str], folder: str) -> None:
    """Raise ValueError for a name from elsewhere that is not plainly that of a file in its own folder.

    All names by which something is written here pass through this, as they are after decoding: those in URLs, in
    listings, and in what is published beside shards.
    """
    for name in names:
        if (
            name in ("", ".", "..")
            or "/" in name
            or "\\" in name
            or not name.isprintable()  # with NUL, line breaks and bytes that are no UTF-8
            or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES
        ):
            shown = repr(name) if len(name) <= _MAX_NAME_BYTES else f"{name[:50]!r}... of {len(name):,} letters"
            raise ValueError(
                f"{redact(folder)}: {shown} is no name of a file in it (printable, without / and \\, of at most "
                f"{_MAX_NAME_BYTES} bytes); rename it there"
            )


def folder_of(url: str) -> str:
    """The URL of what `url` lies in; a query stays, as it may be what opens the folder too."""
    if not is_url(url):
        return str(Path(url).parent)
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0], fragment=""))


def inside(folder: str, name: str) -> str:
    """The URL of the file `name` in a folder."""
    parts = urlsplit(folder)
    path = parts.path.rstrip("/") + "/" + (quote(name) if is_http(folder) else name)
    return urlunsplit(parts._replace(path=path, fragment=""))


def without_query(url: str) -> str:
    """The URL up to its path."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))
