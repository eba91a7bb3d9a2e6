"""Windows that slide over images larger than an encoder's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.milestones import conditions_of
from eval.sliding import Sliding
from eval.target import open_target
from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard, save_encoder
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.vit.config import VitConfig

VIT = VitConfig(size="tiny", dim=16, depth=2, heads=2, patch=4)


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder(VIT, (16, 16), 3).eval()


def test_each_patch_is_the_mean_of_the_windows_that_show_it() -> None:
    plain, images = encoder(), torch.randn(2, 3, 24, 36)
    sliding = Sliding(plain, 16)
    assert sliding.starts(24) == [0, 8]
    assert sliding.starts(36) == [0, 8, 16, 20]
    with torch.no_grad():
        found = sliding(images, layers=(-2,))
        slow: dict[tuple[int, int], list[Tensor]] = {}
        earlier, classes, pooled = [], [], []
        for top in (0, 8):
            for left in (0, 8, 16, 20):
                part = plain(images[:, :, top : top + 16, left : left + 16], layers=(-2,))
                for row in range(4):
                    for column in range(4):
                        place = (top // 4 + row, left // 4 + column)
                        slow.setdefault(place, []).append(part.tokens[:, 4 * row + column])
                earlier.append(part.layers[0].prefix_tokens)
                classes.append(part.prefix_tokens)
                pooled.append(part.pooled)
    assert found.grid == (6, 9)
    expected = torch.stack([torch.stack(slow[row, column]).mean(dim=0) for row in range(6) for column in range(9)], 1)
    torch.testing.assert_close(found.tokens, expected)
    torch.testing.assert_close(found.prefix_tokens, torch.stack(classes).mean(dim=0))
    torch.testing.assert_close(found.pooled, torch.stack(pooled).mean(dim=0))
    torch.testing.assert_close(found.layers[0].prefix_tokens, torch.stack(earlier).mean(dim=0))
    layer = torch.nn.Linear(16, 3)
    logits = torch.stack([torch.stack([layer(each) for each in slow[row, 4]]).mean(dim=0) for row in range(6)], 1)
    torch.testing.assert_close(layer(found.tokens).view(2, 6, 9, 3)[:, :, 4], logits)


def test_of_its_own_size_it_is_the_encoder() -> None:
    plain, images = encoder(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(Sliding(plain, 16)(images).tokens, plain(images).tokens)


def test_a_pyramid_slides_by_its_last_stride() -> None:
    torch.manual_seed(0)
    swin = SwinConfig(dim=8, depths=(2, 2), heads=(1, 2), patch=8, window=4)
    plain = build_encoder(swin, (64, 64), 3).eval()
    sliding = Sliding(plain, 64)
    with torch.no_grad():
        found = sliding(torch.randn(1, 3, 96, 64), layers=(-2,))
    assert sliding.starts(96) == [0, 32]
    assert found.grid == (96 // plain.stride, 64 // plain.stride)


@pytest.fixture
def target(tmp_path: Path) -> str:
    card = EncoderCard(VIT, (16, 16), 3, (0.4,) * 3, (0.3,) * 3, "dino", "class", 9, 1.0, "small")
    save_encoder(tmp_path / "encoder", encoder().state_dict(), card)
    return str(tmp_path / "encoder")


def test_a_target_says_how_larger_images_are_seen(target: str) -> None:
    assert open_target(target).how_larger() is None
    whole, seen = open_target(target, 32), open_target(target, 32, windows=True)
    assert "seen whole, by an encoder trained on 16x16 px" in str(whole.how_larger())
    assert "through windows of 16 px" in str(seen.how_larger())
    assert seen.architecture != whole.architecture  # features and baselines are kept apart
    assert isinstance(seen.untrained(0), Sliding)
    with pytest.raises(ValueError, match=r"image_size is 16; give a larger one, such as image_size 32"):
        open_target(target, 16, windows=True)
    with pytest.raises(ValueError, match="it must be a multiple of that"):
        open_target(target, 30, windows=True)


def test_results_of_windows_stand_apart() -> None:
    data = {"train": {"checksum": "t"}, "val": {"checksum": "v"}}
    plain, sliding = ({"data": data, "target": {"image_size": 32, "window": window}} for window in (None, 16))
    assert conditions_of(plain) != conditions_of(sliding)
