"""Numbers in sentences (imports nothing)."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 shard`, `1,024 shards`, `2 classes`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


def samples_in(samples: int, shards: int) -> str:
    """`3 samples in 1 shard`."""
    return f"{counted(samples, 'sample')} in {counted(shards, 'shard')}"
