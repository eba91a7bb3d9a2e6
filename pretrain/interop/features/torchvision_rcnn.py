"""torchvision's Faster and Mask R-CNN on a multi-scale backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from pretrain.interop.features.backbone import Backbone

ANCHOR_STRIDES = 8  # a usual anchor's side is that many strides of its level: 32 px at p2 (Lin et al. 2017)


def rcnn_settings(
    backbone: Backbone,
    *,
    sizes: Sequence[Sequence[int]] | None = None,
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    masks: bool = False,
) -> dict[str, Any]:
    """What torchvision's detectors have to be told of a backbone:

        FasterRCNN(backbone, num_classes, **rcnn_settings(backbone), min_size=800)
        MaskRCNN(backbone, num_classes, **rcnn_settings(backbone, masks=True))

    Args:
        sizes: Sides in px of the anchors of each level, finest first; default: one of 8 strides.
        masks: Whether it is Mask R-CNN, which reads the maps once more.

    Raises ValueError for another number of sizes than the backbone has levels.
    """
    names = list(backbone.strides)
    sizes = sizes or [(ANCHOR_STRIDES * stride,) for stride in backbone.strides.values()]
    if len(sizes) != len(names):
        raise ValueError(f"sizes are of {len(sizes)} levels, and the backbone has {len(names)}: {', '.join(names)}")
    told = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple(tuple(of_level) for of_level in sizes), (tuple(aspect_ratios),) * len(names)
        ),
        "box_roi_pool": MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "size_divisible": backbone.size_divisible,
    }
    if masks:
        told["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
    return told
