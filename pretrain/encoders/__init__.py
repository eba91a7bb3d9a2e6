"""Image encoders behind one seam (`base.Encoder`)."""

from __future__ import annotations

from pretrain.config import (
    BeitConfig,
    EncoderConfig,
    PvtConfig,
    PvtV2Config,
    SwinConfig,
    TimmConfig,
    TwinsConfig,
    UmMaeSwinConfig,
    VitConfig,
)
from pretrain.encoders.base import Encoder, Features, Mask
from pretrain.encoders.beit.encoder import BeitEncoder
from pretrain.encoders.pvt.encoder import PvtEncoder
from pretrain.encoders.pvt_v2.encoder import PvtV2Encoder
from pretrain.encoders.swin.encoder import SwinEncoder
from pretrain.encoders.timm.encoder import TimmEncoder
from pretrain.encoders.twins.encoder import TwinsEncoder
from pretrain.encoders.um_mae_swin.encoder import UmMaeSwinEncoder
from pretrain.encoders.vit.encoder import VitEncoder

__all__ = ["Encoder", "Features", "Mask", "build_encoder"]

FAMILIES = {
    VitConfig: VitEncoder,
    BeitConfig: BeitEncoder,
    SwinConfig: SwinEncoder,
    UmMaeSwinConfig: UmMaeSwinEncoder,
    PvtConfig: PvtEncoder,
    PvtV2Config: PvtV2Encoder,
    TwinsConfig: TwinsEncoder,
    TimmConfig: TimmEncoder,
}


def build_encoder(
    config: EncoderConfig, image_size: tuple[int, int], channels: int = 3, mask_token: bool = False
) -> Encoder:
    """A freshly initialised encoder (from torch's global generator) for images of `image_size` (h, w) px.

    `mask_token` adds the learned token that stands in for replaced units.
    """
    return FAMILIES[type(config)](config, image_size, channels, mask_token)
