"""Engines that this release leaves to DeepSpeed, and how they run on CPU ranks.

For `twin_flow_run` and `zenflow_run` DeepSpeed takes only its own Adam on the CPU, which is compiled (``cpu_adam``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import cpuinfo
import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from torch import nn

from ucp_deepspeed.testing.huggingface_models import build_huggingface
from ucp_deepspeed.testing.models import build_moe
from ucp_deepspeed.testing.ranks import reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, start_engine

cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)  # DeepSpeed's Adam asks each time that it is built, for a second

CPU = {"device": "cpu", "pin_memory": False}


def twin_flow_run() -> Run:
    """Half of the sub-groups stay where the accelerator is: ``ratio``."""
    zero = {"stage": 3, "offload_optimizer": CPU | {"ratio": 0.5}, "sub_group_size": 300}
    return Run("mlp", zero=zero, fused=True)


def zenflow_run(stage: int) -> Run:
    """The columns with the largest gradients are stepped on at once, and the others at the end of each step."""
    columns = {"topk_ratio": 0.2, "select_strategy": "step", "select_interval": 1, "update_interval": 1}
    zero = {"stage": stage, "offload_optimizer": CPU, "overlap_comm": True, "zenflow": columns}
    return Run("mlp", zero=zero, precision="bf16", fused=True)


class Wrapped:
    """An optimizer that doesn't derive from torch's, around one that does."""

    def __init__(self, params: Any, lr: float) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=lr)
        self.param_groups = self.optimizer.param_groups
        self.step = self.optimizer.step
        self.zero_grad = self.optimizer.zero_grad
        self.state_dict = self.optimizer.state_dict
        self.load_state_dict = self.optimizer.load_state_dict

    def __call__(self, params: Any) -> Wrapped:
        """Itself: DeepSpeed takes what isn't torch's for a function that makes an optimizer."""
        return self


class _Experts(nn.Module):
    """A layer of DeepSpeed's own mixture of experts, without what it returns beside the states."""

    def __init__(self, layer: MoE, residual: bool) -> None:
        super().__init__()
        self.layer = layer
        self.residual = residual

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(states)[0]
        return states + found if self.residual else found


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def experts_in_a_pipeline(stage: int, pp: int, ep: int) -> Run:
    """A run for `build_pipeline_with_experts`."""
    return Run("moe", pp=pp, size={"ep": (ep, ep)}, zero={"stage": stage})


def both_kinds_of_experts(stage: int) -> Run:
    """A run for `build_with_both_kinds_of_experts`."""
    config = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    return Run("huggingface", size={"family": "mixtral"}, zero={"stage": stage}, config=config)


def build_pipeline_with_experts(run: Run) -> Any:
    """On a rank: the model ``moe`` as a pipeline."""
    reset_parallel_state()
    model = build_moe(VOCABULARY, seed=run.seed, **run.size)
    layers = (_Experts(layer, residual=True) for layer in model.layers)
    steps = [model.embedding, *layers, nn.Sequential(model.norm, model.head)]
    return start_engine(run, PipelineModule(steps, run.pp, loss_fn=_mean_loss, partition_method="uniform"))


def build_with_both_kinds_of_experts(run: Run) -> Any:
    """On a rank: Mixtral under AutoEP, whose first layer has DeepSpeed's own experts instead."""
    reset_parallel_state()
    model = build_huggingface(vocabulary=VOCABULARY, dtype=torch.float32, seed=run.seed, **run.size)
    hidden = model.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        layer = MoE(hidden, nn.Linear(hidden, hidden), 2, 2, capacity_factor=2, use_rts=False)
    model.model.layers[0].mlp = _Experts(layer, residual=False)
    return start_engine(run, model)
