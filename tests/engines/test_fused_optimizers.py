"""Adams that count steps in different places: Apex's and Transformer Engine's in a group, torch's in each parameter's state,
DeepSpeed's in the state of a group's last tensor. A run changes between them, and goes on as if it hadn't."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from checkpoints import LAST_STEP, STEP, shared_differences
from fused_optimizers import apex_adam, deepspeed_adam, deepspeed_lion, transformer_engine_adam

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.planning.targeting import plan_target

Ranks = Callable[[int], RankPool]

SETTINGS = {"lr": 2**-8, "betas": (0.9, 0.95), "weight_decay": 0.1}

ADAMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch": ("AdamW", {**SETTINGS, "foreach": False}),
    "torch fused": ("AdamW", {**SETTINGS, "fused": True}),
    "Apex": (apex_adam, SETTINGS),
    "Transformer Engine": (transformer_engine_adam, SETTINGS),
    "DeepSpeed": (deepspeed_adam, SETTINGS),
}


def steps_kept(run: Run, folder: str) -> tuple[set[Any], list[Any]]:
    """Steps in the states and in the groups of the base optimizer, after a load."""
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    states = {float(state["step"]) if "step" in state else None for state in base.state.values() if state}
    return states, [group.get("step") for group in base.param_groups]


def run_with(name: str, stage: int, precision: Literal["fp32", "bf16"], **changes: Any) -> Run:
    """A run of one of the Adams; no load is left to DeepSpeed unless ``universal`` says so."""
    universal = {"universal": {"enabled": True, "load": "always"}, **changes}
    return Run("mlp", zero={"stage": stage}, precision=precision, optimizer=ADAMS[name], **universal)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("first", "hops"),
    [
        ("Apex", [("torch", 1), ("Transformer Engine", 3), ("DeepSpeed", 2), ("Apex", 0)]),
        ("DeepSpeed", [("Apex", 2), ("torch fused", 0), ("Apex", 3), ("DeepSpeed", 0)]),
        ("torch", [("DeepSpeed", 3), ("Transformer Engine", 0), ("torch fused", 2), ("Apex", 1), ("torch", 0)]),
        ("Transformer Engine", [("DeepSpeed", 0), ("torch", 3), ("Apex", 0), ("Transformer Engine", 1)]),
    ],
)
def test_a_run_changes_between_adams(
    first: str, hops: list[tuple[str, int]], precision: Literal["fp32", "bf16"], ranks: Ranks, tmp_path: Path
) -> None:
    """Bit for bit the same state, and the losses of the first one, uninterrupted. Between two hops there is a conversion."""
    source = run_with(first, 0, precision)
    whole = ranks(2).run(train, source, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)[0].losses
    for hop, (name, stage) in enumerate(hops):
        before, after = tmp_path / str(hop), tmp_path / str(hop + 1)
        if hop == 1:
            convert(UniversalView.of(open_checkpoint(before)), tmp_path / "universal")
            before = tmp_path / "universal"
        target = run_with(name, stage, precision)
        losses = ranks(2).run(train, target, LAST_STEP, load=str(before), save=str(after), save_first=True)[0].losses
        assert shared_differences(tmp_path / "0", after) == []
        gaps = [abs(losses[step] - whole[step]) for step in range(STEP + 1, LAST_STEP + 1)]
        assert max(gaps) < (2e-5 if precision == "fp32" else 1e-2)
        if stage == 0 and precision == "fp32" and name != "torch fused":
            assert losses == {step: loss for step, loss in whole.items() if step > STEP}


@pytest.mark.parametrize("name", [name for name in ADAMS if name != "torch fused"])
@pytest.mark.parametrize("stage", [0, 1])
def test_the_step_goes_where_it_is_counted(name: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Also on the same topology, where a load may be left to DeepSpeed: that would let most steps begin anew."""
    ranks(2).run(train, run_with(name, stage, "fp32"), STEP, save=str(tmp_path))
    last_alone = {0.0, 3.0} if name == "DeepSpeed" and stage == 0 else {3.0}
    in_group = {None}, [STEP]
    expected = {
        "Apex": in_group,
        "Transformer Engine": in_group,
        "torch": ({3.0}, [None]),
        "DeepSpeed": (last_alone, [None]),
    }
    for other, wanted in expected.items():
        live = run_with(other, stage, "fp32", universal={"enabled": True})
        states, groups = ranks(2).run(steps_kept, live, str(tmp_path))[0]
        assert (other, states, [step or None for step in groups]) == (other, *wanted)


@pytest.mark.parametrize("kind", [apex_adam, transformer_engine_adam])
@pytest.mark.parametrize("name", ["torch", "Apex"])
def test_counts_and_rates_on_the_device(name: str, kind: Any, ranks: Ranks, tmp_path: Path) -> None:
    """``capturable``: the group's step and its rate are tensors, before the load and after it."""
    plain = {"scheduler": {}}
    source = run_with(name, 1, "fp32", config=plain)
    whole = ranks(2).run(train, source, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)[0].losses
    target = replace(source, zero={"stage": 2}, optimizer=(kind, {**SETTINGS, "capturable": True}))
    losses = ranks(2).run(train, target, LAST_STEP, load=str(tmp_path / "0"), save=str(tmp_path / "1"), save_first=True)
    assert shared_differences(tmp_path / "0", tmp_path / "1") == []
    assert max(abs(losses[0].losses[step] - whole[step]) for step in losses[0].losses) < 2e-5
    back = ranks(2).run(train, source, LAST_STEP, load=str(tmp_path / "1"))[0].losses
    assert max(abs(back[step] - whole[step]) for step in back) < 2e-5


def devices_of_steps(run: Run, folder: str) -> set[tuple[str, float]]:
    """Device and value of each step in the states after a load."""
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return {(state["step"].device.type, float(state["step"])) for state in base.state.values()}


@pytest.mark.nccl_like("only")
@pytest.mark.parametrize("setting", ["capturable", "fused"])
@pytest.mark.parametrize("stage", [0, 2])
def test_torchs_steps_on_the_device(setting: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """``capturable`` and ``fused`` want them there, and others on the CPU."""
    ranks(2).run(train, run_with("Apex", 1, "fp32"), STEP, save=str(tmp_path))
    target = replace(run_with("torch", stage, "fp32"), optimizer=("AdamW", {**SETTINGS, setting: True}))
    assert ranks(2).run(devices_of_steps, target, str(tmp_path))[0] == {("standin", 3.0)}
    plain = run_with("torch", stage, "fp32")
    assert ranks(2).run(devices_of_steps, plain, str(tmp_path))[0] == {("cpu", 3.0)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [deepspeed_adam, deepspeed_lion])
def test_a_step_that_one_tensor_counts(kind: Any, precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Without ZeRO DeepSpeed's classes count in the last tensor of a group, and ZeRO needs one step for all."""
    run = Run("mlp", zero={"stage": 0}, groups="decay", precision=precision, optimizer=(kind, {"lr": 1e-3}))
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    steps = {each.scalars.get("step") for each in open_checkpoint(tmp_path / "0").parameters.values()}
    assert steps - {None} == {STEP + (precision == "bf16")}  # the wrapper has stepped once in its constructor
    for hop, stage in enumerate((1, 3, 0), start=1):
        target, again = replace(run, zero={"stage": stage}), str(tmp_path / str(hop))
        outcome = ranks(2).run(train, target, LAST_STEP, load=str(tmp_path / str(hop - 1)), save=again, save_first=True)
        assert shared_differences(tmp_path / "0", tmp_path / str(hop)) == []
        assert abs(outcome[0].losses[LAST_STEP] - source[0].losses[LAST_STEP]) < (2e-3 if precision == "bf16" else 2e-5)


def save_with_one_unfrozen_late(run: Run, folder: str, late: str, again: bool) -> None:
    """Save after a parameter has been stepped on once less than the others, or never if it isn't trained ``again``."""
    engine = build_engine(run)
    param = engine.module.get_parameter(late)
    param.requires_grad_(False)
    train_step(engine, run, 1)
    param.requires_grad_(again)
    train_step(engine, run, 2)
    engine.save_checkpoint(folder)


@pytest.mark.parametrize("kind", ["DeepSpeed", "Apex"])
def test_steps_that_one_tensor_counts_must_be_the_same(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """One parameter was unfrozen late: the optimizer would step on all others with its step, or on it with theirs."""
    source, target = run_with("torch", 0, "fp32"), run_with(kind, 0, "fp32")
    ranks(1).run(save_with_one_unfrozen_late, source, str(tmp_path / "late"), "linear_in.bias", True)
    told = r"MismatchError.*(\s.*)?'step' is 2.0 for .* and 1.0 for linear_in.bias, .*; give them parameter groups of their own"
    with pytest.raises(RankError, match=told):
        ranks(1).run(steps_kept, target, str(tmp_path / "late"))
    reset = replace(target, universal={"enabled": True, "optimizer_states": "reset"})
    assert ranks(1).run(steps_kept, reset, str(tmp_path / "late"))[0] == (set(), [None])
    ranks(1).run(save_with_one_unfrozen_late, source, str(tmp_path / "never"), "linear_in.bias", False)
    in_states, in_group = ({2.0}, [None]) if kind == "DeepSpeed" else ({None}, [2])
    assert ranks(1).run(steps_kept, target, str(tmp_path / "never"))[0] == (in_states, in_group)


def test_states_with_scales_of_their_own(ranks: Ranks, tmp_path: Path) -> None:
    """Transformer Engine keeps a scale for each whole tensor beside states of fewer bits. DeepSpeed loads them on an unchanged
    topology; a class with fp32 goes on anywhere."""
    run = replace(run_with("Transformer Engine", 1, "fp32"), universal={"enabled": True})
    small = replace(run, optimizer=(transformer_engine_adam, {**SETTINGS, "exp_avg_dtype": torch.bfloat16}))
    whole = ranks(2).run(train, small, LAST_STEP, save=str(tmp_path), save_at=STEP)[0].losses
    same = ranks(2).run(train, small, LAST_STEP, load=str(tmp_path))[0]
    assert same.report is None and same.losses == {step: loss for step, loss in whole.items() if step > STEP}
    with pytest.raises(
        RankError, match=r"keeps {'exp_avg': torch.bfloat16, 'exp_avg_sq': torch.bfloat16}, with scales"
    ):
        ranks(1).run(train, small, LAST_STEP, load=str(tmp_path))
    assert set(ranks(1).run(train, run, LAST_STEP, load=str(tmp_path))[0].losses) == {4, 5, 6}
    anew = replace(small, universal={"enabled": True, "optimizer_states": "reset"})
    assert set(ranks(1).run(train, anew, LAST_STEP, load=str(tmp_path))[0].losses) == {4, 5, 6}


def test_plans_and_comparisons_of_all_pairs(ranks: Ranks, tmp_path: Path) -> None:
    """``ucp plan --model`` foretells that each takes over from each; ``ucp diff`` finds the same steps."""
    for name in (names := [name for name in ADAMS if name != "torch fused"]):
        ranks(2).run(train, run_with(name, 1, "fp32", groups="decay"), STEP, save=str(tmp_path / name))
    opened = {name: open_checkpoint(tmp_path / name) for name in names}
    for name, other in product(names, names):
        assert not plan_target(opened[name], Topology(dp=3, zero_stage=1), model=opened[other]).obstacles
        assert not any("step" in line for line in shared_differences(tmp_path / name, tmp_path / other))
