from __future__ import annotations

import torch

from pretrain.engines.collectives import GatheredScalars, all_gather_objects, all_gather_scalars
from pretrain.engines.engine import initialise_distributed


def test_numbers_keep_all_their_digits() -> None:
    """A digest has 32 bits, more than a float32 holds."""
    initialise_distributed(torch.device("cpu"))
    agreed = all_gather_scalars({"loss": torch.tensor(0.5), "digest": float(2**32 - 1)}, torch.device("cpu"))
    assert agreed.by_rank == {"loss": [0.5], "digest": [2**32 - 1]}


def test_longer_things_are_told_as_json() -> None:
    initialise_distributed(torch.device("cpu"))
    found = {"layer": "encoder.blocks.3", "samples": [1, None, "é"]}
    assert all_gather_objects(found, torch.device("cpu")) == [found]


def test_what_holds_for_all_ranks() -> None:
    agreed = GatheredScalars({"saved": [3.0, 2.0], "stop": [0.0, 1.0]})
    assert (agreed.mean("saved"), agreed.total("saved"), agreed.lowest("saved")) == (2.5, 5, 2)
    assert agreed.any("stop")
    assert not GatheredScalars({"stop": [0.0, 0.0]}).any("stop")
