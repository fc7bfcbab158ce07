"""Stand-ins of optimizers that need a GPU, under the names and modules of the real classes.

Each keeps the same things in the same places and forms as the real class, and steps as torch's AdamW does, to the bit. Only the
functions are passed to runs (`ucp_deepspeed.testing.runs.Run`): classes under the names of others can't be sent to ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.optim.adamw import adamw


class _Fused(torch.optim.Optimizer):
    """Steps on one group after another. ``lr`` is a tensor if ``capturable``."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        capturable: bool = False,
        **defaults: Any,
    ) -> None:
        rate = torch.tensor(lr) if capturable else lr
        super().__init__(params, {"lr": rate, "betas": betas, "weight_decay": weight_decay, **defaults})
        self.capturable = capturable

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        raise AssertionError("each class has its own")

    def _count_in_group(self, group: dict[str, Any]) -> int:
        """Count, and return the count."""
        one: Any = torch.ones(1, dtype=torch.int32) if self.capturable else 1
        group["step"] = group["step"] + one if "step" in group else one
        assert type(group["step"]) is type(one) and type(group["lr"]) is (torch.Tensor if self.capturable else float)
        assert not self.capturable or (group["step"].dtype, group["step"].shape) == (torch.int32, (1,))
        return int(group["step"])

    def _states(self, group: dict[str, Any], names: Sequence[str], **further: Any) -> list[dict[str, Any]]:
        """Return the states of the parameters with a gradient; make those that aren't there."""
        found = [self.state[param] for param in group["params"] if param.grad is not None]
        for param in group["params"]:
            if param.grad is not None and not self.state[param]:
                self.state[param].update(further | {name: torch.zeros_like(param.data) for name in names})
        assert all(state.keys() == {*names, *further} for state in found)
        return found


def _adam(group: dict[str, Any], states: Sequence[dict[str, Any]], step: int) -> None:
    """Step on all parameters of a group that have a gradient."""
    params = [param for param in group["params"] if param.grad is not None]
    adamw(
        [param.data for param in params],
        [param.grad for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [torch.tensor(float(step - 1)) for _ in params],
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


class _ApexAdam(_Fused):
    """``apex/optimizers/fused_adam.py``: the group counts, from the first step on, and takes no empty groups."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{"bias_correction": True, "eps": 1e-8} | settings)

    def _step_group(self, group: dict[str, Any]) -> None:
        assert group["params"]
        _adam(group, self._states(group, ("exp_avg", "exp_avg_sq")), self._count_in_group(group))


class _TransformerEngineAdam(_ApexAdam):
    """``transformer_engine/pytorch/optimizers/fused_adam.py``: empty groups count too, parameters without a gradient have states,
    and what it saves and loads is scaled by the name of the state, so that it knows no others."""

    def __init__(self, params: Any, exp_avg_dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.name_to_dtype_map = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_dtype, "master_param": torch.float32}
        self.master_weights = False

    def _step_group(self, group: dict[str, Any]) -> None:
        step = self._count_in_group(group)
        for param in group["params"]:
            if not self.state[param]:
                self.state[param].update({name: self._made(name, param) for name in ("exp_avg", "exp_avg_sq")})
        states = self._states(group, ("exp_avg", "exp_avg_sq"))
        exact = [{name: tensor.float() for name, tensor in state.items()} for state in states]
        _adam(group, exact, step)
        for state, made in zip(states, exact, strict=True):
            for name in state:
                assert state[name].dtype == self.name_to_dtype_map[name]
                state[name].copy_(made[name])

    def _made(self, name: str, param: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(param.data, dtype=self.name_to_dtype_map[name])

    def state_dict(self) -> dict[str, Any]:
        """Return all states in fp32."""
        saved = super().state_dict()
        for index, state in saved["state"].items():
            held = {name: (state[name], self.name_to_dtype_map[name]) for name in state}
            assert all(tensor.dtype == dtype for tensor, dtype in held.values())
            saved["state"][index] = {name: tensor.float() for name, (tensor, _) in held.items()}
        return saved

    def load_state_dict(self, state_dict: Any) -> None:
        """Load states, each in its dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.update({name: state[name].to(self.name_to_dtype_map[name]) for name in state})


class _DeepSpeedAdam(_Fused):
    """DeepSpeed's ``ops/adam/fused_adam.py``: the group has a step that stays 0; only the last tensor stepped on counts."""

    states: Sequence[str] = ("exp_avg", "exp_avg_sq")

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{"bias_correction": True, "eps": 1e-8} | settings)

    def _step_group(self, group: dict[str, Any]) -> None:
        if not group["params"]:
            return
        states = self._states(group, self.states, step=group.setdefault("step", 0))
        assert all(type(state["step"]) is int for state in states)
        if states:
            states[-1]["step"] += 1
            self._update(group, states)

    def _update(self, group: dict[str, Any], states: Sequence[dict[str, Any]]) -> None:
        _adam(group, states, states[-1]["step"])


class _DeepSpeedLion(_DeepSpeedAdam):
    """DeepSpeed's ``ops/lion/fused_lion.py``: as its Adam."""

    states = ("exp_avg",)

    def __init__(self, params: Any, **settings: Any) -> None:
        _Fused.__init__(self, params, **settings)

    def _update(self, group: dict[str, Any], states: Sequence[dict[str, Any]]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        for param, state in zip(params, states, strict=True):
            moved = state["exp_avg"].lerp(param.grad, 1 - group["betas"][0]).sign()
            param.data.mul_(1 - group["lr"] * group["weight_decay"]).add_(moved, alpha=-group["lr"])
            state["exp_avg"].lerp_(param.grad, 1 - group["betas"][1])


class _Compiled(torch.optim.Optimizer):
    """DeepSpeed's other compiled classes: each tensor counts, in a Python number. A copy that is deleted frees the compiled half:
    then the original can't step."""

    states: Sequence[str]
    alive: ClassVar[set[int]] = set()

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.opt_id = id(self)
        self.alive.add(self.opt_id)

    def __del__(self) -> None:
        self.alive.discard(self.opt_id)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Sign descent; each further state keeps squares."""
        assert self.opt_id in self.alive
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                if not state:
                    state.update({"step": 0} | {name: torch.zeros_like(param) for name in self.states})
                assert type(state["step"]) is int and state.keys() == {"step", *self.states}
                state["step"] += 1
                for power, name in enumerate(self.states, start=1):
                    state[name].lerp_(param.grad**power, 0.1)
                param.data.add_(param.grad.lerp(state[self.states[0]], 0.5).sign(), alpha=-group["lr"])


class _TwoStates(_Compiled):
    states = ("exp_avg", "exp_avg_sq")


class _OneState(_Compiled):
    states = ("exp_avg_sq",)


def _called(kind: type, place: str) -> Any:
    module, _, name = place.rpartition(".")
    return type(name, (kind,), {"__module__": module})


_APEX = _called(_ApexAdam, "apex.optimizers.fused_adam.FusedAdam")
_TRANSFORMER_ENGINE = _called(_TransformerEngineAdam, "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam")
_DEEPSPEED = _called(_DeepSpeedAdam, "deepspeed.ops.adam.fused_adam.FusedAdam")
_LION = _called(_DeepSpeedLion, "deepspeed.ops.lion.fused_lion.FusedLion")

_CPU_LION = _called(_TwoStates, "deepspeed.ops.lion.cpu_lion.DeepSpeedCPULion")
_LAMB = _called(_TwoStates, "deepspeed.ops.lamb.fused_lamb.FusedLamb")
_CPU_ADAGRAD = _called(_OneState, "deepspeed.ops.adagrad.cpu_adagrad.DeepSpeedCPUAdagrad")


def apex_adam(params: Any, **settings: Any) -> torch.optim.Optimizer:
    """Return Apex's."""
    made: torch.optim.Optimizer = _APEX(params, **settings)
    return made


def transformer_engine_adam(params: Any, **settings: Any) -> torch.optim.Optimizer:
    """Return Transformer Engine's."""
    made: torch.optim.Optimizer = _TRANSFORMER_ENGINE(params, **settings)
    return made


def deepspeed_adam(params: Any, **settings: Any) -> torch.optim.Optimizer:
    """Return DeepSpeed's."""
    made: torch.optim.Optimizer = _DEEPSPEED(params, **settings)
    return made


def deepspeed_lion(params: Any, **settings: Any) -> torch.optim.Optimizer:
    """Return DeepSpeed's Lion."""
    made: torch.optim.Optimizer = _LION(params, **settings)
    return made


def cpu_lion(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return DeepSpeed's Lion for the CPU."""
    made: torch.optim.Optimizer = _CPU_LION(params, lr)
    return made


def own_cpu_lion(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return a user's subclass of that."""
    made: torch.optim.Optimizer = type("OwnLion", (_CPU_LION,), {})(params, lr)
    return made


def fused_lamb(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return DeepSpeed's LAMB."""
    made: torch.optim.Optimizer = _LAMB(params, lr)
    return made


def cpu_adagrad(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return DeepSpeed's Adagrad for the CPU."""
    made: torch.optim.Optimizer = _CPU_ADAGRAD(params, lr)
    return made
