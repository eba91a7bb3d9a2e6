"""SAM's image encoder that starts from a ViT of ours: every key accounted for, the same features, and it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from pretrain.encoders import Encoder, build_encoder
from pretrain.encoders.base import Windows
from pretrain.encoders.saved import EncoderCard
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.vit.config import VitConfig
from pretrain.encoders.vit.windowed import WindowedVit
from pretrain.interop.features import packages
from pretrain.interop.features.sam import SamStart, start_sam

pytest.importorskip("transformers", reason="needs pip install 'selfsight[detection]'")

SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "patch": 16, "positions": "sincos"}
DECODER = {"mlp_dim": 16, "iou_head_hidden_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
PROMPT = {"mask_input_channels": 4}


def mae_encoder(**changes: Any) -> tuple[Encoder, EncoderCard]:
    config = VitConfig(**SMALL | {"pool": "mean"} | changes)
    torch.manual_seed(0)
    encoder = build_encoder(config, (64, 64)).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder, EncoderCard(config, (64, 64), 3, (0.5,) * 3, (0.2,) * 3, "mae", "mean", 40, 1.25, "photos")


def started(encoder: Encoder, card: EncoderCard, **settings: Any) -> SamStart:
    return start_sam(encoder, card, width=32, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER, **settings)


def before_the_neck(model: Any, images: Tensor) -> Tensor:
    """(b, h, w, d) that SAM's last block gives."""
    kept = []
    handle = model.vision_encoder.neck.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    model.vision_encoder(images)
    handle.remove()
    return kept[0]


def images(side: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@torch.no_grad()
def test_without_windows_its_features_are_the_encoders(layer_scale: float | None) -> None:
    encoder, card = mae_encoder(class_token=False, layer_scale=layer_scale)
    start = started(encoder, card, image_size=64, window=0)
    found = before_the_neck(start.model, images(64))
    expected = encoder(images(64)).states
    torch.testing.assert_close(rearrange(found, "b h w d -> b (h w) d"), expected, atol=1e-5, rtol=1e-5)
    ours, theirs = set(encoder.inner().state_dict()), set(start.model.vision_encoder.state_dict())
    assert ours == set(start.taken) | set(start.left)
    targets = {name.partition(",")[0] for key, name in start.taken.items() if ".ls" not in key}
    assert theirs == targets | set(start.fresh)
    assert all(start.left.values())
    assert all(start.fresh.values())


@torch.no_grad()
def test_windows_positions_and_the_class_token_as_our_own_form_has_them() -> None:
    encoder, card = mae_encoder(registers=1)
    start = started(encoder, card, image_size=80, window=3, global_blocks=(1,))
    own = WindowedVit(encoder, Windows(3, (1,), True, None, filler_seen=True, prefix=False))
    for number, layer in enumerate(start.model.vision_encoder.layers):  # once they are learned
        for name, table in (("rel_pos_h", "rows"), ("rel_pos_w", "columns")):
            getattr(layer.attn, name).normal_()
            if number == 0:
                getattr(own.relative[number], table).copy_(getattr(layer.attn, name))
    torch.nn.init.zeros_(start.model.vision_encoder.layers[1].attn.rel_pos_h)
    torch.nn.init.zeros_(start.model.vision_encoder.layers[1].attn.rel_pos_w)
    found = before_the_neck(start.model, images(80))
    expected = own(images(80)).states
    torch.testing.assert_close(rearrange(found, "b h w d -> b (h w) d"), expected, atol=1e-5, rtol=1e-5)
    assert start.left.keys() == {"cls_token", "reg_token", "norm.weight", "norm.bias"}
    assert start.taken["pos_embed"] == (
        "pos_embed, interpolated from (4, 4) to (5, 5) patches, 2 of class and registers left out"
    )
    assert start.taken["blocks.1.attn.qkv.weight"] == "layers.1.attn.qkv.weight"
    assert set(start.fresh.values()) == {"relative positions start at zero", "SAM's neck starts at random"}


def test_a_step_reaches_every_parameter_of_the_image_encoder() -> None:
    model = started(*mae_encoder(), image_size=64, window=3, global_blocks=1).model.train()
    before = {name: value.clone() for name, value in model.vision_encoder.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    points = torch.tensor([[[[20.0, 30.0]]], [[[40.0, 30.0]]]])
    masks = model(pixel_values=images(64), input_points=points, multimask_output=False).pred_masks
    masks.sigmoid().sub(0.3).square().mean().backward()
    optimizer.step()
    for name, value in model.vision_encoder.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().max() > 1e-9, name  # a neck that starts near zero lets nothing through
        assert not torch.equal(value, before[name]), name


def test_what_sam_can_not_start_from_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    swin = SwinConfig(dim=8, depths=(1, 1), heads=(1, 2), patch=4, window=4)
    card = EncoderCard(swin, (64, 64), 3, (0.5,) * 3, (0.2,) * 3, "mae", "mean", 40, 1.25, "photos")
    with pytest.raises(ValueError, match=r"swin can't be SAM's image encoder.*family vit"):
        started(build_encoder(swin, (64, 64)), card)
    with pytest.raises(ValueError, match="stem=conv"):
        started(*mae_encoder(stem="conv"))
    with pytest.raises(ValueError, match="image_size is 1000; it must be a multiple of the patch of 16 px"):
        started(*mae_encoder(), image_size=1000)
    with pytest.raises(ValueError, match=r"\(2,\) are to attend everywhere, and the encoder's are 0 .. 1"):
        started(*mae_encoder(), image_size=64, global_blocks=(2,))
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"SAM needs transformers.*pip install 'selfsight\[detection\]'"):
        started(*mae_encoder())
