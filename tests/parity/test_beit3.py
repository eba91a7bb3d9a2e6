"""BEiT-3's image encoder against values recorded from torchscale's code, with and without masked patches; see
test_encoders.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import rearrange
from parity_files import everything, gradients_as_state, imported, recorded, relative_error

from pretrain.encoders.base import Mask


def test_tokens_and_gradients_are_the_authors(tmp_path: Path) -> None:
    record = recorded("beit3.pt")
    told, images = record["outputs"], record["inputs"]["image"]
    encoder, found = imported(
        record["state_dict"], "beit3", tmp_path / "weights", "heads=2", mask_token=True, size=(32, 32)
    )
    encoder.load_state_dict({"mask_token": found.method["encoder.mask_token"]}, strict=False)
    torch.testing.assert_close(everything(encoder(images)), told["vision_only_unmasked"], atol=1e-4, rtol=0)
    mask = Mask(token=rearrange(record["inputs"]["masked"].bool(), "b (h w) -> b h w", h=4))
    tokens = everything(encoder(images, mask))
    torch.testing.assert_close(tokens, told["vision_only"], atol=1e-4, rtol=0)

    loss = (tokens * record["cotangents"]["vision_only"] + tokens**2 / 2).mean()
    assert loss.item() == pytest.approx(float(record["loss"]), rel=1e-5)
    loss.backward()
    slopes, _ = imported(gradients_as_state(record), "beit3", tmp_path / "gradients", "heads=2", size=(32, 32))
    expected = dict(slopes.inner().named_parameters())
    for name, parameter in encoder.inner().named_parameters():
        if expected[name].norm() > 1e-7:
            ours, theirs = parameter.grad, expected[name]
            if name.endswith("attn.qkv.bias"):  # of the keys' there is none in truth
                ours, theirs = (torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (ours, theirs))
            assert relative_error(ours, theirs) < 1e-3, name
