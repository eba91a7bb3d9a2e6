"""Deformable DETR on backbones of ours: the same features, a step, saved and read by `transformers` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.encoders import build_encoder
from pretrain.encoders.saved import EncoderCard
from pretrain.encoders.swin.config import SwinConfig
from pretrain.encoders.vit.config import VitConfig
from pretrain.interop.features import packages
from pretrain.interop.features.backbone import Backbone
from pretrain.interop.features.deformable_detr import deformable_detr
from pretrain.interop.features.folder import backbone_of
from pretrain.interop.features.settings import FeatureSettings

transformers = pytest.importorskip("transformers", reason="needs pip install 'selfsight[detection]'")

TINY: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
TINY |= {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "n_points")}
TINY |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
VIT = VitConfig(dim=32, depth=2, heads=2, patch=16, registers=1)
SWIN = SwinConfig(dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), patch=4, window=4)


def backbone(config: Any, **settings: Any) -> Backbone:
    torch.manual_seed(0)
    encoder = build_encoder(config, (64, 64))
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    card = EncoderCard(config, (64, 64), 3, (0.5,) * 3, (0.2,) * 3, "mae", "mean", 40, 1.25, "photos")
    return backbone_of(encoder, card, FeatureSettings(width=16, **settings))


@pytest.mark.parametrize(
    ("config", "settings", "out_features"),
    [
        (VIT, {"window": 3, "global_blocks": 1}, ("p3", "p4", "p5")),
        (VIT, {"window": 0}, ("c4",)),
        (SWIN, {}, ("c3", "c4", "c5")),
    ],
)
def test_it_reads_our_features_trains_and_is_saved(
    tmp_path: Path, config: Any, settings: dict[str, Any], out_features: tuple[str, ...]
) -> None:
    made = backbone(config, **settings)
    detector = deformable_detr(made, 10, out_features, **TINY).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    theirs = detector.model.backbone.model
    with torch.no_grad():
        ours = made.maps(images)
        ours = ours | made.neck(ours)
        found = theirs(images).feature_maps
    assert theirs.channels == [ours[name].shape[1] for name in out_features]
    assert theirs.out_features == list(out_features)
    assert all(torch.equal(value, ours[name]) for name, value in zip(out_features, found, strict=True))
    if out_features == ("c4",):
        with torch.no_grad():
            assert torch.equal(found[0].flatten(2).mT, made.plain(images).tokens)

    labels = [{"class_labels": torch.tensor([3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    loss = detector.train()(pixel_values=images, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, value in detector.named_parameters() if value.requires_grad and value.grad is None] == []
    frozen = {name for name, value in detector.named_parameters() if not value.requires_grad}
    torch.optim.SGD(detector.parameters(), lr=1e-3).step()

    detector.eval().save_pretrained(tmp_path)
    again = transformers.DeformableDetrForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, detector(pixel_values=images).logits)
    assert {name for name, value in again.named_parameters() if not value.requires_grad} == frozen


def test_what_it_can_not_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = backbone(VIT)
    with pytest.raises(ValueError, match=r"out_features are \['p6'\]; this backbone has c4, p2, p3, p4, p5"):
        deformable_detr(made, 10, ["p6"])
    with pytest.raises(ValueError, match=r"num_feature_levels is 1, and 3 maps are read \(p3, p4, p5\)"):
        deformable_detr(made, 10, num_feature_levels=1)
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "transformers" else name)
    with pytest.raises(ValueError, match=r"Deformable DETR needs transformers.*'selfsight\[detection\]'"):
        deformable_detr(made, 10)
