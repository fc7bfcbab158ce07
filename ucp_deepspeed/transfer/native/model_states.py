"""Files of the model's state as values to pickle (``engine.py::_common_checkpoint_state``)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import WEIGHT, RunState
from ucp_deepspeed.checkpoint.expert_names import expert_of
from ucp_deepspeed.checkpoint.output import StoredTensor
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.transfer.native.buffers import Tensors
from ucp_deepspeed.transfer.native.experts import Experts
from ucp_deepspeed.transfer.native.optimizer_states import RankOptimizer
from ucp_deepspeed.transfer.native.run_values import RunValues
from ucp_deepspeed.transfer.native.settings import WRITTEN_VERSION, NativeSettings
from ucp_deepspeed.transfer.planning.target import TargetRank


@dataclass(frozen=True)
class RankModel:
    """The model of one rank.

    Attributes:
        settings: the engine's.
        view: the checkpoint's.
        tensors: makes the tensors of its model-parallel rank.
        target: the rank.
        names: logical names → names in the files.
        tied: further names in the files → the name that each tensor has.
        values: values of the run.
        optimizer: its optimizer.
        layered: the module is a pipeline's, whose layers have files of their own.
        experts: its experts, which have files of their own too.
    """

    settings: NativeSettings
    view: UniversalView
    tensors: Tensors
    target: TargetRank
    names: Mapping[str, str]
    tied: Mapping[str, str]
    values: RunValues
    optimizer: RankOptimizer
    layered: bool = False
    experts: Experts = Experts({}, 1)  # noqa: RUF009

    def state(self) -> dict[str, Any]:
        """Return what a file of the model's state holds."""
        run, topology, stage = self.view.checkpoint.run, self.settings.topology, self.settings.stage
        first = self.target.model_parallel_rank == self.target.data_parallel_rank == 0
        return {
            "module": None if self.layered else self.module(),
            "buffer_names": [self.names[name] for name in self._named("buffer")],
            "optimizer": None if stage else self.optimizer.state_dict(),
            "param_shapes": self._trained_shapes() if stage else None,
            "frozen_param_shapes": self._frozen_shapes() if stage >= 2 else None,
            "shared_params": (dict(self.tied) if first else {}) if stage else None,
            "frozen_param_fragments": self._frozen_fragments() if stage >= 2 else None,
            "lr_scheduler": None if run.lr_scheduler is None else dict(run.lr_scheduler),
            **self.values.schedules,
            **_counters(run),
            "dp_world_size": topology.dp,
            "mp_world_size": topology.model_parallel,
            "checkpoint_parallel_dimensions": {"pp_degree": topology.pp, "tp_degree": topology.tp},
            "ds_config": dict(self.settings.config),
            "ds_version": WRITTEN_VERSION,
            **(
                {"num_experts": list(self.experts.counts.values()), "ds_autoep_layers": None}
                if self.experts.counts
                else {}
            ),
            **self.values.client_state,
        }

    def module(self) -> OrderedDict[str, Any]:
        """Return the module's ``state_dict()``."""
        found = self.weights([name for name in self._held if expert_of(name) is None])
        found.update((alias, found[owner]) for alias, owner in self.tied.items() if owner in found)
        found.update(self.extra_states())
        return found

    def extra_states(self) -> Mapping[str, Any]:
        """Return the extra states of modules on this tensor-parallel rank."""
        degree = self.settings.topology.tp
        return self.values.extra_states_on(degree, self.target.model_parallel_rank % degree)

    def expert_weights(self) -> dict[str, StoredTensor]:
        """Return the weights of all experts, by logical name."""
        return {name: self._weight(name) for name in self.view.parameters if expert_of(name) is not None}

    def weights(self, names: Sequence[str] | None = None) -> OrderedDict[str, Any]:
        """Return parameters and buffers under their names in the files. At stage 3 only buffers have elements.

        Args: names: logical names; by default all that the rank holds.
        """
        found: OrderedDict[str, Any] = OrderedDict()
        empty = torch.empty(0, dtype=PRECISIONS[self.settings.precision])  # one for all: each has a record in the file
        for name in self._held if names is None else names:
            sliced = self.settings.stage == 3 and self.view.parameters[name].kind != "buffer"
            found[self.names[name]] = empty if sliced else self._weight(name)
        return found

    def _trained_shapes(self) -> list[OrderedDict[str, Any]]:
        """Return shapes in each buffer; of models with experts DeepSpeed makes tuples of them (``checkpoint/utils.py``)."""
        found: list[OrderedDict[str, Any]] = list(self.optimizer.trained_shapes)
        if self.experts.counts:
            found = [OrderedDict((name, tuple(shape)) for name, shape in shapes.items()) for shapes in found]
        return found

    @property
    def _held(self) -> list[str]:
        held = {name for slot in (*self.target.slots, *self.target.weights) for name in slot.names}
        return self.experts.ordered(name for name in self.view.parameters if name in held)

    def _empty(self, name: str) -> bool:
        return 0 in self.tensors.local_shape(name)

    def _named(self, kind: str) -> list[str]:
        return [name for name in self._held if self.view.parameters[name].kind == kind]

    def _weight(self, name: str) -> StoredTensor:
        parameter = self.view.parameters[name]
        dtype = self.settings.weight_dtype if parameter.kind == "trainable" else parameter.states[WEIGHT]
        return self.tensors.weight(name, dtype)

    @property
    def _aside(self) -> list[str]:
        """Names of the parameters that the optimizer doesn't have: frozen ones, and those without elements on this rank."""
        aside = [slot.names[0] for slot in self.target.weights]
        return [name for name in self._held if name in aside and self.view.parameters[name].kind != "buffer"]

    def _frozen_shapes(self) -> OrderedDict[str, torch.Size]:
        return OrderedDict((self.names[name], self.tensors.local_shape(name)) for name in self._aside)

    def _frozen_fragments(self) -> OrderedDict[str, StoredTensor]:
        """Return the frozen parameters: at stage 3 this rank's part of each."""
        if self.settings.stage < 3:
            return OrderedDict((self.names[name], self._weight(name)) for name in self._aside)
        slots = {slot.names[0]: slot for slot in self.target.weights}
        found: OrderedDict[str, StoredTensor] = OrderedDict()
        for name in self._aside:
            if self._empty(name):
                found[self.names[name]] = self._weight(name)
            else:
                found[self.names[name]] = self.tensors.buffer(
                    slots[name], WEIGHT, self.view.parameters[name].states[WEIGHT]
                )
        return found


def _counters(run: RunState) -> dict[str, Any]:
    found = {"skipped_steps": run.skipped_steps, "global_steps": run.global_steps}
    if run.global_samples is not None:  # else the engine counts them by its batch
        found["global_samples"] = run.global_samples
    return found
