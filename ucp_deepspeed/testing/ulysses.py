"""DeepSpeed's Ulysses sequence parallelism for the models of `ucp_deepspeed.testing.megatron_models`, on any device.

Each rank has a run of consecutive positions of the same sequences. Around the core attention DeepSpeed's ``DistributedAttention``
exchanges positions for heads, so that each rank attends over whole sequences with a share of the heads; all else is per position.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention
from megatron.core.models.gpt import GPTModel
from torch import nn

from ucp_deepspeed.testing.megatron_models import causal_mask

BATCH_DIMENSION = 1
"""Batch dimension of Megatron-Core's queries, keys and values: ``[sequence, batch, heads, width]``."""


def start_sequence_parallel(degree: int) -> ModuleType:
    """Make the process groups; return the ``mpu`` for ``deepspeed.initialize``, which is a module of DeepSpeed's. Collective.

    Consecutive ranks share sequences; all ranks together reduce gradients and partition under ZeRO. DeepSpeed's module doesn't
    support tensor or pipeline parallelism beside it.

    Args:
        degree: sequence-parallel size, at least 2; divides the number of ranks.
    """
    # Older releases of DeepSpeed don't forget the groups of an earlier engine by themselves.
    parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None
    parallel_state_sp.initialize_sequence_parallel(degree)
    return parallel_state_sp


def share_sequences(model: GPTModel) -> None:
    """Make a model expect this rank's positions instead of whole sequences; change it in place, after `start_sequence_parallel`.

    Its parameters keep their names: core attention has none.
    """
    for layer in model.decoder.layers:
        layer.self_attention.core_attention = _UlyssesAttention(layer.self_attention.core_attention)
    if hasattr(model, "rotary_pos_emb"):
        model.rotary_pos_emb.register_forward_pre_hook(_from_this_rank_on, with_kwargs=True)


def share_of_mean_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of the mean next-token cross entropy of a batch: the shares of the sequence-parallel ranks add up
    to it.

    Differentiate this share: DeepSpeed adds the gradients of the sequence-parallel ranks and averages over the data-parallel
    ones. Only ZeRO stage 3 averages over both (0.19.8, ``runtime/zero/stage3.py::__avg_scatter_grads``). Gradients there are
    smaller by the sequence-parallel size, which shows once they are clipped.

    Args:
        model: a model after `share_sequences`, or an engine around one.
        tokens: int64 of shape ``[batch, sequence + 1]``, the same on all ranks that share sequences; the sequence-parallel size
            divides ``sequence``.

    Returns:
        fp32 scalar.
    """
    degree, rank = parallel_state_sp.get_sequence_parallel_world_size(), parallel_state_sp.get_sequence_parallel_rank()
    length = tokens.shape[1] - 1
    positions = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
    inputs, labels, positions = (
        whole.chunk(degree, dim=1)[rank].contiguous() for whole in (tokens[:, :-1], tokens[:, 1:], positions)
    )
    losses: torch.Tensor = model(inputs, positions, causal_mask(length, tokens.device), labels=labels)
    return losses.float().mean() / degree


class _UlyssesAttention(nn.Module):
    """Replaces Megatron-Core's core attention: the same over whole sequences, with a share of the heads on each rank."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        group = parallel_state_sp.get_sequence_parallel_group()
        self.distributed = DistributedAttention(_WholeSequences(core, dist.get_world_size(group=group)), group)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Map ``[positions, batch, heads, width]`` to ``[positions, batch, heads * width]``; ``mask`` is that of whole
        sequences."""
        context: torch.Tensor = self.distributed(query, key, value, BATCH_DIMENSION, None, mask)
        return context.flatten(2)


class _WholeSequences(nn.Module):
    """Core attention over the heads that one of ``degree`` ranks has between the two exchanges."""

    def __init__(self, core: nn.Module, degree: int) -> None:
        super().__init__()
        self.core = core
        core.hidden_size_per_partition //= degree

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return a result of the shape of ``query``, as DeepSpeed expects it."""
        context: torch.Tensor = self.core(query, key, value, mask)
        return context.view(query.shape)


def _from_this_rank_on(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make rotary positions begin with this rank's first position; the first argument is the number of positions of a rank."""
    return args, kwargs | {"offset": args[0] * parallel_state_sp.get_sequence_parallel_rank()}
