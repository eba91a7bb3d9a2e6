"""The typed sections of a configuration (imports no torch): `sections` ties them together."""

from __future__ import annotations

from pretrain.config.diagnostics import ALARMS, AlarmName, DiagnosticsConfig
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
    "AlarmName",
    "CacheConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiagnosticsConfig",
    "EncoderConfig",
    "EngineConfig",
    "OptimConfig",
    "TrackingConfig",
    "TrainConfig",
]
