"""ZeRO-1 and 2 (``DeepSpeedZeroOptimizer``) and ``BF16_Optimizer``: one slot per parameter group, partitioned over the ranks.

Source: ``runtime/zero/stage_1_and_2.py``, ``runtime/bf16_optimizer.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed.checkpoint.checkpoint import LossScale
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import MOMENTUM
from ucp_deepspeed.engine.deepspeed_types import Bf16, Engine, Partitioned, Scaled, Zero12
from ucp_deepspeed.engine.exchange import Held, goes_over_gloo
from ucp_deepspeed.engine.optimizers.base import EngineOptimizer, EngineSlot
from ucp_deepspeed.engine.optimizers.states import is_muon_group
from ucp_deepspeed.layout import FlatGroup


class ScaledOptimizer(EngineOptimizer):
    """The loss scaler that ZeRO's classes have in fp16."""

    _zero: Scaled

    def loss_scale(self) -> LossScale | None:
        """See `EngineOptimizer.loss_scale`."""
        zero = self._zero
        if zero.dtype != torch.float16:
            return None
        values = {key: value for key, value in vars(zero.loss_scaler).items() if key not in ("dynamic", "dtype")}
        return LossScale(bool(zero.dynamic_loss_scale), values)

    def set_loss_scale(self, values: Mapping[str, Any]) -> None:
        """See `EngineOptimizer.set_loss_scale`. Only values that the live loss scaler has too are set."""
        for key in values.keys() - {"dynamic", "dtype"}:
            if hasattr(self._zero.loss_scaler, key):
                setattr(self._zero.loss_scaler, key, values[key])


class PartitionedOptimizer(EngineOptimizer):
    """The part that both classes share."""

    _zero: Partitioned

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._zero = engine.optimizer
        self._sent = False

    @abstractmethod
    def _groups(self) -> Sequence[tuple[Sequence[torch.Tensor], torch.Tensor, tuple[int, ...]]]:
        """Return for each group the parameters in flat order, this rank's master partition, and the alignment gaps."""

    def slots(self) -> list[EngineSlot]:
        """See `EngineOptimizer.slots`."""
        slots: list[EngineSlot] = []
        for index, (params, master, gaps) in enumerate(self._groups()):
            process_group = self._zero.real_dp_process_group[index]
            partitions = dist.get_world_size(group=process_group)
            flattening = FlatGroup(tuple(param.numel() for param in params), partitions, gaps)
            assert flattening.partition_numel == master.numel(), (index, flattening.partition_numel, master.numel())
            names = tuple(self._names[param] for param in params)
            rank, overlapping = dist.get_rank(group=process_group), self._overlapping(index)
            slots.append(EngineSlot(names, flattening, rank, index, overlapping=overlapping, master=master))
        return slots

    def _overlapping(self, group: int) -> frozenset[str]:
        """See `TargetSlot.overlapping`."""
        return frozenset()

    def group_names(self) -> list[list[str | None]]:
        """See `EngineOptimizer.group_names`."""
        return [[self._names[param] for param in params] for params, _, _ in self._groups()]

    @abstractmethod
    def _weights(self) -> Sequence[Sequence[torch.Tensor]]:
        """Return for each group all ranks' partitions of the weights, which belong to the partitions of the masters."""

    def own_weights(self) -> Sequence[tuple[Held, Any]]:
        """See `EngineOptimizer.own_weights`. Over gloo they go to the other ranks while the states are read."""
        slots, weights = self.slots(), self._weights()
        groups = [self._zero.real_dp_process_group[slot.group] for slot in slots]
        for slot, parts in zip(slots, weights, strict=True):
            parts[slot.partition].data.copy_(slot.master.data)
        self._sent = all(goes_over_gloo(group, parts[0]) for group, parts in zip(groups, weights, strict=True))
        if not self._sent:
            return ()
        return [([[part.data] for part in parts], group) for parts, group in zip(weights, groups, strict=True)]

    def send_weights(self) -> None:
        """See `EngineOptimizer.send_weights`. Also let DeepSpeed make its per-parameter views of the state anew."""
        if not self._sent:
            self._zero.update_lp_params()
        self._sent = False  # the masters may change, and the weights be made again
        self._zero._hp_optimizer_states_linked = False
        if all(self.base.state.get(slot.master) for slot in self.slots()):
            self._zero._lazy_init_hp_params_optimizer_state()


class Zero12Optimizer(PartitionedOptimizer, ScaledOptimizer):
    """``DeepSpeedZeroOptimizer``. The flat order is that of the round-robin lists; without that setting it is the usual order."""

    form = "zero-1/2"
    _zero: Zero12

    def _groups(self) -> Sequence[tuple[Sequence[torch.Tensor], torch.Tensor, tuple[int, ...]]]:
        zero = self._zero
        paddings = getattr(zero, "round_robin_bit16_padding", None)
        gaps = [tuple(group) for group in paddings] if paddings else [()] * len(zero.round_robin_bit16_groups)
        return list(zip(zero.round_robin_bit16_groups, zero.single_partition_of_fp32_groups, gaps, strict=True))

    def _weights(self) -> Sequence[Sequence[torch.Tensor]]:
        return self._zero.parallel_partitioned_bit16_groups

    def _overlapping(self, group: int) -> frozenset[str]:
        """Return Muon's momentum where it is kept whole: its update needs whole matrices. With an offloaded state these are
        gathered instead."""
        kept_whole = is_muon_group(self.base, group) and not self._zero.cpu_offload
        return frozenset((MOMENTUM,)) if kept_whole else frozenset()

    def state_buffer(self, slot: EngineSlot, state: str) -> torch.Tensor:
        """See `EngineOptimizer.state_buffer`. Momentum that is kept whole has the gradients' dtype
        (``_muon_momentum_buffer``)."""
        if state not in slot.overlapping:
            return super().state_buffer(slot, state)
        zero = self._zero
        dtype = zero.gradient_accumulation_dtype if zero.use_grad_accum_attribute else zero.dtype
        numel = slot.flattening_of(state).buffer_numel(slot.partition)
        return torch.empty(numel, dtype=dtype, device=slot.master.device)


class Bf16Optimizer(PartitionedOptimizer):
    """``BF16_Optimizer``: bf16 with fp32 gradient accumulation."""

    form = "bf16-optimizer"
    _zero: Bf16

    def _groups(self) -> Sequence[tuple[Sequence[torch.Tensor], torch.Tensor, tuple[int, ...]]]:
        pairs = zip(self._zero.bf16_groups, self._zero.fp32_groups_flat_partition, strict=True)
        return [(params, master, ()) for params, master in pairs]

    def _weights(self) -> Sequence[Sequence[torch.Tensor]]:
        return self._zero.bf16_partitioned_groups
