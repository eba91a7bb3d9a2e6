"""A sample of a data set before it is decoded."""

from __future__ import annotations

from typing import NamedTuple

from data_pipelines.remote.remote_files import Shard


class Sample(NamedTuple):
    """One sample as stored: `image` is the file's bytes, still encoded."""

    key: str
    shard: Shard
    image: bytes
    label: int | None
