"""A multi-scale backbone behind the backbone interface of `transformers` (import it after `check_packages`).

Once it is imported, `AutoBackbone` knows it, so that detectors that hold one can be saved and read by `transformers`.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from pretrain.encoders.registry import build_encoder
from pretrain.encoders.saved import EncoderCard
from pretrain.interop.features.backbone import Backbone, freeze_what_is_not_read
from pretrain.interop.features.settings import FeatureSettings


class SelfsightBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """What a backbone is, as plain values.

    encoder, settings: those of `features.backbone.Backbone`. stage_names: of the encoder's own maps (`c4`), then of
    those of one width (`p2`, ...). out_features: which of them a detector gets, in that order.
    """

    model_type = "selfsight_backbone"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        stage_names: list[str] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.encoder, self.settings = encoder, settings
        self.stage_names = list(stage_names or ())
        if self.stage_names:
            self.set_output_features_output_indices(out_features, None if out_features else out_indices)

    @classmethod
    def of(cls, backbone: Backbone, out_features: list[str]) -> SelfsightBackboneConfig:
        """Of a backbone, for a detector that reads `out_features`; ValueError for maps that it does not have."""
        names = [*backbone.own_strides, *backbone.strides]
        unknown = [name for name in out_features if name not in names]
        if unknown or not out_features:
            raise ValueError(f"out_features are {out_features}; this backbone has {', '.join(names)}")
        return cls(
            encoder=TypeAdapter(EncoderCard).dump_python(backbone.card, mode="json"),
            settings=TypeAdapter(FeatureSettings).dump_python(backbone.settings, mode="json"),
            stage_names=names,
            out_features=sorted(out_features, key=names.index),
        )


class SelfsightBackbone(BackboneMixin, PreTrainedModel):
    """`features.backbone.Backbone` as `transformers` asks for it: `channels`, `out_features`, `feature_maps`."""

    config_class = SelfsightBackboneConfig
    config: SelfsightBackboneConfig
    main_input_name = "pixel_values"
    base_model_prefix = "features"
    has_attentions = False

    def __init__(self, config: SelfsightBackboneConfig) -> None:
        super().__init__(config)
        card = TypeAdapter(EncoderCard).validate_python(config.encoder)
        settings = TypeAdapter(FeatureSettings).validate_python(config.settings)
        self._frozen: list[str] = []
        with torch.device("cpu"):  # `from_pretrained` builds on no device, and what is computed once would stay there
            self.features = Backbone(build_encoder(card.encoder, card.image_size, card.channels), card, settings)
            widths = self.features.own_widths | dict.fromkeys(self.features.strides, self.features.out_channels)
            self.num_features = [widths[name] for name in config.stage_names]
            if not set(self.out_features) & set(self.features.strides):
                self.features.neck = nn.Identity()
            freeze_what_is_not_read(self, self._maps, self.features.small_image())
        self._frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._computed = {name: _computed(module) for name, module in self.named_modules() if _computed(module)}
        self.post_init()

    def train(self, mode: bool = True) -> SelfsightBackbone:
        """Also freezes again what `from_pretrained` has put other parameters in the place of."""
        for name in self._frozen:
            self.get_parameter(name).requires_grad_(False)
        return super().train(mode)

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone has started itself; but what no checkpoint holds, `from_pretrained` has replaced by nothing."""
        for name, buffers in self._computed.items():
            if self.get_submodule(name) is module:
                for key, value in buffers.items():
                    module.get_buffer(key).copy_(value)

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.features.maps(images)
        if not isinstance(self.features.neck, nn.Identity):
            maps = maps | self.features.neck(maps)
        return tuple(maps[name] for name in self.out_features)

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:
        """pixel_values (b, c, h, w), normalised; h and w as `Backbone.check_size` says."""
        return BackboneOutput(feature_maps=self._maps(pixel_values))


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are computed at the start and not saved, such as indices of relative positions."""
    buffers = {key: module._buffers.get(key) for key in module._non_persistent_buffers_set}
    return {key: value.clone() for key, value in buffers.items() if value is not None}


AutoConfig.register(SelfsightBackboneConfig.model_type, SelfsightBackboneConfig, exist_ok=True)
AutoBackbone.register(SelfsightBackboneConfig, SelfsightBackbone, exist_ok=True)
