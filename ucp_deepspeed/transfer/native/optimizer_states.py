"""States of DeepSpeed's optimizers as values to pickle, one function for each class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, SCALE_KEYS, LossScale
from ucp_deepspeed.checkpoint.deepspeed.run_state import scaler_of
from ucp_deepspeed.checkpoint.output import StoredTensor
from ucp_deepspeed.checkpoint.slots import number_as_kept
from ucp_deepspeed.checkpoint.torch_files.unpickling import FragmentAddress, ZeroStage
from ucp_deepspeed.layout import FlatGroup
from ucp_deepspeed.transfer.native.buffers import Tensors, unpadded
from ucp_deepspeed.transfer.native.settings import DEFAULT_CLIPPING, WRITTEN_VERSION, NativeSettings
from ucp_deepspeed.transfer.planning.rank_planner import SlotStates
from ucp_deepspeed.transfer.planning.target import TargetSlot


@dataclass(frozen=True)
class HeldSlot:
    """A buffer of one rank's optimizer, and what it keeps for it."""

    slot: TargetSlot
    states: SlotStates


@dataclass(frozen=True)
class RankOptimizer:
    """The optimizer of one rank.

    Attributes:
        settings: the engine's.
        tensors: makes the tensors of its model-parallel rank.
        held: its buffers, by group and in the order of the group.
        groups: hyper-parameters of each group that has some of them.
        names: logical names → names in the files.
        scale: the loss scale of a run in fp16.
        steps: steps that the run has taken.
    """

    settings: NativeSettings
    tensors: Tensors
    held: Sequence[HeldSlot]
    groups: Mapping[int, Mapping[str, Any]]
    names: Mapping[str, str]
    scale: LossScale | None
    steps: int

    def state_dict(self) -> dict[str, Any]:
        """Return what ``engine.optimizer.state_dict()`` would."""
        makers = {
            "plain": self._base,
            "fp16-unfused": self._unfused,
            "fp16-fused": self._fused,
            "bf16-optimizer": self._bf16,
            "zero": self._zero3 if self.settings.stage == 3 else self._zero12,
        }
        return makers[self.settings.form]()

    @property
    def trained_shapes(self) -> list[OrderedDict[str, torch.Size]]:
        """``param_shapes``: shapes in each buffer."""
        return [self.tensors.shapes(each.slot, self.names) for each in self.held]

    def _base(self) -> dict[str, Any]:
        """Return the ``state_dict()`` of the base optimizer, which steps on the buffers."""
        entries = {number: self._entry(each) for number, each in enumerate(self.held)}
        groups: list[dict[str, Any]] = []
        for group, settings in self.groups.items():
            numbers = [number for number, each in enumerate(self.held) if each.slot.group == group]
            groups.append({**settings, "params": numbers})
        return {"state": {number: entry for number, entry in entries.items() if entry}, "param_groups": groups}

    def _entry(self, held: HeldSlot) -> dict[str, Any]:
        entry: dict[str, Any] = {key: number_as_kept(value) for key, value in held.states.scalars.items()}
        whole = self.settings.form in ("plain", "fp16-unfused")
        make = self.tensors.states if whole else self._buffer
        return entry | {state: make(held.slot, state) for state in held.states.states if state != MASTER}

    def _buffer(self, slot: TargetSlot, state: str) -> StoredTensor:
        return self.tensors.buffer(slot, state, "F32")

    def _masters(self) -> list[StoredTensor]:
        return [self._buffer(each.slot, MASTER) for each in self.held]

    def _unfused(self) -> dict[str, Any]:
        masters = [[self.tensors.states(each.slot, MASTER) for each in self._of(group)] for group in self.groups]
        return {**self._scale(), "optimizer_state_dict": self._base(), "fp32_groups": masters}

    def _fused(self) -> dict[str, Any]:
        scale = self._scale() if self.settings.precision == "fp16" else {}
        clipping = DEFAULT_CLIPPING if self.settings.clip_grad is None else self.settings.clip_grad
        masters = {"fp32_groups_flat": self._masters(), "clip_grad": clipping}
        return {**scale, "optimizer_state_dict": self._base(), **masters}

    def _of(self, group: int) -> list[HeldSlot]:
        return [each for each in self.held if each.slot.group == group]

    def _scale(self) -> dict[str, Any]:
        """Return the loss scale as the classes without ZeRO keep it."""
        if self.scale is None:
            return {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": self.steps}
        kept = SCALE_KEYS if self.scale.dynamic else SCALE_KEYS[:2]
        values = {"cur_iter": self.steps, **self.scale.values}
        return {"dynamic_loss_scale": self.scale.dynamic, **{key: values[key] for key in kept if key in values}}

    def _scaler(self) -> dict[str, Any]:
        """Return the loss scale as ZeRO's optimizers keep it."""
        scale = self.scale or LossScale(False, {"cur_scale": 1.0})
        scaler = scaler_of(scale, self.settings.config)
        return {"loss_scaler": scaler, "dynamic_loss_scale": scale.dynamic, "overflow": False}

    def _clipping(self) -> dict[str, Any]:
        """Return nothing if no config tells: the engine keeps its own then."""
        return {} if self.settings.clip_grad is None else {"clip_grad": self.settings.clip_grad}

    def _zero12(self) -> dict[str, Any]:
        slots = [each.slot for each in self.held]
        return {
            **self._scaler(),
            **self._clipping(),
            "base_optimizer_state": self._base(),
            "single_partition_of_fp32_groups": [
                self.tensors.buffer(slot, MASTER, "F32", unpadded(slot)) for slot in slots
            ],
            "zero_stage": ZeroStage(self.settings.stage),
            "group_paddings": [slot.numel() - unpadded(slot) for slot in slots],
            "param_alignment_paddings": [list(_flat(slot).gaps or (0,) * len(slot.names)) for slot in slots],
            **self._described(),
        }

    def _bf16(self) -> dict[str, Any]:
        slots = [each.slot for each in self.held]
        last = [slot.partition == _flat(slot).partitions - 1 for slot in slots]
        padding = [_flat(slot).partition_numel * _flat(slot).partitions - _flat(slot).unpadded for slot in slots]
        return {
            **self._clipping(),
            "base_optimizer_state": self._base(),
            "single_partition_of_fp32_groups": self._masters(),
            "group_paddings": [numel if held else 0 for numel, held in zip(padding, last, strict=True)],
            **self._described(),
        }

    def _described(self) -> dict[str, Any]:
        return {
            "partition_count": [each.slot.flattening.partitions for each in self.held],
            "ds_version": WRITTEN_VERSION,
            "param_slice_mappings": [self._mapping(each.slot) for each in self.held],
        }

    def _mapping(self, slot: TargetSlot) -> OrderedDict[str, FragmentAddress]:
        parts = slot.fragments()
        return OrderedDict((self.names[name], FragmentAddress(part.numel, part.buffer_start)) for name, part in parts)

    def _zero3(self) -> dict[str, Any]:
        return {
            "zero_stage": ZeroStage(3),
            **self._scaler(),
            "partition_count": self.settings.topology.dp,
            "optimizer_state_dict": self._base(),
            "fp32_flat_groups": self._masters(),
        }


def _flat(slot: TargetSlot) -> FlatGroup:
    assert isinstance(slot.flattening, FlatGroup)
    return slot.flattening
