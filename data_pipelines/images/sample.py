"""A sample of a data set before it is decoded, and how what may lie beside its image is named."""

from __future__ import annotations

from typing import NamedTuple

from data_pipelines.remote.remote_files import Shard


class Sample(NamedTuple):
    """One sample as stored: `image` is the file's bytes, still encoded.

    frames: those of a stack of numbered members, in order; `image` is then the first of them.
    """

    key: str
    shard: Shard
    image: bytes
    label: int | None
    frames: tuple[bytes, ...] = ()


#: By kind, what names of its members end with, behind the image's own name.
SUFFIXES = {"mask": ("mask.png",), "depth": ("depth.png", "depth.npy")}
KINDS = tuple(SUFFIXES)
#: What a member with the captions of an image is called behind its key, and its kind.
TEXT_SUFFIX, TEXT = "txt", "text"


class MapName(NamedTuple):
    """What a member's name says of it: `field` stands between the first dot of its key and the kind, mostly nothing."""

    field: str
    kind: str
    suffix: str


def map_name(suffix: str) -> MapName | None:
    """Of what follows the first dot of a name, in lower case; None where it names no map."""
    for kind, endings in SUFFIXES.items():
        for ending in endings:
            if suffix == ending or suffix.endswith(f".{ending}"):
                return MapName(suffix[: -len(ending)].rstrip("."), kind, ending)
    return None
