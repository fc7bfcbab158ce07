"""The list of all attributes of DeepSpeed's own objects that this package reads, sets or calls beside their public interface.

mypy holds the code to it: a function that takes an `Engine` can use only what stands here. `CLASSES` says which classes
have each attribute, so that a test names what a new version of DeepSpeed has renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ucp_deepspeed.language.name_spaces import ModuleName


class OwnAttributes(Protocol):
    """Attributes that this package itself puts on an engine.

    Attributes:
        universal_checkpoint_config: the ``universal_checkpoint`` block of the config.
        universal_checkpoint_report: report of the last universal load.
    """

    universal_checkpoint_config: Any
    universal_checkpoint_report: Any


class Engine(OwnAttributes, Protocol):
    """``DeepSpeedEngine`` (``runtime/engine.py``); `PipelineEngine` is a subclass."""

    module: Any
    optimizer: Any
    lr_scheduler: Any
    mpu: Any
    training_dataloader: Any
    checkpoint_engine: Any
    param_names: Mapping[torch.Tensor, ModuleName]
    global_steps: int
    global_samples: int
    skipped_steps: int
    local_rank: int
    mp_world_size: int
    seq_dp_world_size: int
    seq_data_parallel_group: Any
    sequence_parallel_size: int
    has_moe_layers: bool
    save_non_zero_checkpoint: bool
    save_zero_checkpoint: bool
    loaded_checkpoint_mp_world_size: int
    loaded_checkpoint_dp_world_size: int
    random_ltd_scheduler: Any
    autotp_size: Callable[[], int]
    bfloat16_enabled: Callable[[], bool]
    fp16_enabled: Callable[[], bool]
    curriculum_learning_enabled: Callable[[], bool]
    random_ltd_enabled: Callable[[], bool]
    train_batch_size: Callable[[], int]
    use_node_local_storage: Callable[[], bool]
    zero_elastic_checkpoint: Callable[[], bool]
    zero_load_from_fp32_weights: Callable[[], bool]
    reload_states: Callable[[], None]
    zero_optimization: Callable[[], bool]
    zero_optimization_stage: Callable[[], int]
    load_module_state_dict: Callable[..., None]
    _save_checkpoint: Callable[..., None]
    _save_moe_checkpoint: Callable[..., None]
    _save_zero_checkpoint: Callable[..., None]
    _get_all_ckpt_names: Callable[..., list[str]]
    _get_buffer_names: Callable[[], Sequence[ModuleName]]
    _get_optimizer_ckpt_name: Callable[..., str]
    _get_rank_zero_ckpt_name: Callable[..., str]


class PipelineModule(Protocol):
    """``PipelineModule`` (``runtime/pipe/module.py``), the module of a `Pipeline`."""

    forward_funcs: Sequence[Any]
    tied_comms: Mapping[str, Any]
    _layer_specs: Sequence[Any]
    _synchronize_tied_weights: Callable[[], None]
    ckpt_layer_path_list: Callable[[str, int], list[str]]


class Pipeline(Engine, Protocol):
    """``PipelineEngine`` (``runtime/pipe/engine.py``)."""

    stage_id: int
    grid: Any


class Scaled(Protocol):
    """A ZeRO optimizer that may scale the loss."""

    dtype: torch.dtype
    loss_scaler: Any
    dynamic_loss_scale: bool


class Partitioned(Protocol):
    """The attributes that ``DeepSpeedZeroOptimizer`` and ``BF16_Optimizer`` have in common."""

    optimizer: torch.optim.Optimizer
    real_dp_process_group: Sequence[Any]
    _hp_optimizer_states_linked: bool
    _lazy_init_hp_params_optimizer_state: Callable[[], None]
    update_lp_params: Callable[[], None]


class Zero12(Partitioned, Scaled, Protocol):
    """``DeepSpeedZeroOptimizer`` (``runtime/zero/stage_1_and_2.py``). Before 0.19.8 it has no ``round_robin_bit16_padding``."""

    cpu_offload: bool
    gradient_accumulation_dtype: torch.dtype
    parallel_partitioned_bit16_groups: Sequence[Sequence[torch.Tensor]]
    round_robin_bit16_groups: Sequence[Sequence[torch.Tensor]]
    single_partition_of_fp32_groups: Sequence[torch.Tensor]
    use_grad_accum_attribute: bool


class Bf16(Partitioned, Protocol):
    """``BF16_Optimizer`` (``runtime/bf16_optimizer.py``)."""

    bf16_groups: Sequence[Sequence[torch.Tensor]]
    bf16_partitioned_groups: Sequence[Sequence[torch.Tensor]]
    fp32_groups_flat_partition: Sequence[torch.Tensor]


class Zero3(Scaled, Protocol):
    """``DeepSpeedZeroOptimizer_Stage3`` (``runtime/zero/stage3.py``)."""

    optimizer: torch.optim.Optimizer
    checkpoint_event_epilogue: Callable[[], None]
    checkpoint_event_prologue: Callable[[], None]
    fp16_groups: Sequence[Sequence[Any]]
    fp16_partitioned_groups_flat: Sequence[torch.Tensor]
    fp32_partitioned_groups_flat: Sequence[torch.Tensor]
    offload_optimizer: bool
    params_in_nvme_and_cpu: bool
    partial_offload: float
    sub_group_to_group_id: Mapping[int, int]
    swap_optimizer: bool
    zero_quantized_nontrainable_weights: bool
    _unflatten_partitioned_parameters: Callable[[int], None]


class Fp16(Protocol):
    """The attributes that ``FP16_Optimizer`` and ``FP16_UnfusedOptimizer`` (``runtime/fp16/``) have in common."""

    optimizer: torch.optim.Optimizer
    fp16_groups: Sequence[Sequence[torch.Tensor]]


class Fp16Unfused(Fp16, Protocol):
    """``FP16_UnfusedOptimizer``."""

    fp32_groups: Sequence[Sequence[torch.Tensor]]


class Fp16Fused(Fp16, Protocol):
    """``FP16_Optimizer``."""

    fp16_groups_flat: Sequence[torch.Tensor]
    fp32_groups_flat: Sequence[torch.Tensor]
