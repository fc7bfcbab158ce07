"""Names in the whole model of a live engine's parameters and buffers, whatever rank holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import groups

from ucp_deepspeed.checkpoint.expert_names import EXPERTS, expert_of, renumbered
from ucp_deepspeed.engine.deepspeed_surface import autoep_layers
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.language.name_spaces import CatalogName, ModuleName
from ucp_deepspeed.language.naming import optimizer_only_name


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of one mixture-of-experts layer that this rank holds: ``local`` of ``total``, from ``ep_rank * local`` on."""

    ep_rank: int
    local: int
    total: int

    @property
    def ep(self) -> int:
        """Expert-parallel size."""
        return self.total // self.local


class ModelNames:
    """Maps names of this rank's modules to those in the whole model. They differ only for experts of DeepSpeed's own layers.

    Attributes:
        layers: by the beginning of their experts' names; layers of AutoEP too.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.layers: Mapping[str, LayerExperts] = {
            f"{name}.{EXPERTS}.".lstrip("."): LayerExperts(
                groups._get_expert_parallel_rank(module.expert_group_name), module.num_local_experts, module.num_experts
            )
            for name, module in engine.module.named_modules()
            if isinstance(module, MoE)
        } | {
            f"{name}.experts.".lstrip("."): LayerExperts(module.ep_rank, module.num_local_experts, module.num_experts)
            for name, module in autoep_layers(engine.module)
        }

    @cached_property
    def of_parameters(self) -> Mapping[torch.Tensor, CatalogName]:
        """This rank's parameters → names in the whole model; also the parameters that only the optimizer has."""
        named = {**self._engine.param_names, **optimizer_only(self._engine)}
        return {param: self.in_model(name) for param, name in named.items()}

    def in_model(self, name: ModuleName) -> CatalogName:
        """Return the name in the whole model for a name on this rank."""
        found = expert_of(name)
        if found is None:
            return CatalogName(name)
        layer = self.layers[found[0]]
        return CatalogName(renumbered(name, layer.ep_rank * layer.local))

    def on_all_ranks(self, name: ModuleName) -> list[CatalogName]:
        """Return the names in the whole model of everything that the expert-parallel ranks call by this name."""
        found = expert_of(name)
        if found is None:
            return [CatalogName(name)]
        layer = self.layers[found[0]]
        return [CatalogName(renumbered(name, ep_rank * layer.local)) for ep_rank in range(layer.ep)]

    @property
    def ep(self) -> int:
        """The largest expert-parallel size of a layer; 1 without experts."""
        return max((layer.ep for layer in self.layers.values()), default=1)

    @property
    def ep_rank(self) -> int:
        """Number of this rank in the largest expert-parallel group; 0 without experts."""
        return next((layer.ep_rank for layer in self.layers.values() if layer.ep == self.ep), 0)


def optimizer_only(engine: Engine) -> dict[torch.Tensor, ModuleName]:
    """Return this rank's parameters that only the optimizer has, and no module, such as a learned weight of a loss, and their
    names (`OPTIMIZER_ONLY`); a pipeline's later stages count their own. DeepSpeed takes them only without ZeRO."""
    found: dict[torch.Tensor, ModuleName] = {}
    number = getattr(engine, "stage_id", 0)  # only a pipeline's engine has a stage
    stage = f".stage{number}" if number else ""
    optimizer, groups = engine.optimizer, []  # ZeRO's classes fail on such parameters
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        groups = optimizer.fp16_groups
    elif isinstance(optimizer, torch.optim.Optimizer):
        groups = [group["params"] for group in optimizer.param_groups]
    for group, params in enumerate(groups):
        own = [param for param in params if param not in engine.param_names]
        found |= {param: ModuleName(optimizer_only_name(group, index) + stage) for index, param in enumerate(own)}
    return found
