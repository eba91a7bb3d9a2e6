"""The typed sections of a configuration (imports no torch): `sections` ties them together with `encoders`
and the methods' own."""

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
    "AlarmName",
    "BeitConfig",
    "CacheConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiagnosticsConfig",
    "EncoderConfig",
    "EngineConfig",
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
]
