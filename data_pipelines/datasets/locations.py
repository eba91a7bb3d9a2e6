"""From what a user names to the shards it stands for, wherever they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from data_pipelines.datasets.description import DESCRIPTION, check_description, read_description
from data_pipelines.files import parse_json
from data_pipelines.remote.remote_files import RemoteFile, Shard
from data_pipelines.remote.urls import (
    check_names,
    folder_of,
    inside,
    is_http,
    is_url,
    name_of,
    redact,
    scheme_of,
    without_query,
)
from data_pipelines.shards.index import DamageError
from data_pipelines.shards.index_format import read_index
from data_pipelines.shards.scan import IMAGE_SUFFIXES, INDEX_SUFFIX

if TYPE_CHECKING:  # what fetches is imported where a URL is met
    from data_pipelines.remote.cache import Cache

Spec = str | Path | Sequence[str | Path]

_MOST_BYTES = 1 << 28  # of a dataset.json


class _Description(NamedTuple):
    content: dict[str, Any]
    entries: dict[str, dict[str, Any]]  # of the shards, by name


class Locations:
    """Finds shards, and asks every remote folder only once what it holds.

    Args:
        cache: Through which indexes of remote folders come; default: one in its usual place.
        stage: The usual place is that of staged shards.
    """

    def __init__(self, cache: Cache | None = None, stage: bool = False) -> None:
        self._given, self._stage = cache, stage
        self._descriptions: dict[str, _Description | None] = {}  # by folder, without a query

    @cached_property
    def cache(self) -> Cache:
        """The given one, or the usual."""
        from data_pipelines.remote.cache import Cache, default_folder

        return self._given or Cache(default_folder(self._stage))

    def find(self, spec: Spec, split: str = "train") -> list[Shard]:
        """The tars that `spec` names, in order; see `dataset.open_dataset`.

        Raises:
            FileNotFoundError: There are no such shards; the message says what there is.
            ValueError: It is nothing that may name shards.
        """
        if not isinstance(spec, str | Path):
            return [shard for one in spec for shard in self.find(one, split)]
        if isinstance(spec, Path) or (not is_url(spec) and Path(spec).expanduser().is_dir()):
            return list(local_shards(spec, split))
        shards: list[Shard] = []
        for text in _expanded(spec):
            if not is_url(text):
                shards.extend(local_shards(text, split))
            elif scheme_of(text) == "file":
                shards.extend(local_shards(unquote(urlsplit(text).path), split))
            else:
                shards.extend(self._remote(text, split))
        return shards

    def describe(self, shard: Shard) -> dict[str, Any] | None:
        """What `dataset.json` beside a shard says; None where there is none."""
        if isinstance(shard, Path):
            return read_description(shard.parent)
        description = self._description(folder_of(shard.url))
        return None if description is None else description.content

    def names_beside(self, shard: RemoteFile) -> list[str]:
        """The shards that `dataset.json` beside a shard names."""
        folder = folder_of(shard.url)
        description = self._description(folder)
        names = [] if description is None else list(description.entries)
        check_names(names, folder)
        return names

    def _remote(self, url: str, split: str) -> list[RemoteFile]:
        name, folder = name_of(url), folder_of(url)
        if "*" in folder or "[" in urlsplit(folder).path or (urlsplit(url).query and not is_http(url)):
            raise ValueError(f"{redact(url)}: of a URL, only the last part may hold * or [...], and none of it ?")
        if "*" in name or "[" in name:
            found = [file for file in self._listing(folder, split) if fnmatchcase(file.name, name)]
            if not found:
                raise FileNotFoundError(f"no file matches {redact(url)}")
            return found
        if name.endswith(".tar"):
            return [self._known(RemoteFile(url))]
        listed = self._listing(url, split)
        found = [file for file in listed if re.fullmatch(re.escape(split) + r"-[^/]*\.tar", file.name)]
        if not found:
            others = sorted({file.name.rpartition("-")[0] or file.name for file in listed})
            raise FileNotFoundError(
                f"{redact(url)} holds no {split}-*.tar"
                + (f"; its shards begin with {', '.join(others[:10])}" if others else " and no other .tar")
            )
        return found

    def _listing(self, folder: str, split: str) -> list[RemoteFile]:
        """The tars of a remote folder by name: listed where that can be, else as the files published with them say."""
        if not is_http(folder):
            return [self._known(file) for file in _listed(folder, self.cache)]
        description = self._description(folder)
        if description is not None:
            names: Collection[str] = description.entries
        else:
            try:
                with_index = self.cache.path(RemoteFile(inside(folder, split + INDEX_SUFFIX)))
                names = read_index(with_index).names
            except (FileNotFoundError, PermissionError, DamageError) as error:
                raise FileNotFoundError(
                    f"{redact(folder)} cannot be listed over {scheme_of(folder)}, and neither {DESCRIPTION} nor "
                    f"{split}{INDEX_SUFFIX} can be read to say what it holds ({error}). Publish them beside the "
                    f"shards, or name these: '{redact(inside(without_query(folder), split))}-{{000000..000009}}.tar'"
                ) from error
        check_names(names, folder)
        return [self._known(RemoteFile(inside(folder, name))) for name in sorted(names)]

    def _known(self, file: RemoteFile) -> RemoteFile:
        """With the size and checksum that `dataset.json` gives it."""
        description = self._description(folder_of(file.url))
        entry = None if description is None else description.entries.get(file.name)
        if entry is None:
            return file
        size, sha256 = entry.get("bytes"), entry.get("sha256")
        if not isinstance(size, int) or not re.fullmatch("[0-9a-f]{64}", str(sha256)):
            return file
        if file.state.size not in (None, size):
            raise ValueError(
                f"{file} has {file.state.size} bytes, and {size} by {DESCRIPTION} beside it; upload both again"
            )
        return replace(file, state=replace(file.state, size=size), sha256=sha256)

    def _description(self, folder: str) -> _Description | None:
        plain = without_query(folder)  # links signed one by one are asked about what lies beside them only once
        if plain not in self._descriptions:
            from data_pipelines.remote.fetch import read_bytes

            place = inside(folder, DESCRIPTION)
            try:
                text = read_bytes(place, self.cache.patience, limit=_MOST_BYTES)
            except (FileNotFoundError, PermissionError):  # an object store may refuse instead of saying what is there
                self._descriptions[plain] = None
            else:
                try:
                    content = parse_json(text)
                except ValueError as error:
                    raise ValueError(f"{redact(place)} is not JSON ({error}); publish it again") from error
                self._descriptions[plain] = _described(content, redact(place))
        return self._descriptions[plain]


def _expanded(spec: str) -> list[str]:
    if spec.startswith("pipe:") or "::" in spec.partition("/")[0]:
        raise ValueError(
            f"{redact(spec)}: shards are read from files and URLs; commands (pipe:) and chained URLs (::) are not run"
        )
    return list(braceexpand(spec))


def _holds_images(folder: Path) -> bool:
    """Whether there are images in a folder, as far as a look at a few of its folders tells."""
    endings = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    looked_at = islice(os.walk(folder), 20)
    return any(name.lower().endswith(endings) for _, _, files in looked_at for name in files)


def local_shards(spec: str | Path, split: str = "train") -> list[Path]:
    """What a local path names, in order; raises FileNotFoundError, saying what there is."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        shards = sorted(folder.glob(f"{split}-*.tar"))
        if shards:
            return shards
        others = sorted({path.name.rpartition("-")[0] or path.name for path in folder.glob("*.tar")})
        if not others:
            given = f"{folder} SHARDS" if _holds_images(folder) else f"IMAGES {folder}"
            raise FileNotFoundError(f"{folder} holds no .tar shards; make some with `selfsight pack {given}`")
        raise FileNotFoundError(
            f"{folder} holds no {split}-*.tar; its shards begin with {', '.join(others[:10])}. "
            f"Name the split, or the shards themselves: '{folder / others[0]}*.tar'"
        )
    shards = []
    for text in braceexpand(str(spec)):
        path = Path(text).expanduser()
        if any(letter in text for letter in "*?["):
            found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not found:
                raise FileNotFoundError(f"no file matches {path}")
            shards.extend(found)
        elif path.is_file():
            shards.append(path)
        else:
            raise FileNotFoundError(
                f"{path} does not exist; the data are a folder of shards, a tar, or tars by * or {{0..9}}, here or "
                "at a URL"
            )
    return shards


def _listed(folder: str, cache: Cache) -> list[RemoteFile]:
    """The tars in a folder of a file system that can list, by name."""
    from data_pipelines.remote.fetch import FetchError, retried
    from data_pipelines.remote.fsspec_source import file_system, state_of_info

    fs, path = file_system(folder)
    try:
        found = retried(folder, lambda: fs.ls(path, detail=True), cache.patience)
    except NotImplementedError as error:
        raise FetchError(f"{redact(folder)} cannot be listed; name the shards by {{000000..000009}}") from error
    files = []
    for info in found:
        name = str(info["name"]).rstrip("/").rpartition("/")[2]
        if info.get("type") == "file" and name.endswith(".tar"):
            sha256 = getattr(info.get("lfs"), "sha256", None)  # Hugging Face tells that of large files
            files.append(RemoteFile(inside(folder, name), state_of_info(info), sha256))
    return sorted(files, key=lambda file: file.name)


def _described(content: Any, place: str) -> _Description:
    splits = check_description(content, place).get("splits", {}).values()
    return _Description(content, {shard["name"]: shard for split in splits for shard in split["shards"]})
