"""The typed sections of a configuration (imports no torch): `sections` ties them together."""

from __future__ import annotations

from pretrain.config.diagnostics import ALARMS, AlarmName, DiagnosticsConfig
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
from pretrain.encoders.registry import EncoderConfig

__all__ = [
    "ALARMS",
    "AggregationConfig",
    "AlarmName",
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
    "TrackingConfig",
    "TrainConfig",
    "VqkdConfig",
]
