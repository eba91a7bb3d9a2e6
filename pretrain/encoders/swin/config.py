"""Swin's settings, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Any, Literal

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import SwinShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout


@section
class SwinConfig(SwinShape):
    """A Swin transformer (Liu et al. 2021, 2022)."""

    family: Literal["swin"] = "swin"
    decisive = ("dim", "depths", "heads", "version")
    version: Literal[1, 2] = 1  # 2: cosine attention, norms after the branches, positions from a small network


def timm_recipe(config: SwinConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model`."""
    dim, depths, heads = config.shape
    own = {"img_size": list(image_size), "in_chans": channels, "num_classes": 0, "embed_dim": dim}
    own |= {"depths": list(depths), "num_heads": list(heads), "patch_size": config.patch}
    name = "swin_tiny_patch4_window7_224" if config.version == 1 else "swinv2_tiny_window8_256"
    return {"model_name": name, **own, "window_size": config.window}


_SMALL = {"dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 8, "window": 4}

SPEC = EncoderSpec(
    name="swin",
    title="Swin",
    description="Swin, versions 1 and 2 (Liu et al. 2021, 2022)",
    config=SwinConfig,
    build="pretrain.encoders.swin.encoder:SwinEncoder",
    drop_layout="one_in_2x2",
    timm_recipe=timm_recipe,
    layouts={
        "simmim": Layout("pretrain.encoders.swin.layouts:read_simmim", marks=r"^(module\.)?encoder\.layers\."),
        "timm": Layout("pretrain.encoders.swin.layouts:read_timm", marks=r"^layers\."),
    },
    examples=(
        Example(small=_SMALL),
        Example({"version": 2}, _SMALL),
    ),
)
