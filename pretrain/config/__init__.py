"""The typed sections of a configuration (imports no torch): `run` ties together `encoders` and `methods`."""

from __future__ import annotations

from pretrain.config.diagnostics import ALARMS, AlarmName, DiagnosticsConfig
from pretrain.config.encoders import (
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
from pretrain.config.methods import (
    AggregationConfig,
    DinoConfig,
    DvaeConfig,
    IbotConfig,
    MaeConfig,
    MaskConfig,
    MethodConfig,
    MimConfig,
    VqkdConfig,
)
from pretrain.config.sections import (
    CacheConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "ALARMS",
    "AggregationConfig",
    "AlarmName",
    "BeitConfig",
    "CacheConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiagnosticsConfig",
    "DinoConfig",
    "DvaeConfig",
    "EncoderConfig",
    "EngineConfig",
    "IbotConfig",
    "MaeConfig",
    "MaskConfig",
    "MethodConfig",
    "MimConfig",
    "OptimConfig",
    "PvtConfig",
    "PvtV2Config",
    "SwinConfig",
    "TimmConfig",
    "TrackingConfig",
    "TrainConfig",
    "TwinsConfig",
    "UmMaeSwinConfig",
    "VitConfig",
    "VqkdConfig",
]
