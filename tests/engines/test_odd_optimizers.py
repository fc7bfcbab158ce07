"""Optimizers with numbers of their own, numbers in their groups, and states that aren't element-wise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fused_optimizers
import odd_optimizers
import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]

ALWAYS = {"enabled": True, "load": "always"}


def groups_and_numbers(run: Run, folder: str, steps: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """After a load: parameter groups of the base optimizer, and of each state the numbers."""
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    for _ in range(steps):
        train_step(engine, run, engine.global_steps + 1)
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups]
    states = [
        {key: float(v) for key, v in state.items() if not isinstance(v, torch.Tensor) or v.ndim == 0}
        for state in base.state.values()
    ]
    return groups, states


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_groups_count_from_the_first_step_on(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Apex's FusedAdam has no step in its groups before the first one: without it the next step is off by a tenth."""
    run = Run("mlp", zero={"stage": stage}, optimizer=(fused_optimizers.apex_adam, {}), universal=ALWAYS)
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    for world_size in (2, 1, 4):
        again = tmp_path / str(world_size)
        outcome = ranks(world_size).run(
            train, run, STEP + 1, load=str(tmp_path / "0"), save=str(again), save_first=True
        )
        assert differences(tmp_path / "0", again) == []
        assert outcome[0].report.kept_settings == ()
        if world_size == 2:
            assert outcome[0].losses[STEP + 1] == source[0].losses[STEP + 1]


@pytest.mark.parametrize(("kind", "stage"), [("Adafactor", 0), ("OneElement", 0), ("OneElement", 1), ("OneElement", 3)])
def test_an_unchanged_topology_with_states_of_other_forms(kind: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Unchanged is unchanged: it is left to DeepSpeed. On another topology the refusal names the state and the ways on."""
    optimizer = {"Adafactor": "Adafactor", "OneElement": odd_optimizers.OneElement}[kind]
    run = Run("mlp", zero={"stage": stage}, optimizer=(optimizer, {"lr": 1e-3}))
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path), save_at=STEP)
    outcome = ranks(2).run(train, run, LAST_STEP, load=str(tmp_path))
    assert outcome[0].report is None
    assert outcome[0].losses == {step: source[0].losses[step] for step in outcome[0].losses}
    state = "scale" if kind == "OneElement" else "row_var"
    with pytest.raises(RankError) as refused:
        ranks(1).run(train, replace(run, universal=ALWAYS) if stage == 0 else run, STEP, load=str(tmp_path))
    assert f"optimizer state {state!r} isn't element-wise" in str(refused.value)
    assert '"load": "auto" restores it on the topology' in str(refused.value) and '"reset"' in str(refused.value)
    reset = replace(run, universal={"enabled": True, "optimizer_states": "reset"})
    assert ranks(1).run(train, reset, STEP, load=str(tmp_path))[0].report is not None


@pytest.mark.parametrize("block", [None, {"enabled": True}], ids=["alone", "block"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Adafactor", {"lr": 1e-3}),
        (odd_optimizers.Soap, {}),
        (odd_optimizers.LateAverage, {}),
        (odd_optimizers.SignDescent, {}),
        ("SGD", {"lr": 1e-3}),
    ],
)
def test_where_nothing_is_cut_any_number_of_replicas_resumes_as_with_deepspeed_alone(
    kind: Any, options: Any, block: Any, ranks: Ranks, tmp_path: Path
) -> None:
    """Saved with the block or without; the file of such a run has everything that each rank needs."""
    saved = Run("mlp", zero={"stage": 0}, groups="decay", optimizer=(kind, options), universal=block)
    ranks(2).run(train, saved, STEP, save=str(tmp_path))
    here, alone = (
        ranks(1).run(train, replace(saved, universal=universal), LAST_STEP, load=str(tmp_path))[0]
        for universal in ({"enabled": True}, None)
    )
    assert list(here.losses) == [4, 5, 6] and here.losses == alone.losses
    assert here.client_state == alone.client_state and here.rates == alone.rates


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_lists_and_tensors_in_groups_and_counts_of_elements(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """They are what they were, also after the optimizer was asked which states it keeps; and it goes on from them."""
    run = Run("mlp", zero={"stage": stage}, optimizer=(odd_optimizers.Bookkeeper, {}), universal=ALWAYS)
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "a"), save_at=STEP)
    groups, _ = ranks(1).run(groups_and_numbers, run, str(tmp_path / "a"))[0]
    assert groups[0]["history"] == [0, 1, 2] and groups[0]["table"] == {"steps": 3}
    assert torch.equal(groups[0]["scale"], torch.tensor(0.125))
    for world_size in (1, 2):
        again = str(tmp_path / str(world_size))
        outcome = ranks(world_size).run(train, run, LAST_STEP, load=str(tmp_path / "a"), save=again, save_at=STEP)
        assert list(outcome[0].losses) == [4, 5, 6]
        assert world_size == 1 or outcome[0].losses == {step: source[0].losses[step] for step in outcome[0].losses}
    ranks(1).run(train, run, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_of_no_parameter_is_never_lost(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """It is restored where the optimizer's own file is, and told elsewhere."""
    run = Run("mlp", zero={"stage": stage}, optimizer=(odd_optimizers.Counter, {}))
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    refusing = replace(run, universal=ALWAYS) if stage == 0 else run
    with pytest.raises(RankError) as refused:
        ranks(1).run(train, refusing, STEP, load=str(tmp_path))
    for part in ("'shared' is of no parameter", "'calls' is of no parameter", '"reset"'):
        assert part in str(refused.value)
    if stage == 0:
        assert ranks(1).run(train, run, STEP + 1, load=str(tmp_path))[0].report is None


def test_a_state_that_is_made_later_follows_to_another_topology(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1}, optimizer=(odd_optimizers.LateAverage, {}))
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    for stage, world_size in ((3, 1), (0, 2)):
        target = replace(run, zero={"stage": stage})
        ranks(world_size).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / f"{stage}"))
        assert differences(tmp_path / "a", tmp_path / f"{stage}") == []
    view = open_checkpoint(tmp_path / "3").parameters
    assert all("average" in held.states for held in view.values() if held.kind == "trainable")


def test_groups_without_a_key_that_the_engines_class_needs(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed puts the saved groups in place of the live ones: then the step raises KeyError('bias_correction')."""
    run = Run("mlp", zero={"stage": 1}, optimizer=("AdamW", {"lr": 1e-3}))
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    target = replace(run, optimizer=(fused_optimizers.deepspeed_adam, {}))
    outcome = ranks(2).run(train, target, STEP + 1, load=str(tmp_path))
    assert outcome[0].report is not None and STEP + 1 in outcome[0].losses
    back = ranks(2).run(train, replace(target, universal={"enabled": True}), STEP, load=str(tmp_path))
    assert back[0].report is not None


@pytest.mark.parametrize("stage", [1, 3])
def test_adagrad_with_two_groups(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed makes it anew with one group, and can't step; what it can, it still does."""
    run = Run("mlp", zero={"stage": 0}, groups="decay", optimizer=("Adagrad", {"lr": 1e-3}))
    ranks(2).run(train, run, STEP, save=str(tmp_path / "0"))
    target = replace(run, zero={"stage": stage})
    outcome = ranks(2).run(train, target, STEP, load=str(tmp_path / "0"))
    assert "parameter group 1: Adagrad has one group for all under ZeRO" in outcome[0].report.kept_settings
    if stage == 1:  # DeepSpeed saves it, and loads it
        ranks(2).run(train, target, 0, save=str(tmp_path / "1"))
        assert ranks(2).run(train, target, 0, load=str(tmp_path / "1"))[0].load_path is not None


ODD: dict[str, tuple[type, str]] = {
    "norm": (odd_optimizers.NormPerTensor, "'rms' is "),
    "prodigy": (odd_optimizers.Prodigy, "'d_numerator' is "),
}
FORMS: dict[str, dict[str, Any]] = {
    "zero-1": {"zero": {"stage": 1}},
    "zero-3": {"zero": {"stage": 3}},
    "bf16": {"zero": {"stage": 1}, "precision": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ODD)
def test_numbers_that_differ_from_partition_to_partition(kind: str, form: str, ranks: Ranks, tmp_path: Path) -> None:
    """On the same topology each rank gets its own back; on another they are refused by name, or become one as the policy says."""
    optimizer, told = ODD[kind]
    run = Run("mlp", optimizer=(optimizer, {}), groups="decay", **FORMS[form])
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    for load in ("auto", "always"):
        target = replace(run, universal={"enabled": True, "load": load})
        outcome = ranks(2).run(train, target, LAST_STEP, load=str(tmp_path / "0"))
        assert outcome[0].losses == {step: source[0].losses[step] for step in outcome[0].losses}
        assert (outcome[0].report is None) == (load == "auto")
    saved = ranks(2).run(numbers_after_a_load, target, str(tmp_path / "0"))
    with pytest.raises(RankError) as refused:
        ranks(4).run(train, run, STEP, load=str(tmp_path / "0"))
    key = told.split("'")[1]
    for value in {ranked[0][key] for ranked in saved}:
        assert repr(value) in str(refused.value)
    assert told in str(refused.value) and '"on_differing": "first", "last", "mean" or "max"' in str(refused.value)
    for how, one in (("first", lambda values: values[0]), ("mean", lambda v: sum(v) / len(v)), ("max", max)):
        made = replace(run, universal={"enabled": True, "on_differing": how})
        found = ranks(1).run(numbers_after_a_load, made, str(tmp_path / "0"))
        wanted = [one([ranked[group][key] for ranked in saved]) for group in range(2)]
        got = [held[key] for held in found[0]]
        assert sorted({*got}) == sorted({float(torch.tensor(w)) if key == "rms" else w for w in wanted})


def test_numbers_that_differ_from_expert_parallel_rank_to_rank(ranks: Ranks, tmp_path: Path) -> None:
    """Without ZeRO each steps on its own experts, and by the number that it finds also on what the others have too."""
    run = Run("moe", size={"ep": (2, 2)}, zero={"stage": 0}, groups="decay", optimizer=(odd_optimizers.Prodigy, {}))
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    saved = ranks(2).run(groups_and_numbers, run, str(tmp_path))
    assert saved[0] != saved[1]
    assert all("d" in group.differing for group in open_checkpoint(tmp_path).groups)
    assert ranks(2).run(groups_and_numbers, replace(run, universal=ALWAYS), str(tmp_path)) == saved
    target = replace(run, size={"ep": (1, 1)})
    with pytest.raises(
        RankError, match=r"'d_numerator' is .* on expert-parallel rank 0, .* on expert-parallel rank 1;"
    ):
        ranks(1).run(train, target, STEP, load=str(tmp_path))
    made = replace(target, universal={"enabled": True, "on_differing": "max"})
    groups, _ = ranks(1).run(groups_and_numbers, made, str(tmp_path))[0]
    assert groups[0]["d"] == max(held[0]["d"] for held, _ in saved)


@pytest.mark.parametrize("block", [None, ALWAYS], ids=["alone", "block"])
def test_a_parameter_without_elements_in_an_optimizer_of_the_users(block: Any, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed leaves those out of the optimizers that it builds itself, and out of all that are cut."""
    run = Run("mlp", size={"odd": 0}, zero={"stage": 0}, optimizer=("AdamW", {"lr": 1e-3}), universal=block)
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    for stage in (0, 1, 3):
        target, again = replace(run, zero={"stage": stage}, universal=ALWAYS), tmp_path / str(stage)
        outcome = ranks(1).run(train, target, STEP + 1, load=str(tmp_path / "a"), save=str(again), save_first=True)
        assert outcome[0].report.initialised == outcome[0].report.dropped == ()
        assert differences(tmp_path / "a", again) == []


def test_numbers_that_differ_from_stage_to_stage(ranks: Ranks, tmp_path: Path) -> None:
    """A pipeline's stages step each by itself, on what becomes one group of a plain model."""
    run = Run("llama", {"layers": 3}, pp=2, zero={"stage": 1}, optimizer=(odd_optimizers.Prodigy, {}))
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    saved = [group["d_numerator"] for group in (each.hyperparameters for each in open_checkpoint(tmp_path).groups)]
    assert len(set(saved)) == 2
    with pytest.raises(RankError) as refused:
        ranks(1).run(train, replace(run, pp=None), STEP, load=str(tmp_path))
    assert all(f"{value} for " in str(refused.value) for value in saved)
    assert '"on_differing": "first"' in str(refused.value)
    made = replace(run, pp=None, universal={"enabled": True, "on_differing": "max"})
    groups, _ = ranks(1).run(groups_and_numbers, made, str(tmp_path))[0]
    assert groups[0]["d_numerator"] == max(saved)


def numbers_after_a_load(run: Run, folder: str) -> list[dict[str, float]]:
    """By parameter group what the group and its first state keep in numbers."""
    groups, states = groups_and_numbers(run, folder)
    first = [states[0], states[-1]]
    return [
        {k: v for k, v in group.items() if isinstance(v, float)} | held
        for group, held in zip(groups, first, strict=True)
    ]


@pytest.mark.parametrize("real", [False, True])
def test_a_step_that_is_counted_for_a_whole_group(real: bool, ranks: Ranks, tmp_path: Path) -> None:
    """Without ZeRO DeepSpeed's FusedAdam counts in the state of a group's last parameter alone; ZeRO needs one for all."""
    kind: dict[str, Any] = {"fused": True} if real else {"optimizer": (fused_optimizers.deepspeed_adam, {})}
    run = Run("mlp", zero={"stage": 0}, groups="decay", **kind)
    source = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "0"), save_at=STEP)
    assert {each.scalars.get("step") for each in open_checkpoint(tmp_path / "0").parameters.values()} == {STEP, None}
    for hop, stage in enumerate((1, 0), start=1):
        target, again = replace(run, zero={"stage": stage}), str(tmp_path / str(hop))
        outcome = ranks(2).run(train, target, LAST_STEP, load=str(tmp_path / str(hop - 1)), save=again, save_first=True)
        assert differences(tmp_path / "0", tmp_path / str(hop)) == []
        assert abs(outcome[0].losses[LAST_STEP] - source[0].losses[LAST_STEP]) < 2e-5
