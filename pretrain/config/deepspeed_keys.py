"""Which keys of `engine.deepspeed` there are, and which of them are taken (imports no DeepSpeed)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

WHERE = "engine.deepspeed"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: All keys that DeepSpeed reads, by the section they are in; `""` is the top. Compared with DeepSpeed's own in a test.
KNOWN: dict[str, tuple[str, ...]] = {
    "": _names(
        """
        activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
        compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
        disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
        gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
        managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
        seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
        train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
        wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        zero_optimization
        """
    ),
    "zero_optimization": _names(
        """
        allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
        cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
        gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
        log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
        model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm
        override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
        prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
        stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
        stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
        sub_group_size use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
        zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
        """
    ),
    "zero_optimization.offload_param": _names(
        """
        buffer_count buffer_size device max_in_cpu nvme_path pin_memory
        """
    ),
    "zero_optimization.offload_optimizer": _names(
        """
        buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
        super_offload
        """
    ),
    "zero_optimization.leaf_module": _names("classes name_suffixes names"),
    "activation_checkpointing": _names(
        """
        contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
        synchronize_checkpoint_boundary
        """
    ),
    "aio": _names("block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds"),
    "checkpoint": _names(
        """
        checkpoint_serialization load_universal parallel_write tag_validation use_node_local_storage writer
        """
    ),
    "comet": _names(
        """
        api_key enabled experiment_key experiment_name mode online project samples_log_interval workspace
        """
    ),
    "comms_logger": _names("debug enabled prof_all prof_ops verbose"),
    "compile": _names(
        """
        autoep_non_moe debug_log deepcompile double_buffer free_activation free_activation_threshold
        keep_all_input_tensors keep_int_input_tensors offload_activation offload_activation_pin_memory
        offload_opt_states offload_parameters passes symmetric_memory sync_after_allgather sync_after_reduce
        sync_before_allgather sync_before_reduce
        """
    ),
    "csv_monitor": _names("enabled job_name output_path"),
    "data_types": _names("buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype"),
    "flops_profiler": _names(
        """
        detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules
        """
    ),
    "tensorboard": _names("enabled job_name output_path"),
    "wandb": _names("enabled group project team"),
}
#: DeepSpeed keys that the sections of this file already decide.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.grad_accum_steps",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim",
    "torch_autocast": "engine.precision",
    "bf16": "engine.precision (DeepSpeed's bf16 section also rounds the teacher, whose slow average then stands still)",
    "bfloat16": "engine.precision",  # an older name of bf16
    "fp16": "engine.precision (DeepSpeed's fp16 section also rounds the teacher, whose slow average then stands still)",
    "zero_allow_untested_optimizer": "optim",
    "timers": "Selfsight, which reports images/s by itself (DeepSpeed's timer waits for the device twice a step)",
}
#: Of its section `zero_optimization`, by the stages in which they are decided.
OWNED_ZERO_KEYS = {
    "sub_group_size": ((3,), "one flat tensor, of which the optimizer takes each parameter's rate"),
    "overlap_comm": ((1,), "gradients are exchanged during the backward pass by Selfsight"),
    "contiguous_gradients": ((1,), "gradients are exchanged during the backward pass by Selfsight"),
}
#: Of gradients, which Selfsight exchanges by itself under ZeRO 0 and 1, in fp32.
GRADIENT_KEYS = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")

#: Sections that may be null, which is their default.
_NULLABLE = ("zero_optimization.offload_param", "zero_optimization.offload_optimizer")


def check_deepspeed(given: Mapping[str, Any], zero_stage: int) -> None:
    """Raise ValueError for a key that does nothing here, that another setting decides, or that there is not.

    DeepSpeed itself passes over what it does not know at the top, and refuses the rest only after the start.
    """
    for key, owner in OWNED_DEEPSPEED_KEYS.items():
        if key in given:
            raise ValueError(f"{WHERE}.{key} is decided by {owner}; set that instead")
    if "elasticity" in given:
        raise ValueError(f"{WHERE}.elasticity changes the batch size with the ranks; the order of data forbids it")
    zero = given.get("zero_optimization", {})
    if isinstance(zero, Mapping):
        _check_zero(zero, zero_stage)
        _check_offload(zero, given)
    _check_known(given, "")
    for key in GRADIENT_KEYS:
        if key in given and zero_stage < 2:
            raise ValueError(
                f"{WHERE}.{key} does nothing under ZeRO {zero_stage}, whose gradients Selfsight exchanges by itself, "
                "in fp32; leave it out"
            )


def _check_known(given: Mapping[str, Any], section: str) -> None:
    """Refuse keys of a section, or of those within it, that DeepSpeed does not read there."""
    for key, value in given.items():
        path = f"{section}.{key}".lstrip(".")
        if key not in KNOWN[section]:
            raise ValueError(_unknown(section, str(key)))
        if path not in KNOWN or (value is None and path in _NULLABLE):
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{WHERE}.{path} is {value!r}; DeepSpeed takes a mapping here")
        _check_known(value, path)


def _unknown(section: str, key: str) -> str:
    """Why there is no such key, and where it belongs, or which is spelt alike."""

    def full(section: str, key: str) -> str:
        return ".".join(part for part in (WHERE, section, key) if part)

    elsewhere = [full(other, key) for other, names in KNOWN.items() if key in names]
    alike = difflib.get_close_matches(key, KNOWN[section], n=2)
    if elsewhere:
        return f"unknown key {full(section, key)}: DeepSpeed reads it as {' or '.join(elsewhere)}; write that instead"
    if alike:
        return f"unknown key {full(section, key)}; did you mean {' or '.join(full(section, name) for name in alike)}?"
    owned = OWNED_DEEPSPEED_KEYS if not section else {}
    rest = ", ".join(name for name in KNOWN[section] if name not in owned)
    return f"unknown key {full(section, key)}; DeepSpeed reads here: {rest}"


def _check_zero(zero: Mapping[str, Any], zero_stage: int) -> None:
    if "stage" in zero:
        raise ValueError(f"{WHERE}.zero_optimization.stage is decided by engine.zero_stage; set that instead")
    for key, (stages, why) in OWNED_ZERO_KEYS.items():
        if key in zero and zero_stage in stages:
            raise ValueError(f"{WHERE}.zero_optimization.{key} is decided under ZeRO {zero_stage}: {why}; leave it out")


def _check_offload(zero: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what a checkpoint could not be taken of, or what DeepSpeed refuses after the start."""
    where = f"{WHERE}.zero_optimization"
    devices = {}
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name)
        if not isinstance(section, Mapping):
            continue
        devices[name] = section.get("device")
        if section.get("device", "cpu") not in ("cpu", "none"):
            raise ValueError(
                f"{where}.{name}.device is {devices[name]!r}; checkpoints are taken of what lies in memory: cpu or none"
            )
    for name, most in (("mics_shard_size", 0), ("zero_hpz_partition_size", 1), ("zenflow", None)):
        value = zero.get(name)
        if value is not None and (most is None or value > most):
            raise ValueError(f"{where}.{name} divides parameters in a way that checkpoints do not know; leave it out")
    if devices.get("offload_optimizer") == "cpu" and given.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"{where}.offload_optimizer makes DeepSpeed ask for an optimizer of its own; optim is torch's AdamW, "
            "which it takes with engine.deepspeed.zero_force_ds_cpu_optimizer=false beside it"
        )
