"""The settings of UM-MAE's Swin, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import SwinShape
from pretrain.encoders.spec import EncoderSpec, Example, Layout


@section
class UmMaeSwinConfig(SwinShape):
    """UM-MAE's Swin (Li et al. 2022): positions from a small network over coordinates, downsampling by convolution."""

    family: Literal["um_mae_swin"] = "um_mae_swin"
    decisive = ("dim", "depths", "heads", "position_dim")
    window: PositiveInt = 8  # on compact maps; twice that on whole images
    position_dim: PositiveInt = 32  # width of the small network


SPEC = EncoderSpec(
    name="um_mae_swin",
    title="UM-MAE Swin",
    description="UM-MAE's Swin (Li et al. 2022)",
    config=UmMaeSwinConfig,
    build="pretrain.encoders.um_mae_swin.encoder:UmMaeSwinEncoder",
    drop_layout="one_in_2x2",
    layouts={"um_mae": Layout("pretrain.encoders.um_mae_swin.layouts:read_um_mae", marks=r"blocks\.0\.attn\.posmlp\.")},
    examples=(Example(small={"dim": 8, "depths": (2, 2), "heads": (1, 2), "patch": 8, "window": 4}),),
)
