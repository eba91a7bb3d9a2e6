"""`store.json`: what a store's features are of, and how they were made (imports no torch)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.files import read_json, write_json

if TYPE_CHECKING:
    from eval.store.layout import Layout

NAME = "store.json"
PARTS = "parquet"
FORMAT = "selfsight features"
#: Raise it when the same settings give other features, or files that are read in another way.
VERSION = 1
MOST_ROWS = 8192  # of a part
MOST_PART_BYTES = 1 << 28
LEAST_ROWS = 64
MOST_NAMED = 20
_SHOWN = 60  # letters of a value in a message


@dataclass(frozen=True)
class Description:
    """Of the features of one split of a data set.

    identity: everything that makes them other features. Stores of equal identity are the same store, and go on with
        each other's parts: `encoder` (digest of weights and architecture), `data` (checksum), `num_samples`, `crops`,
        `arithmetic`, `features` (type of the kept ones), `layout`, `tokens` (type of the kept ones, None without),
        `last_blocks`, `rows_per_part`.
    about: for people and for messages: names, paths, versions, the reason for the precision, names of classes.
    rows: images that could be read, where the store is complete; `unreadable`: how many could not; `named`: the keys of
        the first of these.
    """

    identity: dict[str, Any]
    about: dict[str, Any]
    rows: int | None = None
    unreadable: int = 0
    named: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Of the split, readable or not."""
        return int(self.identity["num_samples"])

    @property
    def rows_per_part(self) -> int:
        return int(self.identity["rows_per_part"])

    @property
    def num_parts(self) -> int:
        return -(-self.num_samples // self.rows_per_part)

    @property
    def layout(self) -> Layout:
        """Which columns of a row are what."""
        from eval.store.layout import Layout

        return Layout.from_json(self.identity["layout"])

    @property
    def digest(self) -> str:
        """Equal where the identities are."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def part(self, number: int) -> range:
        """The samples of a part: a function of its number alone, whoever makes it."""
        start = number * self.rows_per_part
        return range(start, min(start + self.rows_per_part, self.num_samples))

    def path(self, folder: Path, number: int) -> Path:
        """Of a part's file in the folder of its store. Other programs read the folder `parquet` as one table."""
        return folder / PARTS / f"part-{number:05d}-of-{self.num_parts:05d}.parquet"

    def completed(self, rows: int, unreadable: int, named: tuple[str, ...]) -> Description:
        """The same of a store that has all its parts."""
        return replace(self, rows=rows, unreadable=unreadable, named=named[:MOST_NAMED])

    def write(self, folder: Path) -> None:
        """Into a folder's `store.json`."""
        complete = {"rows": self.rows, "unreadable": self.unreadable, "unreadable_keys": list(self.named)}
        content = {"format": FORMAT, **self.about, **self.identity, "parts": self.num_parts}
        keys = {"identity": sorted(self.identity), "about": sorted(self.about)}
        write_json(folder / NAME, {**content, "complete": None if self.rows is None else complete, "keys": keys})

    @classmethod
    def read(cls, folder: Path) -> Description | None:
        """Of a folder; None where it has none.

        Raises ValueError where its `store.json` is another program's, or a version's that this one does not read.
        """
        found = read_json(folder / NAME)
        if found is None:
            return None
        try:
            if found["format"] != FORMAT or found["version"] != VERSION:
                raise ValueError(f"it says format {found['format']!r}, version {found['version']!r}")
            identity = {key: found[key] for key in found["keys"]["identity"]}
            about = {key: found[key] for key in found["keys"]["about"]}
            complete = found["complete"] or {"rows": None, "unreadable": 0, "unreadable_keys": ()}
            named = tuple(complete["unreadable_keys"])
            return cls(identity, about, complete["rows"], int(complete["unreadable"]), named)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / NAME} describes no store of features that this version reads ({error}); it reads version "
                f"{VERSION}. Make it again with `selfsight embed`"
            ) from error

    def differences(self, other: Description) -> list[str]:
        """`key: ours, not theirs`, of all that makes the other one's features others."""
        ours, theirs = _flat(self.identity), _flat(other.identity)
        return [
            f"{key}: {_shown(ours.get(key))} there, {_shown(theirs.get(key))} asked"
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key)
        ]


def rows_per_part(num_bytes: int) -> int:
    """Of rows of so many bytes: 8,192, or for large ones fewer, so that a part fits well into memory."""
    rows = MOST_ROWS
    while rows > LEAST_ROWS and rows * num_bytes > MOST_PART_BYTES:
        rows //= 2
    return rows


def descriptions(folder: str | Path) -> dict[str, tuple[Path, Description]]:
    """Folder and description of each split of a store, by its name; raises FileNotFoundError where there is none."""
    folder = Path(folder).expanduser()
    found = {}
    for place in (folder, *sorted(path.parent for path in folder.glob(f"*/{NAME}"))):
        if (description := Description.read(place)) is not None:
            found[str(description.identity["split"])] = (place, description)
    if not found:
        raise FileNotFoundError(f"{folder} holds no store of features; `selfsight embed TARGET --data D --out F` does")
    return found


def is_store(folder: str | Path) -> bool:
    """Whether a folder holds features, of one split or of several."""
    folder = Path(folder).expanduser()
    return folder.is_dir() and ((folder / NAME).is_file() or any(folder.glob(f"*/{NAME}")))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
