"""A model that changed since it was saved: an error, or by an explicit choice what fits is restored and the rest listed.

DeepSpeed's universal load fails when a parameter is unfrozen or added ('Steps not equal', FileNotFoundError), and never restores
frozen parameters and buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences, shared_differences, warnings_of_building

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Outcome, Run, train
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.copying import gather

Ranks = Callable[[int], RankPool]

STAGES = [0, 1, 2, 3]
FROZEN = ("linear_in.weight", "linear_in.bias")


def saved(ranks: Ranks, folder: Path, **changes: Any) -> Path:
    """Three steps of the small model, saved."""
    run = replace(Run("mlp", zero={"stage": 2}), **changes)
    ranks(2).run(train, run, STEP, save=str(folder / "a"))
    return folder / "a"


def resumed(
    ranks: Ranks, stage: int, source: Path, universal: Mapping[str, Any], last: int = STEP, **changes: Any
) -> tuple[Outcome, Path]:
    """Load at a stage on two ranks, save again at once, and go on to step ``last``."""
    run = replace(
        Run("mlp", zero={"stage": stage}, universal={"enabled": True, "load": "always", **universal}), **changes
    )
    again = source.parent / "again"
    outcome = ranks(2).run(train, run, last, load=str(source), save=str(again), save_first=True)
    return outcome[0], again


def refusal(ranks: Ranks, source: Path, **changes: Any) -> str:
    with pytest.raises(RankError) as caught:
        resumed(ranks, 1, source, {}, **changes)
    assert isinstance(caught.value.original, MismatchError)
    return str(caught.value.original)


def whole(folder: Path, name: str, state: str = "fp32") -> torch.Tensor:
    """One state of one whole parameter."""
    view = UniversalView.of(open_checkpoint(folder))
    flat = torch.zeros(torch.Size(view.logical_shape(name)).numel())
    gather(view, name, state, 0, flat, FileReader())
    return flat.view(view.logical_shape(name))


def states(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """All states of one parameter."""
    return {state: whole(folder, name, state) for state in open_checkpoint(folder).parameters[name].states}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stage", STAGES)
def test_unfreezing(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's universal load: 'Steps not equal', or FileNotFoundError for the state that isn't there (#2921, #6771)."""
    source = saved(ranks, tmp_path, frozen=FROZEN)
    assert "linear_in.weight: frozen in the checkpoint, trainable in the model" in refusal(ranks, source)
    outcome, again = resumed(ranks, stage, source, {"on_missing": "init"}, LAST_STEP)
    assert outcome.report.initialised == FROZEN and outcome.report.dropped == ()
    assert torch.equal(whole(again, "linear_in.weight"), whole(source, "linear_in.weight", "weight"))
    moments = states(again, "linear_in.weight")
    assert all(not moments[key].any() for key in moments.keys() - {"fp32"})
    assert same(states(again, "embedding.weight"), states(source, "embedding.weight"))
    assert len(outcome.losses) == LAST_STEP - STEP


@pytest.mark.parametrize("stage", STAGES)
def test_freezing(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """A frozen parameter keeps its trained value; DeepSpeed's universal load never restores frozen parameters."""
    source = saved(ranks, tmp_path)
    assert "linear_in.bias: trainable in the checkpoint, frozen in the model" in refusal(ranks, source, frozen=FROZEN)
    outcome, again = resumed(ranks, stage, source, {"on_extra": "drop"}, LAST_STEP, frozen=FROZEN)
    assert outcome.report.dropped == FROZEN and outcome.report.initialised == ()
    assert torch.equal(whole(again, "linear_in.weight", "weight"), whole(source, "linear_in.weight"))
    assert same(states(again, "gain"), states(source, "gain"))


@pytest.mark.parametrize("stage", STAGES)
def test_adding_an_adapter(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """FileNotFoundError in DeepSpeed's universal load; here an error that names it, or by policy the adapter as it began."""
    source = saved(ranks, tmp_path)
    adapted = {"size": {"adapter": True}, "seed": 5}
    assert "adapter.weight: missing in the checkpoint" in refusal(ranks, source, **adapted)
    outcome, again = resumed(ranks, stage, source, {"on_missing": "init"}, LAST_STEP, **adapted)
    assert outcome.report.initialised == ("adapter.weight", "adapter.bias")
    fresh = build_mlp(adapter=True, seed=5).adapter
    assert torch.equal(whole(again, "adapter.bias"), fresh.bias) and torch.equal(
        whole(again, "adapter.weight"), fresh.weight
    )
    assert all(not values.any() for key, values in states(again, "adapter.bias").items() if key != "fp32")
    assert same(states(again, "embedding.weight"), states(source, "embedding.weight"))
    assert len(outcome.losses) == LAST_STEP - STEP


@pytest.mark.parametrize("stage", STAGES)
def test_dropping_a_part(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's universal load leaves out what the model lacks without a word."""
    source = saved(ranks, tmp_path, size={"adapter": True})
    assert "adapter.bias: extra in the checkpoint (trainable" in refusal(ranks, source)
    outcome, again = resumed(ranks, stage, source, {"on_extra": "drop"})
    assert outcome.report.dropped == ("adapter.weight", "adapter.bias")
    assert "adapter.weight" not in open_checkpoint(again).parameters
    assert same(states(again, "odd_offset"), states(source, "odd_offset"))


@pytest.mark.parametrize("stage", STAGES)
def test_growing_the_vocabulary(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """The old rows and their states are restored; the new ones keep the model's values, with zero state."""
    source = saved(ranks, tmp_path)
    grown = {"size": {"vocabulary": 53}, "seed": 9}
    assert "embedding.weight: expected logical shape (53, 20), found (48, 20)" in refusal(ranks, source, **grown)
    outcome, again = resumed(ranks, stage, source, {"on_missing": "init"}, LAST_STEP, **grown)
    assert set(outcome.report.initialised) == {"embedding.weight", "linear_out.weight"}
    fresh = build_mlp(vocabulary=53, seed=9)
    for name in ("embedding.weight", "linear_out.weight"):
        before, after = states(source, name), states(again, name)
        assert all(torch.equal(after[key][:48], before[key]) for key in before)
        assert torch.equal(after["fp32"][48:], fresh.get_parameter(name)[48:])
        assert not after["exp_avg"][48:].any()
    assert len(outcome.losses) == LAST_STEP - STEP


@pytest.mark.parametrize("stage", STAGES)
def test_saved_without_frozen_parameters(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """``exclude_frozen_parameters``: as for an adapter's checkpoint, the frozen ones come from elsewhere."""
    frozen = Run("mlp", zero={"stage": stage}, frozen=FROZEN)
    ranks(2).run(train, frozen, STEP, save=str(tmp_path / "a"), save_options={"exclude_frozen_parameters": True})
    source = tmp_path / "a"
    assert open_checkpoint(source).parameters.keys().isdisjoint(FROZEN)
    assert "linear_in.bias: missing in the checkpoint" in refusal(ranks, source, frozen=FROZEN)
    target = replace(frozen, zero={"stage": 3 - stage}, seed=8)
    options = {"load_module_strict": False}
    again = tmp_path / "b"
    outcome = ranks(2).run(train, target, STEP, load=str(source), options=options, save=str(again), save_first=True)
    assert outcome[0].report.initialised == FROZEN
    fresh = build_mlp(seed=8)
    assert all(torch.equal(whole(again, name, "weight"), fresh.get_parameter(name)) for name in FROZEN)
    assert same(states(again, "linear_out.weight"), states(source, "linear_out.weight"))


def test_growing_a_sharded_vocabulary(ranks: Ranks, tmp_path: Path) -> None:
    """Rows that were padding become tokens: under tensor parallelism, where the padding lies on the last rank."""
    run = Run(
        "llama", {"vocabulary": 47, "vocabulary_multiple": 4}, tp=2, universal={"enabled": True, "vocabulary_size": 47}
    )
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    policy = {"enabled": True, "vocabulary_size": 50, "on_missing": "init"}
    target = replace(run, tp=1, size={"vocabulary": 50, "vocabulary_multiple": 4}, universal=policy, seed=3)
    outcome = ranks(2).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    name = "embedding.word_embeddings.weight"
    assert name in outcome[0].report.initialised
    before, after = states(tmp_path / "a", name), states(tmp_path / "b", name)
    assert before["fp32"].shape == (47, 48) and after["fp32"].shape == (50, 48)
    assert all(torch.equal(after[key][:47], before[key]) for key in before)
    assert after["fp32"][47:].any() and not after["exp_avg_sq"][47:].any()


def double_the_embedding(src: Mapping[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """A user's ``custom_load_fn``: changes one weight, fills one that the checkpoint lacks, and leaves the others as they are."""
    live = dict(dst.named_parameters())
    with torch.no_grad():
        live["embedding.weight"].copy_(2 * src["embedding.weight"])
        live["adapter.bias"].fill_(1.0)
        live["linear_out.weight"][: src["linear_out.weight"].shape[0]].copy_(src["linear_out.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_load_function_of_the_users_own(stage: int, precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Weights that it changes reach the masters; the others keep their fp32 values; states follow their parameters."""
    source = saved(ranks, tmp_path, precision=precision)
    changed = {"size": {"adapter": True, "hidden": 20}, "seed": 4, "precision": precision}
    run = replace(Run("mlp", zero={"stage": stage}), **changed)
    again, options = tmp_path / "again", {"custom_load_fn": double_the_embedding}
    outcome = ranks(2).run(train, run, STEP, load=str(source), save=str(again), save_first=True, options=options)
    assert outcome[0].report.initialised == ("adapter.weight", "adapter.bias")
    weight = whole(source, "embedding.weight").to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision]))
    assert torch.equal(whole(again, "embedding.weight"), 2 * weight.float())
    assert torch.equal(whole(again, "adapter.bias"), torch.ones(20))
    assert same(states(again, "linear_out.weight"), states(source, "linear_out.weight"))
    assert same(states(again, "norm.bias"), states(source, "norm.bias"))
    assert torch.equal(whole(again, "embedding.weight", "exp_avg"), whole(source, "embedding.weight", "exp_avg"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_load_function_where_nothing_else_has_changed(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Under ZeRO-1 and 2 DeepSpeed's saved masters undo the function's work at the next step; under ZeRO-3 it never shows."""
    run = Run("mlp", zero={"stage": stage})
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    options = {"custom_load_fn": double_one}
    for last, folder in [(STEP, "now"), (LAST_STEP, "later")]:
        ranks(2).run(train, run, last, load=str(tmp_path / "a"), save=str(tmp_path / folder), options=options)
    ranks(2).run(train, run, LAST_STEP, load=str(tmp_path / "a"), save=str(tmp_path / "plain"))
    doubled = 2 * whole(tmp_path / "a", "linear_in.weight")
    assert torch.equal(whole(tmp_path / "now", "linear_in.weight"), doubled)
    gone_on, plain = (whole(tmp_path / folder, "linear_in.weight") for folder in ("later", "plain"))
    assert (gone_on - doubled).abs().mean() < (gone_on - plain).abs().mean()


@pytest.mark.nccl_like
@pytest.mark.parametrize("stage", [2, 3])
def test_a_load_function_with_offloaded_masters(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """The masters are on the CPU, and the weights on the device."""
    source = Run("mlp", zero={"stage": 1}, precision="bf16")
    ranks(2).run(train, source, STEP, save=str(tmp_path / "a"))
    run = replace(source, zero={"stage": stage, "offload_optimizer": {"device": "cpu"}})
    options = {"custom_load_fn": double_one}
    ranks(2).run(train, run, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True, options=options)
    assert torch.equal(
        whole(tmp_path / "b", "linear_in.weight"), 2 * whole(tmp_path / "a", "linear_in.weight").bfloat16()
    )
    assert same(states(tmp_path / "b", "gain"), states(tmp_path / "a", "gain"))


def double_one(src: Mapping[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """A ``custom_load_fn`` for a model that hasn't changed."""
    with torch.no_grad():
        for name, param in dst.named_parameters():
            param.copy_(src[name] * (2 if name == "linear_in.weight" else 1))


def copy_rows(src: Mapping[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """A ``custom_load_fn`` for a model with fewer classes: it takes the first rows of this rank's share."""
    for name, param in dst.named_parameters():
        param.data.copy_(src[name][: param.shape[0]])


def test_a_load_function_sees_its_ranks_share(ranks: Ranks, tmp_path: Path) -> None:
    """From two tensor-parallel ranks to four, and to a smaller vocabulary, which no policy allows."""
    size = {"vocabulary": 48, "vocabulary_multiple": 1}
    ranks(2).run(train, Run("llama", size, tp=2), STEP, save=str(tmp_path / "a"))
    target = Run("llama", {**size, "vocabulary": 40}, tp=4, zero={"stage": 1}, seed=7)
    options = {"custom_load_fn": copy_rows}
    outcome = ranks(4).run(
        train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True, options=options
    )
    assert set(outcome[0].report.initialised) == {"embedding.word_embeddings.weight", "output_layer.weight"}
    before, after = (whole(tmp_path / folder, "embedding.word_embeddings.weight") for folder in "ab")
    for rank in range(4):  # rows of a share, not of the whole
        assert torch.equal(after[10 * rank : 10 * rank + 10], before[12 * rank : 12 * rank + 10])
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert same(states(tmp_path / "a", name), states(tmp_path / "b", name))


def test_a_parameter_that_never_had_a_gradient(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed steps it with zeros in every class, so that its states are zero everywhere."""
    idle = {"size": {"adapter": True, "idle": True}}
    source = saved(ranks, tmp_path, zero={"stage": 0}, **idle)
    for stage, target in ((3, "3"), (1, "1"), (0, "0")):
        _, again = resumed(ranks, stage, source, {}, LAST_STEP, **idle)
        source = again.rename(tmp_path / target)
        assert differences(tmp_path / "a", source) == []
    assert not states(source, "adapter.weight")["exp_avg"].any()


def test_a_parameter_without_state_among_others(ranks: Ranks, tmp_path: Path) -> None:
    """Unfrozen, and saved before the next step: a plain optimizer has no state for it, but a flat buffer has one for all."""
    before = saved(ranks, tmp_path, frozen=FROZEN)
    _, again = resumed(ranks, 0, before, {"on_missing": "init"})
    source = again.rename(tmp_path / "unfrozen")
    assert open_checkpoint(source).parameters["linear_in.weight"].states.keys() == {"fp32"}
    message = refusal(ranks, source)
    assert "linear_in.weight: has states ['fp32'], scalars {}, and " in message
    assert '"on_missing": "init" gives it zero state' in message
    _, again = resumed(ranks, 0, source, {}, LAST_STEP)
    assert differences(source, again) == []
    outcome, again = resumed(ranks, 1, source, {"on_missing": "init"}, LAST_STEP)
    assert outcome.report.initialised == FROZEN
    assert not states(again, "linear_in.weight")["exp_avg"].any()
    assert same(states(again, "embedding.weight"), states(source, "embedding.weight"))


OUTSIDE = ("norm.weight", "linear_out.weight")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_with_gradients_that_no_optimizer_has(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """It isn't trained, so it goes on as frozen ones do, at any stage that keeps it in its files."""
    source = saved(ranks, tmp_path, zero={"stage": stage}, outside=OUTSIDE)
    found = open_checkpoint(source).parameters
    assert [name for name, parameter in found.items() if parameter.kind == "frozen"] == list(OUTSIDE)
    for target in (0, 1, 2, 3):
        outcome, again = resumed(ranks, target, source, {}, outside=OUTSIDE, seed=1)
        assert outcome.report.initialised == outcome.report.dropped == ()
        if target < 3:  # whose files leave it out
            assert shared_differences(source, again) == []


def test_zero3_leaves_out_what_no_optimizer_has(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's files for ZeRO-3 hold only trained and frozen parameters: told when the engine is built, refused in a load."""
    run = Run("mlp", zero={"stage": 3}, outside=OUTSIDE)
    [warnings, _] = ranks(2).run(warnings_of_building, run)
    assert "norm.weight, linear_out.weight" in "".join(warnings)
    source = saved(ranks, tmp_path, zero={"stage": 3}, outside=OUTSIDE)
    message = refusal(ranks, source, outside=OUTSIDE)
    assert all(re.search(rf"{name}: DeepSpeed \S+ left its value out", message) for name in OUTSIDE)
    assert message.count("\n  ") == len(OUTSIDE)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_shape_of_the_same_size_is_refused_on_the_same_topology_too(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 load takes a weight of 20 x 33 for one of 33 x 20."""
    source = saved(ranks, tmp_path, zero={"stage": stage})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, Run("mlp", zero={"stage": stage}, size={"gain_shape": (1, 1)}), STEP, load=str(source))
    assert isinstance(caught.value.original, MismatchError)
    assert "gain: " in str(caught.value.original)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_optimizer_on_the_same_topology(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed would load the states of one into the other, and fail at the next step (KeyError)."""
    source = saved(ranks, tmp_path, zero={"stage": stage})
    sgd = Run("mlp", zero={"stage": stage}, optimizer=("SGD", {"lr": 0.1, "momentum": 0.9}))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, sgd, LAST_STEP, load=str(source))
    assert isinstance(caught.value.original, MismatchError)
    assert "the optimizer keeps ['momentum_buffer'], the checkpoint holds ['exp_avg', 'exp_avg_sq', 'step']" in str(
        caught.value.original
    )
    reset = replace(sgd, universal={"enabled": True, "optimizer_states": "reset"})
    assert set(ranks(2).run(train, reset, LAST_STEP, load=str(source))[0].losses) == {4, 5, 6}


def test_a_smaller_or_otherwise_different_shape_is_always_refused(ranks: Ranks, tmp_path: Path) -> None:
    source = saved(ranks, tmp_path)
    for size in ({"vocabulary": 47}, {"hidden": 24}):
        with pytest.raises(RankError) as caught:
            resumed(ranks, 1, source, {"on_missing": "init", "on_extra": "drop"}, size=size)
        assert "embedding.weight: expected logical shape" in str(caught.value.original)
