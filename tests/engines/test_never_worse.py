"""DeepSpeed saves and resumes with the block all that it does without: each case with and without it, bit for bit.

To add a case, add a line to `CASES` or `LEFT_ALONE`. The run that saves is built by ``make``, trained and saved by ``save``; the
one that goes on is built by ``build``, loads with ``arguments`` and is trained by ``go_on``. All of these are called on every
rank, and are functions of a module, since ranks get them by name.
"""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import deepspeed
import fused_optimizers
import left_alone
import odd_optimizers
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from nvme import build_on_nvme, nvme_parameters_run, nvme_run
from sources import (
    SAVED_STEPS,
    age,
    compress,
    forget_paddings,
    litter,
    record_oddly,
    train_and_save,
    train_save_and_change,
    train_save_and_publish,
    train_save_and_rewrite,
)
from transformers.optimization import Adafactor

from ucp_deepspeed.testing.ranks import RankPool, fp16_on_cpu
from ucp_deepspeed.testing.runs import Run, build_engine, build_evaluator, loss_of, train_step

Ranks = Callable[[int], RankPool]

BLOCK = {"enabled": True, "load": "auto"}


def take_two_steps(engine: Any, run: Run) -> list[float]:
    """The losses of the next two steps."""
    return [train_step(engine, run, SAVED_STEPS + step) for step in (1, 2)]


def save_at_once(engine: Any, run: Run, folder: str) -> None:
    """The source of an engine that can't step."""
    engine.save_checkpoint(folder, client_state={"epoch": 7})


def look(engine: Any, run: Run) -> list[float]:
    """The loss of a batch that is in no training, without a step."""
    return [loss_of(engine, run)]


def freeze(engine: Any) -> Any:
    """Switch off what staged unfreezing does; the optimizer keeps the parameters and their states."""
    for name, param in engine.module.named_parameters():
        param.requires_grad_(not name.startswith("linear_in"))
    return engine


def build_frozen(run: Run) -> Any:
    """An engine in which a layer is switched off after it was built."""
    return freeze(build_engine(run))


def train_freeze_and_save(engine: Any, run: Run, folder: str) -> None:
    """A layer is trained for a step, and then isn't."""
    train_step(engine, run, 1)
    train_step(freeze(engine), run, SAVED_STEPS)
    engine.save_checkpoint(folder, client_state={"epoch": 7})


def unfreeze_and_take_two_steps(engine: Any, run: Run) -> list[float]:
    """One step as it is, and one with everything trained."""
    losses = [train_step(engine, run, SAVED_STEPS + 1)]
    for param in engine.module.parameters():
        param.requires_grad_(True)
    return [*losses, train_step(engine, run, SAVED_STEPS + 2)]


def save_what_a_load_returned(engine: Any, run: Run, folder: str) -> None:
    """As scripts do that keep one state for the whole run: a load returns entries of the engine's own too."""
    train_and_save(engine, run, f"{folder}/first")
    path, state = engine.load_checkpoint(f"{folder}/first")
    assert path is not None and "ds_config" in state and "global_samples" in state
    del state["checkpoint_parallel_dimensions"]  # which DeepSpeed refuses
    engine.save_checkpoint(folder, client_state=state)


class Settings(dict[str, Any]):
    """A mapping of a class of its own, as configuration libraries have them."""


def save_with_all_kinds_of_values(engine: Any, run: Run, folder: str) -> None:
    """Some that nobody reads without running code of their classes, and some for which torch's safe reader refuses the file."""
    train_step(engine, run, 1)
    train_step(engine, run, SAVED_STEPS)
    foreign = {"settings": Settings(a=1), "function": partial(print, end=""), "zone": ZoneInfo("UTC")}
    plain = {
        "rate": Decimal("0.1"),
        "last": deque([1, 2], maxlen=2),
        "seen": defaultdict(list, a=[1]),
        "slice": slice(3),
    }
    engine.save_checkpoint(folder, client_state={"epoch": 7, **foreign, **plain})


@dataclass(frozen=True)
class Case:
    """A save and a load of which DeepSpeed is capable.

    Attributes:
        name: of the test.
        source: the run that saves. Its ``universal`` doesn't count: it is saved without the block, and with it.
        target: the run that loads, if another.
        ranks: number of ranks.
        arguments: of ``engine.load_checkpoint``.
        make: builds the engine that saves.
        save: trains it and saves.
        build: builds the engine that loads.
        go_on: what is done after the load; returns losses, or logits.
        block: of the loads that aren't DeepSpeed's alone.
        restored: ``all`` if everything must be as DeepSpeed restores it, ``weights`` if only weights and buffers must:
            where DeepSpeed leaves the optimizer's masters as they were (and the next step undoes the load).
    """

    name: str
    source: Run
    target: Run | None = None
    ranks: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Run], Any] = build_engine
    save: Callable[[Any, Run, str], None] = train_and_save
    build: Callable[[Run], Any] = build_engine
    go_on: Callable[[Any, Run], list[float]] = take_two_steps
    block: Mapping[str, Any] = field(default_factory=lambda: dict(BLOCK))
    restored: Literal["all", "weights"] = "all"


CASES = [
    *(
        Case(
            f"client state of all kinds, zero-{stage}",
            Run("mlp", zero={"stage": stage}),
            save=save_with_all_kinds_of_values,
        )
        for stage in (0, 3)
    ),
    Case(  # whose step depends on what else a stage holds, so that its copies of a tied weight differ
        "tied weights that drift apart",
        Run("tied", pp=2, optimizer=(odd_optimizers.NormPerTensor, {"lr": 1e-2})),
        ranks=2,
    ),
    *(
        Case(f"zero-{stage} {precision}", Run("mlp", zero={"stage": stage}, precision=precision), ranks=2)
        for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "fp16"), (2, "bf16"), (3, "fp32"))
    ),
    *(
        Case(f"{run.model} zero-{run.zero['stage']} {run.precision} {why}", run, target, ranks=2, arguments=arguments)
        for run, target, arguments, why in (
            (Run("mlp", zero={"stage": 3}), None, {"load_module_strict": False}, "not strict"),
            (
                Run("mlp"),
                Run("mlp", zero={"stage": 2}, seed=1),
                {"load_module_only": True},
                "weights into another stage",
            ),
            (
                Run("mlp"),
                Run("mlp", frozen=("gain",), seed=1),
                {"load_optimizer_states": False},
                "frozen now",
            ),
            (Run("mlp", zero={"stage": 1, "elastic_checkpoint": True}, fused=True), None, {}, "elastic"),
            (Run("mlp", zero={"stage": 3}, size={"remembers": True}), None, {}, "extra states"),
            (Run("mlp", outside=("gain",)), None, {}, "not all in the optimizer"),
            (Run("moe", groups="decay"), None, {}, "experts"),
            (
                Run("moe", size={"ep": (2, 2)}, zero={"stage": 0}, optimizer=("Adafactor", {"lr": 1e-3})),
                None,
                {},
                "experts with factored states",
            ),
            (Run("gpt", pp=2, precision="bf16"), None, {}, "pipeline"),
            (Run("gpt", pp=2, zero={"stage": 0}), None, {"load_module_only": True}, "pipeline's weights"),
            (Run("llama", tp=2), None, {}, "tensor-parallel"),
        )
    ),
    *(
        Case(
            f"zero-{stage} {precision} layer switched off {when}",
            Run("mlp", zero={"stage": stage}, precision=precision),
            ranks=2,
            save=train_and_save if when == "after" else train_freeze_and_save,
            build=build_engine if when == "before" else build_frozen,
            go_on=unfreeze_and_take_two_steps,
        )
        for stage, precision, when in (
            (0, "fp32", "before"),
            (0, "fp32", "after"),
            (0, "bf16", "on both sides"),
            (1, "fp32", "after"),
            (2, "fp32", "before"),
            (3, "fp32", "on both sides"),
        )
    ),
    *(
        Case(
            f"{getattr(kind, '__name__', kind)} zero-{stage}",
            Run("mlp", zero={"stage": stage}, optimizer=(kind, options)),
            ranks=2,
        )
        for kind, stage, options in (
            ("Adafactor", 0, {"lr": 1e-3}),
            (Adafactor, 0, {"lr": 1e-3, "relative_step": False}),
            (Adafactor, 1, {"lr": 1e-3, "relative_step": False}),
            (odd_optimizers.OneElement, 0, {}),
            (odd_optimizers.OneElement, 1, {}),
            (odd_optimizers.NormPerTensor, 2, {}),
            (odd_optimizers.Prodigy, 1, {}),
            (odd_optimizers.Bookkeeper, 1, {}),
            (odd_optimizers.Counter, 0, {}),
            (odd_optimizers.Soap, 0, {}),
            (odd_optimizers.Soap, 1, {}),
            (odd_optimizers.LateAverage, 1, {}),
            (odd_optimizers.LateAverage, 3, {}),
            (fused_optimizers.apex_adam, 3, {}),
        )
    ),
    *(
        Case(
            f"zero-{stage} in torch's older format",
            Run("mlp", zero={"stage": stage}, config={"checkpoint": {"checkpoint_serialization": False}}),
            ranks=2,
        )
        for stage in (0, 2, 3)
    ),
    *(
        Case(
            f"experts under zero-{stage}, whose names were in no file",
            Run("moe", size={"ep": (2, 2)}, groups="decay", zero={"stage": stage}),
            ranks=2,
            save=partial(train_save_and_rewrite, age),
        )
        for stage in (1, 2)
    ),
    *(
        Case(
            f"zero-{stage} {why}",
            Run("mlp", zero={"stage": stage}),
            ranks=2,
            save=partial(train_save_and_change, change),
        )
        for stage, change, why in (
            (0, compress, "files compressed anew"),
            (2, compress, "files compressed anew"),
            (1, litter, "other files beside them"),
            (3, litter, "other files beside them"),
        )
    ),
    Case(
        "OneElement as before DeepSpeed 0.19.8",
        Run("mlp", zero={"stage": 1}, optimizer=(odd_optimizers.OneElement, {})),
        ranks=2,
        save=partial(train_save_and_rewrite, forget_paddings),
    ),
    Case(
        "a record that can't be read",
        Run("mlp", zero={"stage": 2}),
        save=partial(train_save_and_rewrite, record_oddly),
    ),
    Case("what a load returned is saved again", Run("mlp", zero={"stage": 2}), ranks=2, save=save_what_a_load_returned),
    *(
        Case(
            f"zero-{stage} {precision} without the optimizer's files, {next(iter(arguments))}",
            Run("mlp", zero={"stage": stage}, precision=precision),
            Run("mlp", zero={"stage": stage}, precision=precision, seed=1),
            ranks=2,
            arguments=arguments,
            save=train_save_and_publish,
        )
        for stage, precision, arguments in (
            (1, "fp32", {"load_module_only": True}),
            (2, "bf16", {"load_optimizer_states": False}),
        )
    ),
    *(
        Case(
            f"zero-{stage} into evaluation {precision}",
            Run("mlp", zero={"stage": stage}, precision=precision),
            Run("mlp", zero={"stage": 0}, precision=precision, seed=1),
            arguments=arguments,
            build=build_evaluator,
            go_on=look,
        )
        for stage, precision, arguments in (
            (0, "fp32", {}),
            (2, "fp32", {"load_module_only": True}),
            (1, "bf16", {"load_optimizer_states": False}),
        )
    ),
    Case(
        "saved without an optimizer",
        Run("mlp", zero={"stage": 0}),
        Run("mlp", zero={"stage": 0}, seed=1),
        make=build_evaluator,
        save=save_at_once,
        build=build_evaluator,
        go_on=look,
    ),
    *(
        Case(
            f"zero-{stage} begun from a model with a layer {'more' if more else 'fewer'}",
            Run("mlp", zero={"stage": stage}, size={"adapter": more}),
            Run("mlp", zero={"stage": stage}, size={"adapter": not more}, seed=1),
            ranks=2,
            arguments={"load_module_strict": False, "load_optimizer_states": False},
        )
        for stage, more in ((0, True), (1, False), (2, True))
    ),
]
"""Each of them must resume without the block."""

LEFT_ALONE = [
    Case("experts of several expert-parallel sizes", Run("moe", size={"ep": (1, 2)}, zero={"stage": 0}), ranks=2),
    Case("states on NVMe", nvme_run(), make=build_on_nvme, build=build_on_nvme),
    Case("parameters on NVMe", nvme_parameters_run(), make=build_on_nvme, build=build_on_nvme),
    Case(
        "an optimizer of no known class",
        Run("mlp", zero={"stage": 0}, optimizer=(left_alone.Wrapped, {"lr": 1e-3})),
        ranks=2,
    ),
    Case("offload ratio below 1", left_alone.twin_flow_run(), ranks=2),
    Case("ZenFlow zero-2", left_alone.zenflow_run(2), ranks=2),
    Case("ZenFlow zero-3, not trained", left_alone.zenflow_run(3), ranks=2, save=save_at_once, go_on=look),
    *(
        Case(
            f"experts in a pipeline, zero-{stage} pp {pp}",
            left_alone.experts_in_a_pipeline(stage, pp, ep),
            ranks=2,
            make=left_alone.build_pipeline_with_experts,
            build=left_alone.build_pipeline_with_experts,
        )
        for stage, pp, ep in ((0, 2, 1), (1, 2, 1), (1, 1, 2))
    ),
    *(
        Case(
            f"AutoEP beside DeepSpeed's own experts, zero-{stage}",
            left_alone.both_kinds_of_experts(stage),
            ranks=2,
            make=left_alone.build_with_both_kinds_of_experts,
            build=left_alone.build_with_both_kinds_of_experts,
        )
        for stage in (0, 2)
    ),
]
"""Engines that this release doesn't handle: their saves and loads are DeepSpeed's own."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_deepspeed_resumes_the_block_resumes(case: Case, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(case.ranks).run(compare_with_stock, case, str(tmp_path)) == [[]] * case.ranks


@pytest.mark.parametrize("case", LEFT_ALONE, ids=lambda case: case.name)
def test_engines_that_are_left_to_deepspeed(case: Case, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(case.ranks).run(compare_with_stock, case, str(tmp_path)) == [[]] * case.ranks
    assert list(tmp_path.rglob("ucp_manifest.json")) == []


def compare_with_stock(case: Case, folder: str) -> list[str]:
    """On a rank: in what loads with the block differ from one without it; also of what was saved with the block."""
    with fp16_on_cpu():
        _save(case, None, f"{folder}/stock")
        _save(case, case.block, f"{folder}/block")
        expected = _resume(case, None, f"{folder}/stock")
        found = [
            f"{saved}: {line}"
            for saved in ("stock", "block")
            for line in _differences(expected, _resume(case, case.block, f"{folder}/{saved}"), case.restored == "all")
        ]
    return found


def _save(case: Case, block: Mapping[str, Any] | None, folder: str) -> None:
    run = replace(case.source, universal=block)
    engine = case.make(run)
    case.save(engine, run, folder)
    _end(engine)


@dataclass(frozen=True)
class _Resumed:
    """The state of an engine after a load, and the results of its next steps."""

    loaded: dict[str, Any]
    weights: dict[str, Any]
    optimizer: dict[str, Any]
    outcome: list[float]
    trained: dict[str, Any]


def _resume(case: Case, block: Mapping[str, Any] | None, folder: str) -> _Resumed:
    run = replace(case.target or case.source, universal=block)
    engine = case.build(run)
    path, state = engine.load_checkpoint(folder, **case.arguments)
    assert path is not None, f"{case.name}: not loaded"
    counters = {key: getattr(engine, key) for key in ("global_steps", "global_samples", "skipped_steps")}
    loaded = {"path": Path(path).name, "epoch": state.get("epoch"), **counters}
    weights, optimizer = _weights(engine), _optimizer(engine)
    outcome = case.go_on(engine, run)
    resumed = _Resumed(loaded, weights, optimizer, outcome, _weights(engine))
    _end(engine)
    return resumed


def _end(engine: Any) -> None:
    engine.destroy()
    gc.collect()
    dist.barrier()


def _weights(engine: Any) -> dict[str, Any]:
    """Whole parameters and persistent buffers of this rank's modules."""
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        found = {name: each.detach().clone() for name, each in named.items()}
    buffers = engine.module.named_buffers()
    return found | {name: each.clone() for name, each in buffers if name in engine._get_buffer_names()}


def _optimizer(engine: Any) -> dict[str, Any]:
    """Masters, states and hyper-parameters; nothing of an engine that only evaluates."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = list(enumerate(base.param_groups)) if isinstance(base, torch.optim.Optimizer) else []
    found = {
        f"group {index} {key}": value for index, group in groups for key, value in group.items() if key != "params"
    }
    if groups and engine.zero_optimization_stage() == 3:
        return found | _whole_states(engine, base)
    for index, group in groups:
        for place, master in enumerate(group["params"]):
            held = {"master": master, **base.state.get(master, {})}
            for key, value in held.items():
                parts = value if isinstance(value, list) else [value]
                found |= {
                    f"group {index} {key} {place} {n}": torch.as_tensor(each).clone() for n, each in enumerate(parts)
                }
    return found


def _whole_states(engine: Any, base: Any) -> dict[str, Any]:
    """Return the states of ZeRO-3 without padding, which holds whatever was in memory."""
    states = list(base.state.values())
    numbers = {key: value for key, value in states[0].items() if torch.as_tensor(value).numel() == 1} if states else {}
    found = {f"{key} {place}": state[key] for place, state in enumerate(states) for key in numbers}
    for name, param in engine.module.named_parameters():
        if hasattr(param, "_z3_optimizer"):
            found[f"master of {name}"] = safe_get_full_fp32_param(param)
            for key in states[0].keys() - numbers.keys() if states else ():
                with suppress(KeyError):  # where a part is offloaded to the host, DeepSpeed doesn't find the rest
                    found[f"{key} of {name}"] = safe_get_full_optimizer_state(param, key)
    return found


def _differences(expected: _Resumed, found: _Resumed, whole: bool) -> list[str]:
    pairs = [("loaded", expected.loaded, found.loaded), ("weights", expected.weights, found.weights)]
    if whole:
        outcomes = {"losses": expected.outcome}, {"losses": found.outcome}
        pairs += [("outcome", *outcomes), ("optimizer", expected.optimizer, found.optimizer)]
        pairs += [("weights after the next steps", expected.trained, found.trained)]
    return [
        f"{what}: {key} is {there.get(key)}, and {here.get(key)} with DeepSpeed alone"
        for what, here, there in pairs
        for key in here.keys() | there.keys()
        if key not in here or key not in there or not _same(here[key], there[key])
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one.double(), other.double())
    return bool(one == other)
