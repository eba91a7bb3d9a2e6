"""What masked image modelling predicts, behind one seam (`base.Target`), and the tokenizers that give codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import MimConfig
    from pretrain.tokenizers.base import Target


def build_target(config: MimConfig, stride: int, channels: int) -> Target:
    """The target that `config` names, for an encoder with tokens of `stride` px."""
    from pretrain.methods.mim.codes import Codes
    from pretrain.methods.mim.hog import Hog
    from pretrain.methods.mim.normalised_pixels import NormalisedPixels
    from pretrain.methods.mim.pixels import Pixels

    if config.target == "pixels":
        return Pixels(stride, channels)
    if config.target == "normalised_pixels":
        return NormalisedPixels(config.mask.unit, channels)
    if config.target == "hog":
        return Hog(config.mask.unit, channels)
    assert config.tokenizer is not None
    return Codes(config.tokenizer, config.mask.unit)
