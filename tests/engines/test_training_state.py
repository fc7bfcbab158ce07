"""The state of a run beside Adam's tensors: scheduler, counters, client state, loss scale, precision, vocabulary padding."""

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
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import Run, batch_of, build_engine, train, train_step
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.copying import gather

Ranks = Callable[[int], RankPool]

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
    assert any("opaque (" in line and "are read by DeepSpeed alone" in line for line in found)
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
