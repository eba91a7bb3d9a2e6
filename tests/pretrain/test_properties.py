"""What must hold in every cell of method x encoder, at every shape of image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_cells import cell_data
from test_supported import SMALL
from tiny import build, random_batch

from pretrain.config import Config
from pretrain.config.load import parse_config
from pretrain.encoders.registry import FAMILIES
from pretrain.methods.base import Method, mask_of

ROWS = [row for row in SMALL if not row.startswith("timm:")]
DROPPING = [row for row in ROWS if FAMILIES[SMALL[row][0]["family"]].drop_layout != "none"]


@pytest.fixture(params=[(64, 64), (64, 128)], ids=["square", "wide"])
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def cell(method: str, row: str, size: tuple[int, int]) -> tuple[Config, Any]:
    data = cell_data(method, row, Path("nowhere"), Path("nowhere"))
    for crop in data["views"]["global_crops"]:
        crop["size"] = list(size)
    if method == "mae":
        data["method"]["mask"]["secondary"] = 0.25 if data["method"]["mask"]["kind"] == "one_in_2x2" else 0.0
    config = parse_config(data)
    return config, build(config)


def spread(method: Method) -> None:
    """Move the parameters away from a start at which some branches say nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if parameter.requires_grad and "logit_scale" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize(("name", "row"), [*(("mae", row) for row in DROPPING), *(("mim", row) for row in ROWS)])
def test_changed_hidden_pixels_change_nothing(name: str, row: str, size: tuple[int, int]) -> None:
    config, method = cell(name, row, size)
    spread(method.eval())
    first, second = random_batch(config), random_batch(config)
    unseen = torch.zeros_like(first["drop_mask" if "drop_mask" in first else "token_mask"])
    for part in ("drop_mask", "token_mask"):
        unseen |= first.get(part, torch.tensor(False))
    unit = size[0] // unseen.shape[1]
    pixels = unseen.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2)[:, None, None]
    second["global_crops"] = torch.where(pixels, random_batch(config, seed=9)["global_crops"], first["global_crops"])
    assert not torch.equal(first["global_crops"], second["global_crops"])
    outputs = []
    for batch in (first, second):
        images = method.normalise(batch["global_crops"][:, 0])
        outputs.append(method.encoder(images, mask_of(batch)).tokens)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("row", DROPPING)
def test_decoded_positions_belong_to_their_tokens(row: str, size: tuple[int, int]) -> None:
    """Tokens shuffled together with their units decode to the same; shuffled without them, to something else."""
    config, method = cell("mae", row, size)
    spread(method.eval())
    batch = random_batch(config)
    features = method.encoder(method.normalise(batch["global_crops"][:, 0]), mask_of(batch))
    assert features.ids_keep is not None
    shown = ~batch["drop_mask"].flatten(1)  # type: ignore[union-attr]
    assert all(
        sorted(units.tolist()) == visible.nonzero().flatten().tolist()
        for units, visible in zip(features.ids_keep.flatten(1), shown, strict=True)
    )
    if features.tokens.shape[1] == 1:
        return
    order = torch.arange(features.tokens.shape[1]).flip(0)
    together = features._replace(tokens=features.tokens[:, order], ids_keep=features.ids_keep[:, order])
    torch.testing.assert_close(method.decode(together), method.decode(features))
    apart = features._replace(tokens=features.tokens[:, order])
    assert not torch.allclose(method.decode(apart), method.decode(features))


@pytest.mark.parametrize(
    ("name", "row"),
    [*(("mae", row) for row in DROPPING), *((name, row) for name in ("mim", "dino", "dinov2") for row in ROWS)],
)
def test_gradients_reach_every_trainable_parameter(name: str, row: str) -> None:
    config, method = cell(name, row, (64, 64))
    method.train()
    spread(method)
    method(random_batch(config), 0)["loss"].backward()
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        else:
            assert parameter.grad is None, key
