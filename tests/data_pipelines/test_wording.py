from __future__ import annotations

import pytest

from data_pipelines.wording import counted


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (1024, "1,024 shards")]
)
def test_one_is_not_many(number: int, words: str) -> None:
    assert counted(number, "shard") == words
