"""Image encoders behind one seam (`base.Encoder`)."""

from __future__ import annotations

from pretrain.encoders.base import Encoder, Features, Mask
from pretrain.encoders.beit import BeitEncoder
from pretrain.encoders.pvt import PvtEncoder
from pretrain.encoders.swin import SwinEncoder
from pretrain.encoders.vit import VitEncoder
from pretrain.schema import BeitConfig, EncoderConfig, PvtConfig, SwinConfig, VitConfig

__all__ = ["Encoder", "Features", "Mask", "build_encoder"]

FAMILIES = {VitConfig: VitEncoder, BeitConfig: BeitEncoder, SwinConfig: SwinEncoder, PvtConfig: PvtEncoder}


def build_encoder(
    config: EncoderConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
) -> Encoder:
    """A freshly initialised encoder (from torch's global generator) for images of `image_size` (h, w) px.

    `mask_token` adds the learned token that stands in for replaced units.
    """
    return FAMILIES[type(config)](config, image_size, channels, mask_token)
