"""Patterns from the attributes that Megatron-Core sets on its parameters (``megatron/core/tensor_parallel/layers.py``)."""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard

OUTPUT_LAYER = "output_layer"
"""Name of the module that maps hidden states to the padded vocabulary (``megatron/core/models/gpt/gpt_model.py``)."""

SHARDED_MODULES = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
"""Modules whose weight is always sharded. Built with ``perform_initialization=False`` they set no attributes on it."""

MLP_MODULE = "megatron.core.transformer.mlp"
"""Module of Megatron-Core's feed-forward layer. Megatron-DeepSpeed's can't be imported without Transformer Engine, and a model
that has the layer has imported it."""

MEGATRON_DEEPSPEED = ("dense_h_to_4h", "dense_4h_to_h")
"""A feed-forward layer's modules in Megatron-DeepSpeed. With a gate, the first has two rows for each column of the second."""


def inferred_patterns(module: torch.nn.Module) -> dict[str, Pattern]:
    """Return the pattern of each parameter, by its first name; empty for a model without a single tensor-parallel parameter.

    ``partition_dim`` is the dimension that is sharded, and ``partition_stride`` the number of equal fused parts side by side on
    each rank (2 for a gated ``linear_fc1``). A parameter without the attributes is the same on every rank, unless it is the
    weight of a module that is always sharded: then nothing is known, and a spec has to tell.
    """
    named = dict(module.named_parameters())
    if not any(getattr(param, "tensor_model_parallel", False) for param in named.values()):
        return {}
    modules = dict(module.named_modules())
    patterns = {name: _pattern(param, name, modules) for name, param in named.items()}
    return {name: pattern for name, pattern in patterns.items() if pattern is not None}


def _pattern(param: torch.Tensor, name: str, modules: dict[str, torch.nn.Module]) -> Pattern | None:
    owner, _, local_name = name.rpartition(".")
    if not getattr(param, "tensor_model_parallel", False):
        unmarked = local_name == "weight" and isinstance(modules[owner], SHARDED_MODULES)
        return None if unmarked else Replicate()
    if not hasattr(param, "partition_dim"):  # a layer of the user's own, marked for DeepSpeed's norm of gradients
        return None
    parts = (1,) * (2 if _is_gated(owner, modules) else getattr(param, "partition_stride", 1))
    vocabulary = isinstance(modules[owner], VocabParallelEmbedding) or owner.split(".")[-1] == OUTPUT_LAYER
    return Shard(param.partition_dim, parts=parts, vocabulary=vocabulary and len(parts) == 1)


def _is_gated(owner: str, modules: dict[str, torch.nn.Module]) -> bool:
    """Return whether gate and input lie in one tensor; Megatron-Core before 0.16 leaves its ``partition_stride`` at 1."""
    parent, _, name = owner.rpartition(".")
    layer = modules[parent]
    if name == MEGATRON_DEEPSPEED[0]:
        weights = [
            getattr(getattr(layer, each, None), "weight", torch.zeros((), device="cpu")) for each in MEGATRON_DEEPSPEED
        ]
        # Shapes on this tensor-parallel rank, before ZeRO-3 partitions them.
        first, second = (getattr(weight, "ds_shape", weight.shape) for weight in weights)
        return len(first) == len(second) == 2 and first[0] == 2 * second[1]
    mlp = sys.modules.get(MLP_MODULE)
    return (
        name == "linear_fc1" and mlp is not None and isinstance(layer, mlp.MLP) and bool(layer.config.gated_linear_unit)
    )
