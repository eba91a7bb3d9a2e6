"""A pretrained encoder as a multi-scale backbone, for detectors and segmenters of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.interop.features.backbone import Backbone


def backbone(target: str | Path, **settings: Any) -> Backbone:
    """A torch module from images (b, c, h, w) to {"p2": (b, width, h / 4, w / 4), "p3": ...}, on the CPU.

    Args:
        target: What `selfsight export --to features` wrote; or a run, a checkpoint, an import, an export of an encoder,
            around which a backbone is made.
        settings: Of a backbone to be made, as in `pretrain.interop.features.settings.FeatureSettings`: `window=0`.

    Raises:
        FileNotFoundError: There is no encoder; the message says what there is.
        ValueError: Settings that this encoder can't have, or any for a backbone that is made already.
    """
    from pretrain.encoder_folder import find_encoder
    from pretrain.encoders.saved import load_encoder
    from pretrain.interop.features.folder import backbone_of, is_backbone_folder, load_backbone
    from pretrain.interop.features.settings import FeatureSettings

    place = Path(target).expanduser()
    if is_backbone_folder(place):
        if settings:
            raise ValueError(f"{place} is a backbone that is made already; export it with {next(iter(settings))}=...")
        return load_backbone(place)
    return backbone_of(*load_encoder(find_encoder(place)), FeatureSettings(**settings))
