"""Patterns from the attributes that Megatron-Core sets on its parameters (``megatron/core/tensor_parallel/layers.py``)."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard

OUTPUT_LAYER = "output_layer"
"""Name of the module that maps hidden states to the padded vocabulary (``megatron/core/models/gpt/gpt_model.py``)."""


def inferred_patterns(module: torch.nn.Module) -> dict[str, Pattern]:
    """The pattern of each parameter, by its first name; empty for a model without a single tensor-parallel parameter.

    ``partition_dim`` is the dimension that is cut and ``partition_stride`` the number of equal fused parts side by side on
    each rank (2 for a gated ``linear_fc1``). A parameter without the attributes is the same on every rank.
    """
    named = dict(module.named_parameters())
    if not any(getattr(param, "tensor_model_parallel", False) for param in named.values()):
        return {}
    vocabulary = {
        f"{name}.weight" if name else "weight"
        for name, child in module.named_modules()
        if isinstance(child, VocabParallelEmbedding) or name.split(".")[-1] == OUTPUT_LAYER
    }
    return {name: _pattern(param, name in vocabulary) for name, param in named.items()}


def _pattern(param: torch.Tensor, vocabulary: bool) -> Pattern:
    if not getattr(param, "tensor_model_parallel", False):
        return Replicate()
    parts = (1,) * getattr(param, "partition_stride", 1)
    return Shard(param.partition_dim, parts=parts, vocabulary=vocabulary and len(parts) == 1)
