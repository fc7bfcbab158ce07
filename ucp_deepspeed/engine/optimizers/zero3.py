"""ZeRO-3 (``DeepSpeedZeroOptimizer_Stage3``): one slot per sub-group, each parameter partitioned on its own.

Source: ``runtime/zero/stage3.py``, ``runtime/zero/partition_parameters.py``.
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist

from ucp_deepspeed.checkpoint.deepspeed.zero_slots import MOMENTUM
from ucp_deepspeed.engine.deepspeed_types import Engine, Zero3
from ucp_deepspeed.engine.optimizers.base import EngineSlot
from ucp_deepspeed.engine.optimizers.states import is_muon_group
from ucp_deepspeed.engine.optimizers.zero12 import ScaledOptimizer
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.layout import SlicedGroup


class Zero3Optimizer(ScaledOptimizer):
    """The weights are slices too; a whole parameter exists only while a module uses it, or when it is persistent."""

    form = "zero-3"
    _zero: Zero3

    def __init__(self, engine: Engine) -> None:
        self._zero = engine.optimizer
        _check_settings(self._zero)
        super().__init__(engine)
        self._check_parameters()

    def _check_parameters(self) -> None:
        """Refuse an optimizer over another model's parameters, which DeepSpeed takes at this stage."""
        foreign = [param for params in self._zero.fp16_groups for param in params if param not in self._names]
        if foreign:
            shapes = ", ".join(str(tuple(param.ds_shape)) for param in foreign[:3])
            raise UnsupportedError(
                f"{len(foreign)} parameters of the optimizer ({shapes}{', …' if len(foreign) > 3 else ''}) are in no module of "
                f"the engine's model, which has no names for them; give each engine an optimizer over its own model's parameters"
            )

    def slots(self) -> list[EngineSlot]:
        """See `EngineOptimizer.slots`."""
        zero = self._zero
        slots: list[EngineSlot] = []
        for index, (params, master) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
            process_group = params[0].ds_process_group
            numels = tuple(param.ds_numel for param in params)
            flattening = SlicedGroup(numels, dist.get_world_size(group=process_group))
            assert flattening.buffer_numel(0) == master.numel(), (index, flattening.buffer_numel(0), master.numel())
            names = tuple(self._names[param] for param in params)
            group = zero.sub_group_to_group_id[index]
            slots.append(EngineSlot(names, flattening, dist.get_rank(group=process_group), group, master=master))
        return slots

    def group_names(self) -> list[list[str | None]]:
        """See `EngineOptimizer.group_names`."""
        count = max((*self._zero.sub_group_to_group_id.values(), len(self.base.param_groups) - 1)) + 1
        names: list[list[str | None]] = [[] for _ in range(count)]
        for index, params in enumerate(self._zero.fp16_groups):
            names[self._zero.sub_group_to_group_id[index]] += [self._names[param] for param in params]
        return names

    def begin(self) -> None:
        """Partition gathered parameters, so that no stale whole copy outlives the filling."""
        self._zero.checkpoint_event_prologue()

    def make_weights(self) -> None:
        """See `EngineOptimizer.make_weights`."""
        zero = self._zero
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            weights = zero.fp16_partitioned_groups_flat[index]
            if weights is not master:
                weights.data.copy_(master.data)
            zero._unflatten_partitioned_parameters(index)

    def end(self) -> None:
        """Drop secondary copies (hpZ) and gather persistent parameters again. ``checkpoint_event_epilogue`` drops only trained
        parameters' copies, and gathers from secondary copies where there are any."""
        for param in self._names:
            param.ds_secondary_tensor = None  # type: ignore[attr-defined]
        self._zero.checkpoint_event_epilogue()

    def state_buffer(self, slot: EngineSlot, state: str) -> torch.Tensor:
        """See `EngineOptimizer.state_buffer`. For Muon's momentum it is the live tensor: that has the dtype of the gradients'
        communication, and ``save_muon_momentum_buffer_in_memory`` refers to it a second time."""
        live = self._live_momentum(slot)
        return super().state_buffer(slot, state) if live is None else live

    def reset_state(self, slot: EngineSlot) -> None:
        """See `EngineOptimizer.reset_state`. Muon's momentum is made with the engine, so the tensor stays and becomes zero."""
        live = self._live_momentum(slot)
        super().reset_state(slot)
        if live is not None:
            self.base.state[slot.master] = {MOMENTUM: live.zero_()}

    def _live_momentum(self, slot: EngineSlot) -> torch.Tensor | None:
        return self.state_of(slot).get(MOMENTUM) if is_muon_group(self.base, slot.group) else None


def _check_settings(zero: Zero3) -> None:
    """Refuse settings that keep masters, states or weights elsewhere than where this module fills them."""
    refused = {
        "offload_optimizer.device: nvme": zero.swap_optimizer,
        "offload_param.device: nvme": zero.params_in_nvme_and_cpu,
        "offload_optimizer.ratio below 1": zero.offload_optimizer and zero.partial_offload != 1,
        "zenflow": getattr(zero, "zenflow", False),
        "zero_quantized_nontrainable_weights": zero.zero_quantized_nontrainable_weights,
    }
    if found := [setting for setting, used in refused.items() if used]:
        raise UnsupportedError(
            f"zero_optimization.{', '.join(found)} is not supported by this release: it keeps tensors outside ZeRO's partitions"
        )
