"""Deformable DETR (Zhu et al. 2021) of `transformers` on a multi-scale backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pretrain.interop.features.backbone import Backbone
from pretrain.interop.features.packages import check_packages

if TYPE_CHECKING:
    from transformers import DeformableDetrForObjectDetection

USUAL_LEVELS = ("p3", "p4", "p5")  # strides 8, 16, 32, as Deformable DETR reads of ResNet


def deformable_detr(
    backbone: Backbone, num_labels: int, out_features: Sequence[str] | None = None, **settings: Any
) -> DeformableDetrForObjectDetection:
    """`DeformableDetrForObjectDetection` that starts from a backbone's weights; the rest starts at random.

    It is saved by `save_pretrained`; before `from_pretrained` import `features.transformers_backbone`. Images have the
    mean and std of the backbone, and sides that are multiples of its `size_divisible` (`pad_size` of the processor).

    Args:
        num_labels: Classes of objects.
        out_features: Which maps it reads: `p3`, ..., or the encoder's own, such as `c4`, without the backbone's neck;
            default: those of strides 8, 16 and 32 that there are.
        settings: Of `DeformableDetrConfig`, such as `encoder_layers=3`.

    Raises ValueError where `transformers` is not installed, for maps that there are not, and for fewer
    `num_feature_levels` than maps.
    """
    check_packages("Deformable DETR", "transformers", "scipy")
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    from pretrain.interop.features.transformers_backbone import SelfsightBackboneConfig

    if out_features is None:
        out_features = [name for name in USUAL_LEVELS if name in backbone.strides] or list(backbone.strides)
    config = SelfsightBackboneConfig.of(backbone, list(out_features))
    num_levels = settings.setdefault("num_feature_levels", max(4, len(out_features)))
    if num_levels < len(out_features):
        raise ValueError(
            f"num_feature_levels is {num_levels}, and {len(out_features)} maps are read ({', '.join(out_features)}); "
            "read fewer (out_features), or raise it"
        )
    detector = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=config, num_labels=num_labels, num_channels=backbone.card.channels, **settings
        )
    )
    own = detector.model.backbone.model.features
    weights = backbone.state_dict()
    if isinstance(own.neck, nn.Identity):
        weights = {key: value for key, value in weights.items() if not key.startswith("neck.")}
    own.load_state_dict(weights, strict=True)
    return detector
