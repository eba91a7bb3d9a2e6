"""The settings of any timm model, and what is known of it without building it (imports no torch)."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_pipelines.transforms.config import section
from pretrain.encoders.shapes import EncoderSettings
from pretrain.encoders.spec import EncoderSpec, Example

_SURVEY = "pretrain.encoders.timm.survey"  # it builds models, so it imports torch

#: Arguments of timm.create_model that other settings own, or that would load files.
TIMM_RESERVED = {
    "num_classes": "an encoder has no classifier",
    "in_chans": "it follows data.channels",
    "img_size": "it follows views.global_crops",
    "drop_path_rate": "set encoder.drop_path",
    "pretrained": "set init_from=timm:NAME",
    "checkpoint_path": "set init_from",
    **dict.fromkeys(
        ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "features_only"),
        "it is not an argument of the architecture",
    ),
}


@section
class TimmConfig(EncoderSettings):
    """Any other timm model, as it is; written `encoder: timm:NAME` for short."""

    family: Literal["timm"] = "timm"
    decisive = ("model",)
    model: str  # its name in timm
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of timm.create_model
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0  # stochastic depth, where the model has it

    @model_validator(mode="after")
    def _check(self) -> TimmConfig:
        for name in self.args:
            if name in TIMM_RESERVED:
                raise ValueError(f"args has {name!r}, which can't be set here: {TIMM_RESERVED[name]}")
        return self


def timm_recipe(config: TimmConfig, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of `timm.create_model`."""
    return import_module(_SURVEY).timm_arguments(config, image_size, channels)


#: Rows of the table, in small: arguments, and px of the images.
_SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "cait_xxs24_224": ({"depth": 1, "depth_token_only": 1, "embed_dim": 32, "num_heads": 2}, 64),
    "coatnet_0_rw_224": ({"embed_dim": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "stem_width": 16}, 64),
    "convit_tiny": ({"depth": 2, "local_up_to_layer": 1, "embed_dim": 8}, 64),
    "convnext_tiny": ({"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]}, 64),
    "crossvit_9_240": ({"embed_dim": [16, 32], "depth": [[1, 1, 0]]}, 120),
    "eva02_tiny_patch14_224": ({"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2}, 64),
    "focalnet_tiny_srf": ({"mlp_ratio": 0.1}, 64),
    "hiera_tiny_224": ({"stages": [1, 1, 1, 1], "embed_dim": 16}, 64),
    "levit_128s": ({"embed_dim": [16, 32, 32], "depth": [1, 1, 1], "key_dim": 8, "num_heads": [2, 2, 2]}, 112),
    "maxvit_pico_rw_256": ({"embed_dim": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "stem_width": 16}, 64),
    "mixer_s32_224": ({"mlp_ratio": [0.1, 0.1]}, 64),
    "mobilevit_xxs": ({}, 64),
    "mobilevitv2_050": ({}, 64),
    "naflexvit_base_patch16_gap": ({"embed_dim": 32, "depth": 2, "num_heads": 2}, 64),
    "repvgg_a0": ({}, 64),
    "resnet50": ({"layers": [1, 1, 1, 1], "base_width": 16}, 64),
}

SPEC = EncoderSpec(
    name="timm",
    title="timm",
    description="any other timm model, as it is (timm:NAME)",
    config=TimmConfig,
    build="pretrain.encoders.timm.encoder:TimmEncoder",
    drop_layout="any",  # of the models that can; of the rest, survey.py says why not
    headline=lambda config: None,
    timm_recipe=timm_recipe,
    examples=tuple(Example({"model": name}, {"args": args}, side) for name, (args, side) in _SMALL.items()),
    survey=_SURVEY,
    label=lambda config: f"timm:{config.model}",
)
