"""Element-wise states of every optimizer, under whatever name; what isn't element-wise is refused by name, or reset on request.

DeepSpeed's universal checkpoints know ``exp_avg`` and ``exp_avg_sq`` only: SGD with momentum and Adagrad raise KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences
from fused_optimizers import cpu_adagrad, cpu_lion, deepspeed_lion, fused_lamb, own_cpu_lion

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

OPTIMIZERS: dict[str, tuple[str, Mapping[str, Any], set[str]]] = {
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}, {"momentum_buffer"}),
    "sgd": ("SGD", {"lr": 0.05}, set()),
    "adagrad": ("Adagrad", {"lr": 0.01, "initial_accumulator_value": 0.1}, {"sum"}),
    "rmsprop": (
        "RMSprop",
        {"lr": 1e-3, "momentum": 0.5, "centered": True},
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "adamax": ("Adamax", {"lr": 1e-3}, {"exp_avg", "exp_inf"}),
    "amsgrad": ("AdamW", {"lr": 1e-3, "amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "asgd": ("ASGD", {"lr": 0.01}, {"ax"}),
    "rprop": ("Rprop", {"lr": 1e-3}, {"prev", "step_size"}),
    "radam": ("RAdam", {"lr": 1e-3}, {"exp_avg", "exp_avg_sq"}),
    "nadam": ("NAdam", {"lr": 1e-3}, {"exp_avg", "exp_avg_sq"}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_every_name(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO-1 → ZeRO-3 → ZeRO-2 → no ZeRO: every state and scalar stays what it was, and the losses too. DeepSpeed's converter and
    ZeRO-3 raise KeyError for states that aren't called exp_avg and exp_avg_sq."""
    kind, options, states = OPTIMIZERS[name]
    run = Run("mlp", zero={"stage": 1}, optimizer=(kind, options))
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    found = open_checkpoint(tmp_path / "0").parameters["linear_in.weight"]
    assert found.states.keys() - {"fp32"} == states
    for hop, (stage, world_size) in enumerate([(3, 4), (2, 2), (0, 1)]):
        target = replace(run, zero={"stage": stage})
        folder = str(tmp_path / str(hop + 1))
        outcome = ranks(world_size).run(
            train, target, LAST_STEP, load=str(tmp_path / str(hop)), save=folder, save_first=True
        )
        assert differences(tmp_path / "0", tmp_path / str(hop + 1)) == []
        gaps = [abs(outcome[0].losses[step] - source[0].losses[step]) for step in range(STEP + 1, LAST_STEP + 1)]
        assert max(gaps) < 2e-5


class Sharp(torch.optim.AdamW):
    """A user's subclass of one of torch's."""


class Counting(torch.optim.Optimizer):
    """A user's own class, which counts steps in a Python number and keeps its mean as a float."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Sign descent with a running mean."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                assert type(state.get("step", 0)) is int and type(state.get("decay", 0.5)) is float
                state["step"] = state.get("step", 0) + 1
                state["decay"] = state.get("decay", 0.5) * 2.0
                state["mean"] = 0.5 * state.get("mean", 0.0) + 0.5 * param.grad
                param.data.add_(state["mean"].sign(), alpha=-group["lr"])


@pytest.mark.parametrize("kind", [Sharp, Counting])
def test_classes_of_the_users_own(kind: type, ranks: Ranks, tmp_path: Path) -> None:
    """Scalars come back in the form in which the class keeps them: a tensor for torch's, a number here."""
    run = Run("mlp", zero={"stage": 1}, optimizer=(kind, {"lr": 1e-3}))
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    for stage in (3, 0):
        again = tmp_path / str(stage)
        target = replace(run, zero={"stage": stage})
        outcome = ranks(4).run(train, target, LAST_STEP, load=str(tmp_path / "0"), save=str(again), save_first=True)
        assert differences(tmp_path / "0", again) == []
        assert abs(outcome[0].losses[LAST_STEP] - source[0].losses[LAST_STEP]) < 2e-3


@pytest.mark.parametrize(
    ("kind", "states"),
    [
        (deepspeed_lion, {"exp_avg"}),
        (cpu_lion, {"exp_avg", "exp_avg_sq"}),
        (fused_lamb, {"exp_avg", "exp_avg_sq"}),
        (cpu_adagrad, {"exp_avg_sq"}),
        (own_cpu_lion, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_classes_that_deepspeed_compiles(kind: Any, states: set[str], ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO-1 → 3 → 0 → 1: DeepSpeed's conversion wants ``exp_avg`` and ``exp_avg_sq`` of all, and no stage loads another's."""
    run = Run("mlp", zero={"stage": 1}, optimizer=(kind, {"lr": 1e-3}))
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    assert open_checkpoint(tmp_path / "0").parameters["gain"].states.keys() == {"fp32", *states}
    for hop, stage in enumerate((3, 0, 1), start=1):
        again, target = str(tmp_path / str(hop)), replace(run, zero={"stage": stage})
        outcome = ranks(4).run(train, target, LAST_STEP, load=str(tmp_path / str(hop - 1)), save=again, save_first=True)
        assert differences(tmp_path / "0", tmp_path / str(hop)) == []
        assert abs(outcome[0].losses[LAST_STEP] - source[0].losses[LAST_STEP]) < 2e-3


def test_a_state_that_one_side_lacks_is_named(ranks: Ranks, tmp_path: Path) -> None:
    """Lion keeps an unused second state where it is offloaded. DeepSpeed raises KeyError in the midst of a load."""
    lion = Run("mlp", zero={"stage": 1}, optimizer=(deepspeed_lion, {"lr": 1e-3}))
    ranks(2).run(train, lion, STEP, save=str(tmp_path / "a"))
    offloaded = replace(lion, zero={"stage": 2}, optimizer=(cpu_lion, {"lr": 1e-3}))
    message = refusal(ranks, offloaded, tmp_path / "a")
    assert "keeps ['exp_avg', 'exp_avg_sq', 'step'], the checkpoint holds ['exp_avg', 'step']" in message
    begun = replace(offloaded, universal={"enabled": True, "on_missing": "init"})
    outcome = ranks(2).run(train, begun, LAST_STEP, load=str(tmp_path / "a"))
    assert sorted(outcome[0].losses) == [STEP + 1, STEP + 2, STEP + 3]


class TensorRate(torch.optim.AdamW):
    """Keeps its learning rate in a tensor, as compiled optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, torch.tensor(lr), foreach=False)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """As AdamW's."""
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups)
        return super().step(closure)


def test_a_learning_rate_that_is_a_tensor(ranks: Ranks, tmp_path: Path) -> None:
    """It stays one, with the value of the run."""
    run = Run("mlp", zero={"stage": 1}, optimizer=(TensorRate, {"lr": 2e-3}), config={"scheduler": {}})
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path), save_at=STEP)
    resumed = ranks(1).run(train, replace(run, zero={"stage": 2}), LAST_STEP, load=str(tmp_path))
    assert resumed[0].rates == source[0].rates
    assert abs(resumed[0].losses[LAST_STEP] - source[0].losses[LAST_STEP]) < 2e-5


def test_before_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    """No state anywhere: nothing is invented, and the first step makes it."""
    run = Run("mlp", zero={"stage": 2})
    ranks(2).run(train, run, 0, save=str(tmp_path / "a"))
    whole = ranks(2).run(train, run, 2)
    resumed = ranks(4).run(train, replace(run, zero={"stage": 3}), 2, load=str(tmp_path / "a"))
    assert max(abs(whole[0].losses[step] - resumed[0].losses[step]) for step in (1, 2)) < 2e-5


def refusal(ranks: Ranks, run: Run, folder: Path) -> str:
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, STEP, load=str(folder))
    assert isinstance(caught.value.original, MismatchError)
    return str(caught.value.original)


def test_another_optimizer_is_refused_or_reset(ranks: Ranks, tmp_path: Path) -> None:
    adam = Run("mlp", zero={"stage": 1})
    sgd = replace(adam, zero={"stage": 2}, optimizer=("SGD", {"lr": 0.05, "momentum": 0.9}))
    ranks(2).run(train, adam, STEP, save=str(tmp_path / "a"))
    message = refusal(ranks, sgd, tmp_path / "a")
    assert "keeps ['momentum_buffer'], the checkpoint holds ['exp_avg', 'exp_avg_sq', 'step']" in message
    assert '"on_missing": "init" starts [\'momentum_buffer\'] at zero and "on_extra": "drop" leaves [' in message
    for place, policies in enumerate(({"on_missing": "init", "on_extra": "drop"}, {"optimizer_states": "reset"})):
        allowed, again = replace(sgd, universal={"enabled": True, **policies}), tmp_path / str(place)
        ranks(2).run(train, allowed, STEP, load=str(tmp_path / "a"), save=str(again), save_first=True)
        found = differences(tmp_path / "a", again)
        assert not [line for line in found if "elements differ" in line]  # the masters are the same
        assert any("state 'exp_avg' only in A" in line for line in found)


ADAM = {"lr": 1e-2}


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("AdamW", {**ADAM, "amsgrad": True}, {**ADAM, "amsgrad": False}),
        ("AdamW", {**ADAM, "amsgrad": False}, {**ADAM, "amsgrad": True}),
        ("RMSprop", {**ADAM, "centered": True, "momentum": 0.9}, ADAM),
    ],
    ids=["amsgrad-off", "amsgrad-on", "rmsprop"],
)
def test_a_setting_that_decides_which_states_there_are(
    name: str, one: dict[str, Any], other: dict[str, Any], stage: int, ranks: Ranks, tmp_path: Path
) -> None:
    """It is a hyper-parameter, and restored like the others: the run goes on as it was, on any topology and on the same. Kept as
    configured, the states must be allowed to differ."""
    source = Run("mlp", zero={"stage": stage}, optimizer=(name, one))
    whole_run = ranks(2).run(train, source, LAST_STEP, save=str(tmp_path), save_at=STEP)[0].losses
    for changes in ({}, {"load": "always", "on_missing": "init", "on_extra": "drop"}):
        target = replace(source, optimizer=(name, other), universal={"enabled": True, **changes})
        losses = ranks(2).run(train, target, LAST_STEP, load=str(tmp_path))[0].losses
        assert losses == {step: whole_run[step] for step in losses}
    keep = {"enabled": True, "hyperparameters": "keep"}
    kept = replace(source, optimizer=(name, other), universal=keep)
    with pytest.raises(RankError, match=r"the optimizer keeps \["):
        ranks(2).run(train, kept, LAST_STEP, load=str(tmp_path))
    allowed = replace(kept, universal={**keep, "on_missing": "init", "on_extra": "drop"})
    assert set(ranks(2).run(train, allowed, LAST_STEP, load=str(tmp_path))[0].losses) == {4, 5, 6}


class TransposedMoment(torch.optim.SGD):
    """Keeps a state of each matrix as the transposed matrix."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["turned"] = param.grad.t().contiguous() if param.ndim == 2 else param.grad.clone()
        return super().step(closure)


def test_a_state_of_another_shape_is_not_element_wise(ranks: Ranks, tmp_path: Path) -> None:
    """As many elements, in another order: flattened it would be cut as if it were the weight's."""
    run = Run("mlp", zero={"stage": 0}, optimizer=(TransposedMoment, {"lr": 0.1}))
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, replace(run, zero={"stage": 1}), STEP, load=str(tmp_path))
    assert isinstance(caught.value.original, MismatchError)
    assert "linear_in.weight: optimizer state 'turned' isn't element-wise: shape (20, 33)" in str(caught.value.original)


def test_factored_moments_are_refused_by_name_or_reset(ranks: Ranks, tmp_path: Path) -> None:
    """Adafactor keeps a matrix's second moment as a row and a column."""
    factored = Run("mlp", zero={"stage": 0}, optimizer=("Adafactor", {"lr": 1e-3}))
    ranks(2).run(train, factored, STEP, save=str(tmp_path / "a"))
    message = refusal(ranks, replace(factored, zero={"stage": 1}), tmp_path / "a")
    assert "linear_in.weight: optimizer state 'row_var' isn't element-wise: shape (33, 1)" in message
    with pytest.raises(UnsupportedError, match=r"linear_in\.weight: optimizer state 'row_var'"):
        convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "u")
    reset = replace(factored, zero={"stage": 1}, universal={"enabled": True, "optimizer_states": "reset"})
    outcome = ranks(2).run(train, reset, LAST_STEP, load=str(tmp_path / "a"))
    assert sorted(outcome[0].losses) == [STEP + 1, STEP + 2, STEP + 3]


def test_reset_is_as_before_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    """Adagrad's constructor makes its state: it begins at its initial value again."""
    run = Run("mlp", zero={"stage": 1}, optimizer=("Adagrad", {"lr": 0.01, "initial_accumulator_value": 0.1}))
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    reset = replace(run, universal={"enabled": True, "optimizer_states": "reset"})
    ranks(2).run(train, reset, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    parameter = open_checkpoint(tmp_path / "b").parameters["linear_in.weight"]
    assert parameter.scalars == {"step": 0.0} and "sum" in parameter.states


BOTH = {"enabled": True, "on_missing": "init", "on_extra": "drop"}


def test_numbers_beside_the_states_must_be_there_too(ranks: Ranks, tmp_path: Path) -> None:
    """NAdam keeps Adam's states and a product: with the states alone the first step after the load would fail (KeyError)."""
    ranks(2).run(train, Run("mlp", optimizer=("AdamW", {})), STEP, save=str(tmp_path))
    for world_size in (1, 2):
        run = Run("mlp", optimizer=("NAdam", {}))
        with pytest.raises(RankError) as caught:
            ranks(world_size).run(train, run, LAST_STEP, load=str(tmp_path))
        assert isinstance(caught.value.original, MismatchError)
        assert "the optimizer keeps ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']" in str(caught.value.original)


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Adagrad", "Rprop", "SGD"])
def test_another_optimizer_by_policy(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """States that the checkpoint lacks begin as before a first step, unless they begin at zero; all are listed."""
    ranks(2).run(train, Run("mlp", optimizer=("AdamW", {"lr": 0.01})), STEP, save=str(tmp_path / "a"))
    settings = {"SGD": {"momentum": 0.9}, "Adagrad": {"initial_accumulator_value": 0.5}}.get(name, {})
    run = Run("mlp", zero={"stage": 3}, optimizer=(name, {"lr": 0.01, **settings}), universal=BOTH)
    outcome = ranks(1).run(train, run, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)[0]
    held = open_checkpoint(tmp_path / "b").parameters
    trained = {key for key, parameter in held.items() if parameter.kind == "trainable"}
    assert set(outcome.report.initialised) == trained
    assert set(outcome.report.dropped) == (set() if name == "NAdam" else trained)
    ranks(1).run(train, run, LAST_STEP, load=str(tmp_path / "a"), save=str(tmp_path / "c"))  # its first step
    fresh = ranks(1).run(
        train, replace(run, universal={**BOTH, "optimizer_states": "reset"}), LAST_STEP, load=str(tmp_path / "a")
    )
    again = ranks(1).run(train, run, LAST_STEP, load=str(tmp_path / "a"))
    assert again[0].losses == fresh[0].losses
