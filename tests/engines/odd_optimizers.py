"""Optimizers with state that torch's don't keep: numbers of their own, numbers in their groups, states that aren't element-wise.

Each keeps the same things in the same places and forms as the real class that it is named after; the arithmetic is shorter. Tests
pass all of them as client optimizers (`ucp_deepspeed.testing.runs.Run`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class _Odd(torch.optim.Optimizer):
    """Steps on one group after another; ``defaults`` are a group's settings beside its rate."""

    def __init__(self, params: Any, lr: float = 1e-3, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, **defaults})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        raise AssertionError("each class has its own")

    def _stepped_on(self, group: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Return each parameter that has a gradient, with its gradient and its state."""
        return ((param, param.grad, self.state[param]) for param in group["params"] if param.grad is not None)


class MomentumOfGroups(torch.optim.SGD):
    """torch's SGD with a momentum for each group; one without it keeps no states."""

    def __init__(self, params: Any, momenta: Sequence[float]) -> None:
        super().__init__(params, lr=1e-3)
        for group, momentum in zip(self.param_groups, momenta, strict=True):
            group["momentum"] = momentum


class NormPerTensor(_Odd):
    """Keeps the running norm of what it steps on, in a 0-d tensor and in a float, as Adafactor and LAMB variants do.

    Under ZeRO it steps on a partition, so both differ from rank to rank.
    """

    def _step_group(self, group: dict[str, Any]) -> None:
        for param, grad, state in self._stepped_on(group):
            if not state:
                state.update(step=0, rms=torch.zeros(()), peak=0.0, exp_avg=torch.zeros_like(param))
            assert type(state["step"]) is int and type(state["peak"]) is float and state["rms"].ndim == 0
            state["step"] += 1
            norm = grad.norm().cpu()
            state["rms"].mul_(0.9).add_(norm, alpha=0.1)
            state["peak"] = max(state["peak"], float(norm))
            state["exp_avg"].lerp_(grad, 0.1)
            param.data.add_(state["exp_avg"], alpha=-group["lr"] / (float(state["rms"]) + state["peak"] + 1e-3))


class Prodigy(_Odd):
    """Finds its own rate: ``d``, ``d_max``, ``d_numerator`` and the count ``k`` are in the groups.

    It sums over what it steps on, so that each partition has a ``d`` of its own.
    """

    def __init__(self, params: Any, lr: float = 1.0, d0: float = 1e-4) -> None:
        super().__init__(params, lr, d=d0, d0=d0, d_max=d0, d_numerator=0.0, k=0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; all groups share one ``d``."""
        first, denominator = self.param_groups[0], 0.0
        numerator = first["d_numerator"] * 0.9
        for group in self.param_groups:
            for param, grad, state in self._stepped_on(group):
                if not state:
                    state.update(step=0, s=torch.zeros_like(param), p0=param.detach().clone())
                    state["exp_avg_sq"] = torch.zeros_like(param)
                state["s"].mul_(0.9).add_(grad, alpha=0.1)
                state["exp_avg_sq"].mul_(0.9).addcmul_(grad, grad, value=0.1)
                moved = state["p0"] - param.data  # NaN may be in ZeRO-3's padding, which holds whatever the memory held
                numerator += float((grad * moved).nansum() + grad.norm())
                denominator += float(state["s"].abs().sum())
        d = max(first["d"], 1e-4 * numerator / (denominator + 1e-8))
        for group in self.param_groups:
            group.update(d=d, d_max=max(group["d_max"], d), d_numerator=numerator, k=group["k"] + 1)
            for param, _, state in self._stepped_on(group):
                state["step"] += 1
                param.data.addcdiv_(state["s"], state["exp_avg_sq"].sqrt() + 1e-6, value=-group["lr"] * d)


class OneElement(_Odd):
    """Keeps a state of shape ``(1,)`` for each tensor that it steps on, as bitsandbytes' optimizers do."""

    def _step_group(self, group: dict[str, Any]) -> None:
        for param, grad, state in self._stepped_on(group):
            if not state:
                state.update(
                    step=torch.zeros(()), scale=torch.ones(1, device=param.device), exp_avg=torch.zeros_like(param)
                )
            assert state["scale"].shape == (1,)
            state["step"] += 1
            state["scale"].mul_(0.9).add_(grad.norm().reshape(1), alpha=0.1)
            state["exp_avg"].lerp_(grad, 0.1)
            param.data.add_(state["exp_avg"], alpha=-group["lr"] / float(state["scale"]))


class Soap(_Odd):
    """Keeps lists of matrices, as SOAP does; it makes the second list at its second step."""

    def _step_group(self, group: dict[str, Any]) -> None:
        for param, grad, state in self._stepped_on(group):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(param), Q=None)
                state["GG"] = [torch.zeros(size, size, device=param.device) for size in param.shape]
            state["step"] += 1
            state["exp_avg"].lerp_(grad, 0.1)
            for index, found in enumerate(state["GG"]):
                rows = grad.transpose(0, index).reshape(len(found), -1)
                found.lerp_(rows @ rows.T, 0.1)
            if state["step"] > 1:
                state["Q"] = [torch.linalg.qr(found + torch.eye(len(found)).to(found))[0] for found in state["GG"]]
            param.data.add_(state["exp_avg"], alpha=-group["lr"] * float(sum(map(torch.sum, state["GG"])).sigmoid()))


class LateAverage(_Odd):
    """Begins to keep an average of the weights at its second step, as averaging optimizers do."""

    def _step_group(self, group: dict[str, Any]) -> None:
        for param, grad, state in self._stepped_on(group):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(param))
            state["step"] += 1
            state["exp_avg"].lerp_(grad, 0.1)
            if state["step"] > 1:
                state.setdefault("average", param.detach().clone()).lerp_(param.detach(), 0.5)
            param.data.add_(state["exp_avg"] + state.get("average", 0.0), alpha=-group["lr"])


class Bookkeeper(_Odd):
    """Keeps lists and tensors in its groups, some from its first step on, and a count for each element."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {"betas": torch.tensor([0.9, 0.99]), "history": [], "table": {"steps": 0}}

    def _step_group(self, group: dict[str, Any]) -> None:
        group["history"].append(len(group["history"]))
        group["table"]["steps"] += 1
        group["betas"].mul_(0.99)
        group.setdefault("scale", torch.ones(())).mul_(0.5)
        for param, grad, state in self._stepped_on(group):
            if not state:
                state.update(step=torch.zeros_like(param), exp_avg=torch.zeros_like(param))
            state["step"] = state["step"].to(grad.device) + (grad != 0)  # torch loads what has this name onto the host
            state["exp_avg"].mul_(group["betas"][0]).add_(grad, alpha=0.1)
            param.data.add_(state["exp_avg"] / (state["step"] + 1), alpha=-group["lr"] * float(group["scale"]))


class Counter(_Odd):
    """Keeps a count of its own, under a key that is no parameter, and writes another count into its ``state_dict``."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.calls = 0

    def _step_group(self, group: dict[str, Any]) -> None:
        self.calls += 1
        shared: Any = self.state
        shared.setdefault("shared", {"steps": 0})["steps"] += 1
        for param, grad, state in self._stepped_on(group):
            state.setdefault("exp_avg", torch.zeros_like(param)).lerp_(grad, 0.1)
            param.data.add_(state["exp_avg"], alpha=-group["lr"] / self.calls)

    def state_dict(self) -> dict[str, Any]:
        """Return the state with the calls."""
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state with the calls."""
        super().load_state_dict(state_dict)
        self.calls = state_dict["calls"]


class SignDescent(_Odd):
    """Keeps nothing."""

    def _step_group(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.grad is not None:
                param.data.add_(param.grad.sign(), alpha=-group["lr"])


class ScheduleFree(_Odd):
    """Schedule-free AdamW: ``k``, ``weight_sum`` and ``lr_max`` are in the groups, and are the same on all ranks."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr, k=0, weight_sum=0.0, lr_max=-1.0, train_mode=True)

    def _step_group(self, group: dict[str, Any]) -> None:
        rate = group["lr"]
        group["lr_max"] = max(group["lr_max"], rate)
        weight = (group["k"] + 1) * group["lr_max"] ** 2
        group["weight_sum"] += weight
        share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        group["scheduled_lr"] = rate  # from the first step on
        for param, grad, state in self._stepped_on(group):
            if not state:
                state.update(z=param.detach().clone(), exp_avg_sq=torch.zeros_like(param))
            state["exp_avg_sq"].mul_(0.99).addcmul_(grad, grad, value=0.01)
            normed = grad / (state["exp_avg_sq"].sqrt() + 1e-8)
            param.data.lerp_(state["z"], share).add_(normed, alpha=rate * (0.9 * (1 - share) - 1))
            state["z"].add_(normed, alpha=-rate)
        group["k"] += 1
