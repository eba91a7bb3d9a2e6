"""What of `engine.deepspeed` is taken, compared with what DeepSpeed reads."""

from __future__ import annotations

from collections.abc import KeysView
from typing import Any

import pytest
import torch

from pretrain.config.deepspeed_keys import KNOWN, OWNED_DEEPSPEED_KEYS, check_deepspeed

BATCH = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


class Asked(dict[str, Any]):
    """A mapping that notes which keys are looked up in it."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return KeysView(self)  # `key in mapping.keys()` asks, too

    def __deepcopy__(self, memo: Any) -> Asked:
        return self


@pytest.fixture(scope="module")
def deepspeed_config() -> Any:
    from pretrain.engines.engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    from deepspeed.runtime import config

    return config


def test_the_top_level_is_what_deepspeed_looks_up(deepspeed_config: Any) -> None:
    top = Asked(BATCH)
    deepspeed_config.DeepSpeedConfig(top)
    removed = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)  # which it refuses itself
    removed.add("sequence_parallel_size")  # of sequences cut among ranks; asked for where another test has joined some
    assert sorted(KNOWN[""]) == sorted(top.asked - removed)
    assert set(OWNED_DEEPSPEED_KEYS) <= set(KNOWN[""])


@pytest.mark.parametrize("section", ["activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler"])
def test_plain_sections_are_what_deepspeed_looks_up_in_them(deepspeed_config: Any, section: str) -> None:
    inner = Asked({})
    deepspeed_config.DeepSpeedConfig({**BATCH, section: inner})
    assert sorted(KNOWN[section]) == sorted(inner.asked)


def test_the_other_sections_are_the_fields_of_its_models(deepspeed_config: Any) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.zero import config as zero

    models = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": zero.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": zero.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": zero.DeepSpeedZeroLeafModuleConfig,
        "comet": CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
    }
    for section, model in models.items():
        fields = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
        assert sorted(KNOWN[section]) == sorted(fields), section


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nonsense": 1}, r"unknown key engine\.deepspeed\.nonsense; DeepSpeed reads here: .*wall_clock_breakdown"),
        ({"overlap_comm": True}, r"reads it as engine\.deepspeed\.zero_optimization\.overlap_comm; write that"),
        ({"wall_clock_breakdwn": 1}, r"did you mean engine\.deepspeed\.wall_clock_breakdown\?"),
        ({"zero_optimization": {"overlap_com": True}}, r"did you mean engine\.deepspeed\.zero_optimization\.overlap_c"),
        ({"zero_optimization": {"offload_param": {"pin": 1}}}, r"offload_param\.pin; DeepSpeed reads here: buffer_co"),
        ({"zero_optimization": {"wall_clock_breakdown": 1}}, r"reads it as engine\.deepspeed\.wall_clock_breakdown;"),
        ({"flops_profiler": True}, r"engine\.deepspeed\.flops_profiler is True; DeepSpeed takes a mapping here"),
        ({"zero_optimization": [1]}, r"zero_optimization is \[1\]; DeepSpeed takes a mapping here"),
        ({"elasticity": {"enabled": False}}, "the order of data forbids it"),
        ({7: 1}, r"unknown key engine\.deepspeed\.7"),
    ],
)
def test_what_deepspeed_would_pass_over_is_refused_by_name(given: dict[Any, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_deepspeed(given, zero_stage=2)


def test_what_deepspeed_reads_is_taken() -> None:
    zero = {"offload_param": None, "stage3_prefetch_bucket_size": 5, "leaf_module": {"classes": ["a.B"]}}
    check_deepspeed({"zero_optimization": zero, "wall_clock_breakdown": True, "hybrid_engine": {"any": 1}}, 3)
