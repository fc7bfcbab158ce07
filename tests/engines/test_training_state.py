"""The state of a run beside Adam's tensors: hyper-parameters, scheduler, counters, client state, loss scale, frozen weights,
buffers, vocabulary padding."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences, warnings_of_loading

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import Run, batch_of, build_engine, train, train_step
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.copying import gather

Ranks = Callable[[int], RankPool]


def test_hyperparameters_follow_their_parameters(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's universal load gives every ZeRO-3 group the weight decay of group 0."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, groups="decay"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": 3}, groups="decay")
    ranks(1).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))

    for folder in ("a", "b"):
        groups = open_checkpoint(tmp_path / folder).groups
        assert [group.hyperparameters["weight_decay"] for group in groups] == [0.1, 0.0]
        assert "linear_in.weight" in groups[0].names
        assert "linear_in.bias" in groups[1].names


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_groups_may_be_split_and_reordered(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed restores groups by index, and refuses another number of them; here the values follow the parameters."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, groups="decay"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": stage}, groups="shuffled")
    ranks(1).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    expected, found = (
        {name: group.hyperparameters for group in open_checkpoint(tmp_path / folder).groups for name in group.names}
        for folder in "ab"
    )
    assert len(open_checkpoint(tmp_path / "b").groups) == 3
    assert found == expected
    assert {found[name]["weight_decay"] for name in ("embedding.weight", "linear_out.weight")} == {0.1}
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_groups_with_different_values_are_not_merged_unasked(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, Run("mlp", zero={"stage": 2}, groups="decay"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": 3})
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, target, STEP, load=str(tmp_path / "a"))
    assert isinstance(caught.value.original, MismatchError)
    message = str(caught.value.original)
    assert "parameter group 0: 'weight_decay' is 0.0 for gain and 0.1 for embedding.weight" in message
    kept = replace(target, universal={"enabled": True, "hyperparameters": "keep"})
    ranks(1).run(train, kept, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert [group.hyperparameters["weight_decay"] for group in open_checkpoint(tmp_path / "b").groups] == [0.1]
    found = differences(tmp_path / "a", tmp_path / "b")
    assert found and all(" weight_decay " in line or " lr " in line for line in found), found


def test_learning_rate_is_not_left_to_the_scheduler(ranks: Ranks, tmp_path: Path) -> None:
    """The scheduler's state lacks the rate itself: WarmupLR would take one step at the new engine's first rate, 0."""
    run = Run("mlp", zero={"stage": 2})
    whole = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path), save_at=STEP)[0]
    resumed = ranks(1).run(train, Run("mlp", zero={"stage": 3}), LAST_STEP, load=str(tmp_path))[0]
    stopped = ranks(1).run(train, Run("mlp", zero={"stage": 3}), STEP, load=str(tmp_path))[0]
    assert resumed.rates == whole.rates
    assert 0 < stopped.rates[0] < whole.rates[0]


def test_groups_that_keep_their_hyperparameters_have_the_schedulers_rate(ranks: Ranks, tmp_path: Path) -> None:
    """Here too the first step would be at rate 0, and lost."""
    whole = ranks(2).run(train, Run("mlp", zero={"stage": 2}), LAST_STEP, save=str(tmp_path), save_at=STEP)[0]
    at_once = ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, load=str(tmp_path))[0]
    target = Run("mlp", zero={"stage": 3}, universal={"enabled": True, "hyperparameters": "keep"})
    assert ranks(1).run(train, target, STEP, load=str(tmp_path))[0].rates == at_once.rates
    assert ranks(1).run(train, target, LAST_STEP, load=str(tmp_path))[0].rates == whole.rates


OPTIONS: dict[str, dict[str, bool]] = {
    "defaults": {},
    "module-only": {"load_module_only": True},
    "no-optimizer": {"load_optimizer_states": False},
    "no-scheduler": {"load_lr_scheduler_states": False},
    "neither": {"load_optimizer_states": False, "load_lr_scheduler_states": False},
}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_result_is_that_of_deepspeed(name: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Path, client state, counters and learning rates after a load with each of its arguments."""
    run = Run("mlp", zero={"stage": stage}, precision="bf16")
    client_state = {"epoch": 3, "note": "north quay", "seen": [1, 2]}
    ranks(2).run(train, run, STEP, save=str(tmp_path), client_state=client_state)
    load = {"load": str(tmp_path), "options": OPTIONS[name]}
    last = STEP if name != "module-only" else 0
    native = ranks(2).run(train, replace(run, universal={"enabled": True, "load": "never"}), last, **load)
    always = replace(run, universal={"enabled": True, "load": "always"})
    universal = ranks(2).run(train, always, last, **load)
    assert native[0].report is None and universal[0].report is not None
    assert universal[0].rates == native[0].rates
    for ours, theirs in zip(universal, native, strict=True):
        assert (ours.load_path, ours.client_state, ours.counters) == (
            theirs.load_path,
            theirs.client_state,
            theirs.counters,
        )
        assert {key: ours.client_state[key] for key in client_state} == client_state


def weights_after_load(
    run: Run, folder: str, options: dict[str, bool]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """On a rank: an engine's weights after a load, and after one step that changes nothing."""
    engine = build_engine(run)
    params = list(engine.module.parameters())

    def weights() -> list[torch.Tensor]:
        with deepspeed.zero.GatheredParameters(params):
            return [param.detach().clone() for param in params]

    engine.load_checkpoint(folder, **options)
    loaded, engine.lr_scheduler = weights(), None
    for group in engine_optimizer(engine).base.param_groups:
        group["lr"] = 0.0
    train_step(engine, run, 1)
    return loaded, weights()


@pytest.mark.parametrize(("stage", "name"), [(3, "module-only"), (0, "no-optimizer")])
def test_weights_alone_are_loaded_on_the_same_topology(stage: int, name: str, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed loads no weight of ZeRO-3, and without ZeRO no master, so that the next step undoes the load."""
    run = Run("mlp", zero={"stage": stage}, precision="bf16")
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    whole, _ = ranks(2).run(weights_after_load, run, str(tmp_path), {})[0]
    for loaded, stepped in ranks(2).run(weights_after_load, replace(run, seed=5), str(tmp_path), OPTIONS[name]):
        assert all(map(torch.equal, loaded, whole)) and all(map(torch.equal, stepped, whole))


def save_with_scheduler(run: Run, folder: str) -> None:
    """On a rank: save a step with one of torch's schedulers."""
    engine = build_engine(run)
    engine.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(engine_optimizer(engine).base, 10)
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)


def load_with_another_scheduler(run: Run, folder: str) -> tuple[str, bool]:
    """On a rank: what is told of the load, and whether the engine is as it was; then a load without the schedule."""
    engine = build_engine(run)
    before = [slot.master.clone() for slot in engine_optimizer(engine).slots()], engine.lr_scheduler.state_dict()
    with pytest.raises(MismatchError) as caught:
        engine.load_checkpoint(folder)
    after = [slot.master for slot in engine_optimizer(engine).slots()], engine.lr_scheduler.state_dict()
    untouched = all(map(torch.equal, before[0], after[0])) and before[1] == after[1] and engine.global_steps == 0
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)
    return str(caught.value), untouched and engine.global_steps == 1


def test_a_scheduler_of_another_class(ranks: Ranks, tmp_path: Path) -> None:
    """Its ``KeyError`` came when all else had been loaded."""
    run = Run("mlp", universal={"enabled": True, "load": "always"})
    ranks(2).run(save_with_scheduler, run, str(tmp_path))
    for message, untouched in ranks(2).run(load_with_another_scheduler, run, str(tmp_path)):
        assert "WarmupLR keeps ['last_batch_iteration'], and can't take over the saved scheduler's ['T_max'" in message
        assert "load_lr_scheduler_states=False" in message and untouched


def test_plain_objects_in_the_client_state(ranks: Ranks, tmp_path: Path) -> None:
    """Scripts keep their parsed arguments and numpy's numbers there."""
    arguments = Namespace(lr=0.1, out=Path("runs/a"))
    client_state = {"arguments": [arguments], "best": np.float64(0.5), "order": [np.arange(3)]}
    ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, save=str(tmp_path), client_state=client_state)
    outcome = ranks(1).run(train, Run("mlp", zero={"stage": 3}), STEP, load=str(tmp_path))[0]
    assert outcome.client_state["arguments"] == [arguments] and outcome.client_state["best"] == 0.5
    assert outcome.client_state["order"][0].tolist() == [0, 1, 2]


class Opaque:
    """A class of the user's own."""


def test_client_state_that_no_load_will_read_is_told_at_once(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(1).run(saved_with_warnings, Run("mlp"), str(tmp_path), {"opaque": Opaque()})[0]
    assert any("opaque (" in line and "DeepSpeed alone can read some" in line for line in found)
    assert ranks(1).run(saved_with_warnings, Run("mlp"), str(tmp_path), {"epoch": 1})[0] == []


def saved_with_warnings(run: Run, folder: str, client_state: dict[str, Any]) -> list[str]:
    """On a rank: what is logged when a run saves."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ucp_deepspeed").addHandler(handler)
    try:
        train(run, 1, save=folder, client_state=client_state)
    finally:
        logging.getLogger("ucp_deepspeed").removeHandler(handler)
    return found


def test_each_tensor_parallel_rank_has_its_own_client_state(ranks: Ranks, tmp_path: Path) -> None:
    """As with DeepSpeed: where the tensor-parallel size stays, each rank finds what it gave; else all find the first one's."""
    run = Run("llama", tp=2, zero={"stage": 1})
    ranks(2).run(train_with_rank, run, str(tmp_path))
    same = ranks(4).run(train, replace(run, zero={"stage": 3}), STEP, load=str(tmp_path))
    assert [outcome.client_state["rank"] for outcome in same] == [0, 1, 0, 1]
    assert [Path(outcome.load_path or "").name[-24:] for outcome in same[:2]] == [
        f"mp_rank_0{rank}_model_states.pt"[-24:] for rank in (0, 1)
    ]
    other = ranks(2).run(train, replace(run, tp=1), STEP, load=str(tmp_path))
    assert [outcome.client_state["rank"] for outcome in other] == [0, 0]


def train_with_rank(run: Run, folder: str) -> None:
    """On a rank: save its own rank in the client state."""
    train(run, STEP, save=folder, client_state={"rank": torch.distributed.get_rank()})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_tag_folder_itself(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """``load_dir`` may name it, also where the load is left to DeepSpeed, which knows no such thing."""
    ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, save=str(tmp_path))
    outcome = ranks(2).run(train, Run("mlp", zero={"stage": stage}), STEP, load=str(tmp_path / f"global_step{STEP}"))[0]
    assert outcome.counters["global_steps"] == STEP and (outcome.report is None) == (stage == 2)


def test_frozen_parameters_and_buffers(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's universal load leaves both at their fresh values, without a word."""
    frozen = ("embedding.weight", "norm.bias")
    chain = [(1, 2, 0), (3, 4, 1), (0, 1, 2), (3, 2, 3), (2, 2, 4)]
    for position, (stage, world_size, seed) in enumerate(chain):
        run = Run("mlp", zero={"stage": stage}, frozen=frozen, seed=seed, precision="bf16")
        load = str(tmp_path / str(position - 1)) if position else None
        ranks(world_size).run(train, run, STEP, load=load, save=str(tmp_path / str(position)))
        checkpoint = open_checkpoint(tmp_path / str(position))
        kinds = {name: parameter.kind for name, parameter in checkpoint.parameters.items()}
        assert [name for name, kind in kinds.items() if kind == "frozen"] == list(frozen)
        assert [name for name, kind in kinds.items() if kind == "buffer"] == ["calibration", "calls"]
        assert differences(tmp_path / "0", tmp_path / str(position)) == []


@pytest.mark.parametrize(("source", "target"), [(1, 3), (3, 2), (0, 1)])
def test_complex_buffers_and_extra_states(source: int, target: int, ranks: Ranks, tmp_path: Path) -> None:
    """Extra states of modules and complex buffers are restored too, also by way of a conversion.

    DeepSpeed's universal load restores neither (peers: frozen parameters and buffers are silently not restored).
    """
    run = Run("mlp", size={"remembers": True}, zero={"stage": source})
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    view = UniversalView.of(open_checkpoint(tmp_path / "a"))
    assert view.parameters["angles"].states == {"weight": "C64"}
    assert view.checkpoint.extra_states() == ({"_extra_state": {"passes": STEP}},)
    convert(view, tmp_path / "u" / "step")
    other = replace(run, zero={"stage": target}, size={"remembers": True}, seed=1)
    for folder in (tmp_path / "a", tmp_path / "u" / "step"):
        again = tmp_path / f"again-{folder.name}"
        ranks(1).run(train, other, STEP, load=str(folder), save=str(again), save_first=True)
        assert differences(tmp_path / "a", again) == []
    ranks(1).run(train, other, STEP + 1, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert open_checkpoint(tmp_path / "b").extra_states() == ({"_extra_state": {"passes": STEP + 1}},)
    assert "extra_state passes" not in "".join(differences(tmp_path / "a", again))
    assert "_extra_state is {'passes': 3} in A, {'passes': 4} in B" in "".join(
        differences(tmp_path / "a", tmp_path / "b")
    )


def save_with_complex128(run: Run, folder: str) -> None:
    """On a rank: save with a buffer of a dtype that the universal form lacks; then DeepSpeed loads it by itself."""
    engine = build_engine(run)
    engine.module.register_buffer("angles", torch.full((3,), 1j, dtype=torch.complex128))
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)
    engine.module.angles.zero_()
    engine.load_checkpoint(folder)
    assert engine.module.angles.tolist() == [1j] * 3


def test_a_buffer_of_another_dtype_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", size={"remembers": True}, zero={"stage": 1})
    ranks(2).run(save_with_complex128, run, str(tmp_path / "a"))
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, run, STEP, load=str(tmp_path / "a"))
    assert "angles: torch.complex128 has no universal form" in str(caught.value.original)
    with pytest.raises(UnsupportedError, match=r"angles: torch\.complex128 has no universal form"):
        convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "u")


def test_an_extra_state_that_one_side_lacks(ranks: Ranks, tmp_path: Path) -> None:
    plain, remembering = Run("mlp", zero={"stage": 1}), Run("mlp", size={"remembers": True}, zero={"stage": 2})
    ranks(2).run(train, plain, STEP, save=str(tmp_path / "plain"))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, remembering, STEP, load=str(tmp_path / "plain"), options={"load_module_strict": True})
    assert "angles: missing in the checkpoint" in str(caught.value.original)
    ranks(2).run(train, remembering, STEP, save=str(tmp_path / "remembering"))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, plain, STEP, load=str(tmp_path / "remembering"))
    assert "angles: extra in the checkpoint" in str(caught.value.original)
    loose = {"load_module_strict": False}
    assert ranks(2).run(train, plain, STEP, load=str(tmp_path / "remembering"), options=loose)[0].report is not None


def test_a_tag_with_a_slash(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1})
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"), save_tag="epoch1/step3")
    assert (tmp_path / "a" / "latest").read_text() == "epoch1/step3"
    assert not (tmp_path / "a" / "epoch1" / "latest").exists()
    outcome = ranks(2).run(
        train, Run("mlp", zero={"stage": 3}), STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b")
    )
    assert outcome[0].counters["global_steps"] == STEP
    assert differences(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize("universal", [{"enabled": True}, None], ids=["manifest", "stock"])
@pytest.mark.parametrize(("first", "second"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_tag_saved_again_in_another_precision(
    first: Any, second: Any, universal: Any, ranks: Ranks, tmp_path: Path
) -> None:
    """DeepSpeed's optimizer files then have another name, and those of the run before stay beside them."""
    saving = {"save": str(tmp_path / "a"), "save_tag": "same"}
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, precision=first, universal=universal, seed=1), STEP, **saving)
    again = Run("mlp", zero={"stage": 1}, precision=second, universal=universal)
    ranks(2).run(train, again, STEP, **saving)
    ranks(2).run(train, again, STEP, save=str(tmp_path / "alone"), save_tag="same")
    names = {path.name for path in (tmp_path / "a" / "same").glob("*optim_states.pt")}
    assert {name.startswith("bf16_") for name in names} == {True, False}
    assert differences(tmp_path / "a", tmp_path / "alone") == []


def trained_in_order(
    run: Run, order: str, last: int, folder: str | None, save: str | None, scale: float = 1.0
) -> list[tuple[str, float]]:
    """On a rank: train with a torch scheduler on groups in some order, with scaled rates; the rate of each group."""
    reset_parallel_state()
    model = build_mlp(seed=run.seed)
    named = list(model.named_parameters())
    matrices, rest = [param for _, param in named if param.ndim > 1], [param for _, param in named if param.ndim <= 1]
    groups: dict[str, dict[str, Any]] = {"m": {"params": matrices, "lr": 1e-2}, "r": {"params": rest, "lr": 1e-4}}
    if "x" in order:
        groups |= {"m": {"params": matrices[:1], "lr": 1e-2}, "x": {"params": matrices[1:], "lr": 1e-2}}
    for group in groups.values():
        group["lr"] *= scale
    optimizer = torch.optim.AdamW([groups[key] for key in order])
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        config={
            "train_batch_size": 8,
            "zero_optimization": dict(run.zero),
            "zero_allow_untested_optimizer": True,
            "universal_checkpoint": dict(run.universal or {}),
        },
    )
    if folder is not None:
        engine.load_checkpoint(folder)
    while engine.global_steps < last:
        train_step(engine, run, engine.global_steps + 1)
    if save is not None:
        engine.save_checkpoint(save)
    rates = sorted((key, group["lr"]) for key, group in zip(order, optimizer.param_groups, strict=True))
    engine.destroy()
    return rates


@pytest.mark.parametrize(("order", "stage"), [("rm", 1), ("rm", 2), ("xrm", 3), ("mxr", 0)])
def test_a_scheduler_follows_the_parameters_too(order: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """torch's keep the first rates of all groups in the optimizer's order: with the groups in another one, they would change
    sides at the next step, and DeepSpeed gives all groups of ZeRO-3 the first one's."""
    source = Run("mlp", zero={"stage": 1})
    ranks(1).run(trained_in_order, source, "mr", STEP, None, str(tmp_path))
    expected = dict(ranks(1).run(trained_in_order, source, "mr", LAST_STEP, None, None)[0])
    target = Run("mlp", zero={"stage": stage})
    found = dict(ranks(1).run(trained_in_order, target, order, LAST_STEP, str(tmp_path), None)[0])
    assert found == {key: expected["m" if key == "x" else key] for key in order}


def scheduled(kind: str, reverse: bool, folder: str, save: bool) -> list[list[float]]:
    """On a rank: three steps of a scheduler over two groups, in one order or the other; their rates at each, by group."""
    reset_parallel_state()
    model = build_mlp(seed=0)
    groups = [
        {"params": [param for param in model.parameters() if param.ndim > 1], "lr": 1e-3},
        {"params": [param for param in model.parameters() if param.ndim <= 1], "lr": 2e-3},
    ]
    rates = [1e-3, 2e-3][:: -1 if reverse else 1]
    make = {
        "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=10),
        "SequentialLR": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.ConstantLR(optimizer, factor) for factor in (0.5, 0.25, 0.125)],
            milestones=[2, 4],
        ),
    }[kind]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups[:: -1 if reverse else 1]),
        lr_scheduler=make,
        config={
            "train_batch_size": 8,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "universal_checkpoint": {"enabled": True},
        },
    )
    if not save:
        engine.load_checkpoint(folder)
    found: list[list[float]] = []
    for _ in range(3):
        train_step(engine, Run("mlp"), engine.global_steps + 1)
        if save and engine.global_steps == 1:
            engine.save_checkpoint(folder)
        found.append(engine.get_lr()[:: -1 if reverse else 1])
    engine.destroy()
    return found


@pytest.mark.parametrize("kind", ["OneCycleLR", "SequentialLR"])
def test_a_schedule_whose_phases_are_as_many_as_the_groups(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """Two phases, two groups: the list is of the schedule, and stays in its order where the groups change theirs."""
    expected = ranks(1).run(scheduled, kind, False, str(tmp_path), True)[0]
    assert ranks(1).run(scheduled, kind, True, str(tmp_path), False)[0][:2] == expected[1:]


def test_a_schedule_from_the_configured_rates(ranks: Ranks, tmp_path: Path) -> None:
    """``"hyperparameters": "keep"`` with half the rates: half of what they would be, at every step after the resume."""
    source = Run("mlp", zero={"stage": 1})
    ranks(1).run(trained_in_order, source, "mr", STEP, None, str(tmp_path))
    keep = Run("mlp", zero={"stage": 2}, universal={"enabled": True, "hyperparameters": "keep"})
    for last in (STEP, LAST_STEP):
        expected = ranks(1).run(trained_in_order, source, "mr", last, None, None)[0]
        found = ranks(1).run(trained_in_order, keep, "rm", last, str(tmp_path), None, 0.5)[0]
        assert found == [(key, pytest.approx(rate / 2)) for key, rate in expected]


def evaluated(folder: str, stage: int) -> list[float]:
    """On a rank: load weights into an engine without an optimizer; a loss."""
    run = Run("mlp", zero={"stage": stage})
    reset_parallel_state()
    config = {"train_batch_size": 8, "zero_optimization": {"stage": stage}, "universal_checkpoint": {"enabled": True}}
    engine, *_ = deepspeed.initialize(model=build_mlp(seed=3), config=config)
    engine.load_checkpoint(folder, load_module_only=True)
    tokens = batch_of(run, 1)
    loss = float(engine(tokens[:, :-1], tokens[:, 1:]))
    engine.destroy()
    return [loss]


def test_an_engine_that_only_evaluates_is_left_to_deepspeed(ranks: Ranks, tmp_path: Path) -> None:
    """It has no training state to restore; stock DeepSpeed loads its weights."""
    run = Run("mlp", zero={"stage": 0})
    outcome = ranks(1).run(train, run, 1, save=str(tmp_path))[0]
    assert ranks(1).run(evaluated, str(tmp_path), 0)[0] == [outcome.losses[1]]  # the rate of the first step is 0


class Turning(torch.nn.Module):
    """Two layers that share a module with a buffer, as layers share rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        shared = torch.nn.BatchNorm1d(4, affine=False)
        self.first, self.second = (torch.nn.Sequential(torch.nn.Linear(4, 4), shared) for _ in range(2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(values)).square().mean()
        return result


def turned(stage: int, named: int, folder: str, load: bool) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """On a rank: load or train the model of shared modules, with groups of named parameters; its state and those names."""
    reset_parallel_state()
    torch.manual_seed(load)
    model = Turning()
    parameters = list(model.named_parameters())
    groups = [{"params": parameters}] if named == 1 else [{"params": parameters[:1]}, {"params": parameters[1:]}]
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "universal_checkpoint": {"enabled": True},
    }
    optimizer = torch.optim.AdamW(groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if load:
        engine.load_checkpoint(folder)
    else:
        engine.backward(engine(torch.randn(8 // engine.dp_world_size, 4)))
        engine.step()
        engine.save_checkpoint(folder)
    buffers = {name: value.clone() for name, value in engine.module.named_buffers(remove_duplicate=False)}
    names = [group["param_names"] for group in engine.optimizer.param_groups]
    engine.destroy()
    return buffers, names


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_buffer_with_two_names_and_groups_with_torchs_names(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """A module shared by layers: DeepSpeed saves its buffers under each name. torch's own lists of names stay the target's."""
    expected, names = ranks(2).run(turned, 1, 1, str(tmp_path), False)[0]
    found, parted = ranks(1).run(turned, stage, 2, str(tmp_path), True)[0]
    assert {"first.1.running_mean", "second.1.running_mean"} <= expected.keys() == found.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert parted == [names[0][:1], names[0][1:]]


def tied(head_first: bool, stage: int, folder: str, load: bool) -> tuple[torch.Tensor, tuple[str, ...]]:
    """On a rank: load or train an embedding and a tied head, in one order or the other; the weight, and what began anew."""
    reset_parallel_state()
    torch.manual_seed(load)
    embedding, head = torch.nn.Embedding(12, 6), torch.nn.Linear(6, 12, bias=False)
    parts = {"head": head, "embedding": embedding} if head_first else {"embedding": embedding, "head": head}
    model = torch.nn.ModuleDict(parts)
    head.weight = embedding.weight
    model.forward = lambda tokens: head(embedding(tokens)).square().mean()  # type: ignore[method-assign]
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "universal_checkpoint": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if load:
        engine.load_checkpoint(folder)
    else:
        engine.backward(engine(torch.arange(8 // engine.dp_world_size)))
        engine.step()
        engine.save_checkpoint(folder)
    report = getattr(engine, "universal_checkpoint_report", None)
    with deepspeed.zero.GatheredParameters([embedding.weight]):
        weight = embedding.weight.detach().clone()
    engine.destroy()
    return weight, report.initialised if report else ()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_tied_parameters_in_another_order(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed stores a tied parameter under the first of its names, which depends on the order of the modules."""
    [saved] = ranks(1).run(tied, False, stage, str(tmp_path), False)
    for loaded, initialised in ranks(2).run(tied, True, 1, str(tmp_path), True):
        assert loaded.equal(saved[0]) and initialised == ()


def with_a_grid(run: Run, turned: bool, folder: str | None, save: str | None) -> torch.Tensor:
    """On a rank: a model with one more buffer, whose elements lie column by column if ``turned``; returns it row by row."""
    engine = build_engine(run)
    grid = torch.arange(15.0).view(3, 5) * (run.seed + 1)
    engine.module.register_buffer("grid", grid.t().contiguous().t() if turned else grid)
    if folder is not None:
        engine.load_checkpoint(folder)
    if save is not None:
        engine.save_checkpoint(save)
    assert engine.module.grid.is_contiguous() != turned
    found = engine.module.grid.clone(memory_format=torch.contiguous_format)
    engine.destroy()
    return found


def test_a_buffer_in_another_order_of_elements(ranks: Ranks, tmp_path: Path) -> None:
    """As with channels_last: filled as if it were row-major, every element would be there and in a wrong place."""
    run, other = Run("mlp", zero={"stage": 1}), Run("mlp", zero={"stage": 2}, seed=3)
    [saved] = ranks(1).run(with_a_grid, run, False, None, str(tmp_path / "a"))
    [loaded] = ranks(1).run(with_a_grid, other, True, str(tmp_path / "a"), None)
    assert saved.equal(loaded)
    ranks(1).run(with_a_grid, run, True, None, str(tmp_path / "b"))
    with pytest.raises(RankError) as caught:
        ranks(1).run(with_a_grid, other, False, str(tmp_path / "b"), None)
    assert isinstance(caught.value.original, UnsupportedError)
    assert "holds a tensor of shape (3, 5) that isn't contiguous" in str(caught.value.original)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_optimizer_states_that_are_not_asked_for_stay_the_engines(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """``load_optimizer_states=False``: DeepSpeed's universal load ignores it under ZeRO-1 and 2."""
    ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": stage}, seed=1)
    settings = {"load": str(tmp_path / "a"), "options": {"load_optimizer_states": False}}
    ranks(1).run(train, target, STEP, **settings, save=str(tmp_path / "b"), save_first=True)
    first, second = (UniversalView.of(open_checkpoint(tmp_path / name)) for name in "ab")
    assert all(
        parameter.states.keys() == {"fp32"} for parameter in second.parameters.values() if parameter.kind != "buffer"
    )
    found = {(entry.what, entry.state) for entry in compare(first, second)}
    assert ("elements", "fp32") not in found and ("elements", "weight") not in found


def test_fp16_loss_scale(ranks: Ranks, tmp_path: Path) -> None:
    """Across stages, which DeepSpeed's universal checkpoints don't load at all, and data-parallel sizes."""
    scaling = {"fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}}
    source = Run("mlp", zero={"stage": 2}, precision="fp16", config=scaling)
    ranks(2).run(train, source, LAST_STEP, save=str(tmp_path / "a"))
    saved = open_checkpoint(tmp_path / "a").run.loss_scale
    assert saved is not None and saved.dynamic
    assert saved.values["cur_iter"] == LAST_STEP and saved.values["cur_scale"] > 2**8
    for number, (stage, world_size) in enumerate([(3, 4), (0, 1)]):
        target = Run("mlp", zero={"stage": stage}, precision="fp16", config=scaling)
        folder = tmp_path / f"b{number}"
        ranks(world_size).run(train, target, LAST_STEP, load=str(tmp_path / "a"), save=str(folder))
        found = open_checkpoint(folder).run.loss_scale
        assert found is not None
        shared = found.values.keys() & saved.values.keys()
        assert {"cur_scale", "cur_iter", "last_overflow_iter", "scale_window"} <= shared
        assert {key: found.values[key] for key in shared} == {key: saved.values[key] for key in shared}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_may_change(precision: str, ranks: Ranks, tmp_path: Path) -> None:
    """The fp32 masters are what is carried over; the low-precision weights are made from them."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, precision=precision), STEP, save=str(tmp_path / "a"))  # type: ignore[arg-type]
    ranks(2).run(train, Run("mlp", zero={"stage": 2}), STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    found = differences(tmp_path / "a", tmp_path / "b")
    # DeepSpeed before 0.19.8 rounds buffers too.
    assert [line for line in found if not line.startswith("calibration weight ")] == []


def test_wrapper_step_count_is_carried_over_unchanged(ranks: Ranks, tmp_path: Path) -> None:
    """Stage-0 bf16 wrappers step once when they are built. Their count is what the run's bias correction uses, so it stays;
    and a count that comes from elsewhere replaces the one that building left."""
    ranks(2).run(train, Run("mlp", zero={"stage": 0}, precision="bf16"), STEP, save=str(tmp_path / "wrapped"))
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, precision="bf16"), STEP, save=str(tmp_path / "zero"))
    hops = {"wrapped": (1, STEP + 1), "zero": (0, STEP)}
    for name, (stage, expected) in hops.items():
        run = Run("mlp", zero={"stage": stage}, precision="bf16")
        ranks(2).run(train, run, STEP, load=str(tmp_path / name), save=str(tmp_path / f"{name}-on"))
        for folder in (name, f"{name}-on"):
            parameters = open_checkpoint(tmp_path / folder).parameters.values()
            assert {p.scalars["step"] for p in parameters if p.kind == "trainable"} == {expected}


def test_before_the_first_step(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint without optimizer state clears what a wrapper's constructor left."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, precision="bf16"), 0, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": 0}, precision="bf16")
    ranks(1).run(train, target, 0, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert all(set(p.states) <= {"fp32", "weight"} for p in open_checkpoint(tmp_path / "b").parameters.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_from_low_precision_weights(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """``load_from_fp32_weights: false``: the masters begin as the rounded weights, and the moments are restored."""
    ranks(2).run(train, Run("mlp", zero={"stage": 0}, precision="bf16"), STEP, save=str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": stage, "load_from_fp32_weights": False}, precision="bf16")
    told, _ = ranks(2).run(warnings_of_loading, target, STEP, str(tmp_path / "a"))[0]
    assert told == ['the masters begin as the checkpoint\'s bf16 weights, as "load_from_fp32_weights": false says']
    ranks(2).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    found = differences(tmp_path / "a", tmp_path / "b")
    assert found and {line.split(" ")[1] for line in found} == {"fp32"}
    views = [UniversalView.of(open_checkpoint(tmp_path / folder)) for folder in "ab"]
    for name in ("embedding.weight", "norm.bias"):
        flat = [torch.zeros(torch.Size(view.logical_shape(name)).numel()) for view in views]
        for view, buffer in zip(views, flat, strict=True):
            gather(view, name, "fp32", 0, buffer, FileReader())
        assert torch.equal(flat[1], flat[0].bfloat16().float())


def test_weights_only(ranks: Ranks, tmp_path: Path) -> None:
    """``load_module_only`` takes the weights and leaves counters, rates and optimizer states alone."""
    ranks(2).run(train, Run("mlp", zero={"stage": 1}, seed=1), STEP, save=str(tmp_path / "a"))
    outcome = ranks(1).run(
        train,
        Run("mlp", zero={"stage": 3}),
        0,
        load=str(tmp_path / "a"),
        options={"load_module_only": True},
        save=str(tmp_path / "b"),
    )
    assert outcome[0].counters == {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}
    found = differences(tmp_path / "a", tmp_path / "b")
    assert found and not any(line.split(" ")[1] == "fp32" for line in found)


def test_vocabulary_is_padded_anew(ranks: Ranks, tmp_path: Path) -> None:
    """45 tokens, padded to 48 rows on TP1 and to 64 on TP4: only the 45 are carried over, and only when their number is known."""
    size = {"vocabulary": 45, "vocabulary_multiple": 16}
    ranks(2).run(train, Run("llama", size=size, tp=1, zero={"stage": 1}), 0, save=str(tmp_path / "a"))
    unknown = Run("llama", size=size, tp=4, zero={"stage": 3})
    with pytest.raises(RankError, match=r'expected logical shape \(64, 48\), found \(48, 48\).*"vocabulary_size"'):
        ranks(4).run(train, unknown, 0, load=str(tmp_path / "a"))
    told = Run("llama", size=size, tp=4, zero={"stage": 3}, universal={"enabled": True, "vocabulary_size": 45})
    ranks(4).run(train, told, 0, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    again = UniversalView.of(open_checkpoint(tmp_path / "b"))
    assert again.logical_shape("output_layer.weight") == (45, 48)
    before = UniversalView.of(open_checkpoint(tmp_path / "a"), vocabulary_size=45)
    assert compare(before, again) == []
