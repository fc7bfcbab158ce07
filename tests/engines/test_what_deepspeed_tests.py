"""The cases by which DeepSpeed tests its own checkpoints, with the block on: what it loads, ``auto`` and ``always`` load too,
bit for bit.

Its tests are in ``tests/unit/checkpoint`` of its repository. Some of them load a checkpoint in its universal format; these
load the native files here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import STEP, differences
from deepspeed import comm as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from test_never_worse import Case, compare_with_stock

from ucp_deepspeed.errors import SaveError
from ucp_deepspeed.testing.ranks import RankError, RankPool, fp16_on_cpu
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]

NO_STATES = {"load_optimizer_states": False}
ONLY_SCHEDULER = {"load_optimizer_states": False, "load_lr_scheduler_states": True}
NO_SCHEDULER = {"load_lr_scheduler_states": False}
MODULE_ONLY = {"load_module_only": True}
ELASTIC = {"elastic_checkpoint": True}
FROZEN = ("linear_in.weight", "norm.bias")


def mlp(stage: int, **changes: Any) -> Run:
    """A run of the plain model; ``zero`` are further settings of ZeRO."""
    return Run(
        "mlp", zero={"stage": stage, **changes.pop("zero", {})}, precision=changes.pop("precision", "bf16"), **changes
    )


class Hybrid(torch.optim.Optimizer):
    """Keeps one element-wise state, and a count that is a number."""

    def __init__(self, params: Any, lr: float = 2e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Signs of a running sum."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state["seen"] = state.get("seen", 0) + 1
                state["total"] = state.get("total", torch.zeros_like(param)) + param.grad
                param.data.add_(state["total"].sign(), alpha=-group["lr"] / state["seen"])


def save_at_once(engine: Any, run: Run, folder: str) -> None:
    """Before any step."""
    engine.save_checkpoint(folder)


def save_amid_accumulation(engine: Any, run: Run, folder: str) -> None:
    """After the first of two micro batches."""
    train_step(engine, run, 1)
    assert engine.micro_steps % engine.gradient_accumulation_steps() == 1
    engine.save_checkpoint(folder)


def save_without_frozen(engine: Any, run: Run, folder: str) -> None:
    """Leave out what isn't trained."""
    train_step(engine, run, 1)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)


def build_under_zero_init(run: Run) -> Any:
    """The engine of a model whose parameters are cut as they are made."""
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 8, "bf16": {"enabled": True}}):
        torch.manual_seed(run.seed)
        model = torch.nn.Sequential(torch.nn.Embedding(48, 12), torch.nn.Linear(12, 48))
    config = {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "zero_optimization": dict(run.zero),
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        **({"universal_checkpoint": dict(run.universal)} if run.universal else {}),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def step_by_squares(engine: Any, run: Run) -> list[float]:
    """Two steps on the mean square of a model that maps tokens to values."""
    losses = []
    for step in range(2):
        loss = engine(torch.arange(4, device=engine.device) + step).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def save_after_squares(engine: Any, run: Run, folder: str) -> None:
    """Two such steps, and a save."""
    step_by_squares(engine, run)
    engine.save_checkpoint(folder)


CASES = [
    *(Case(f"zero-{stage} all", mlp(stage), mlp(stage, seed=5), 2) for stage in (0, 1, 2, 3)),
    Case("zero-1 fp16 fused", mlp(1, precision="fp16", fused=True), mlp(1, precision="fp16", fused=True, seed=5), 2),
    *(
        Case(f"zero-{stage} no states", mlp(stage), mlp(stage, seed=5), 2, NO_STATES, restored="weights")
        for stage in (1, 2, 3)
    ),
    *(
        Case(f"zero-{stage} module only", mlp(stage), mlp(stage, seed=5), 2, MODULE_ONLY, restored="weights")
        for stage in (1, 2)
    ),
    *(
        Case(f"zero-{stage} schedule alone", mlp(stage), mlp(stage, seed=5), 2, ONLY_SCHEDULER, restored="weights")
        for stage in (1, 2)
    ),
    *(Case(f"zero-{stage} no schedule", mlp(stage), mlp(stage, seed=5), 2, NO_SCHEDULER) for stage in (0, 1, 3)),
    *(Case(f"zero-{stage} a number and a tensor", mlp(stage, optimizer=(Hybrid, {})), ranks=2) for stage in (1, 2)),
    *(Case(f"zero-{stage} at once", mlp(stage), ranks=2, save=save_at_once) for stage in (0, 1, 2, 3)),
    *(
        Case(
            f"zero-{stage} amid accumulation",
            mlp(stage, config={"gradient_accumulation_steps": 2}),
            ranks=2,
            save=save_amid_accumulation,
        )
        for stage in (1, 3)
    ),
    *(
        Case(f"zero-{stage} frozen", mlp(stage, frozen=FROZEN), mlp(stage, frozen=FROZEN, seed=5), 2)
        for stage in (1, 2, 3)
    ),
    *(
        Case(
            f"zero-{stage} frozen {name}",
            mlp(stage, frozen=FROZEN),
            mlp(stage, frozen=FROZEN, seed=5),
            2,
            arguments,
            restored="weights",
        )
        for stage in (1, 2)
        for name, arguments in (("no states", NO_STATES), ("module only", MODULE_ONLY))
    ),
    Case(
        "frozen left out",
        mlp(2, frozen=FROZEN),
        ranks=2,
        arguments={"load_module_strict": False},
        save=save_without_frozen,
    ),
    Case("elastic False True", mlp(2, fused=True), mlp(2, zero={"elastic_checkpoint": True}, fused=True), 2),
    *(
        Case(
            f"cut as made{name}",
            mlp(3, zero=zero),
            mlp(3, zero=zero, seed=5),
            2,
            make=build_under_zero_init,
            save=save_after_squares,
            build=build_under_zero_init,
            go_on=step_by_squares,
        )
        for name, zero in (("", {}), (", read as a pipeline", {"pipeline_loading_checkpoint": True}))
    ),
    Case("pipeline zero-1", Run("gpt", pp=2, zero={"stage": 1}), ranks=2),
    Case("experts", Run("moe", zero={"stage": 0}, precision="fp16"), ranks=4),
    Case("experts zero-2", Run("moe", zero={"stage": 2}, precision="fp16"), ranks=4),
    Case("experts zero-2 no states", Run("moe", zero={"stage": 2}), ranks=4, arguments=NO_STATES, restored="weights"),
]


@pytest.mark.parametrize("load", ["auto", "always"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loads(case: Case, load: str, ranks: Ranks, tmp_path: Path) -> None:
    case = replace(case, block={"enabled": True, "load": load})
    assert ranks(case.ranks).run(compare_with_stock, case, str(tmp_path)) == [[]] * case.ranks


LEFT_ALONE = [
    Case("pipeline zero-0", Run("gpt", pp=2, zero={"stage": 0}), ranks=2),
    *(
        Case(
            f"elastic True {again}",
            mlp(2, zero=ELASTIC, fused=True),
            mlp(2, zero={"elastic_checkpoint": again}, fused=True),
            2,
        )
        for again in (True, False)
    ),
]
"""With ``auto`` alone: without a manifest the first's optimizer state names no parameters; and after a load of elastic files,
which hold no hyper-parameters, DeepSpeed takes its first step at the rate at which the schedule begins."""


@pytest.mark.parametrize("case", LEFT_ALONE, ids=lambda case: case.name)
def test_loads_that_are_left_to_deepspeed(case: Case, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(compare_with_stock, case, str(tmp_path)) == [[], []]


@pytest.mark.parametrize(
    ("precision", "stage", "sub_group_size", "optimizer"),
    [
        *(
            (precision, stage, None, ("Adam", {"lr": 0.1}))
            for precision in ("bf16", "fp16", "fp32")
            for stage in (1, 3)
        ),
        *(("bf16", stage, 100, None) for stage in (1, 3)),
    ],
)
def test_another_data_parallel_size(
    precision: Any, stage: int, sub_group_size: int | None, optimizer: Any, ranks: Ranks, tmp_path: Path
) -> None:
    """2 → 2 → 4 → 2 ranks straight from the native files, with the states and, in the end, without them."""
    zero = {} if sub_group_size is None else {"sub_group_size": sub_group_size}
    always = {"enabled": True, "load": "always"}
    run = mlp(stage, zero=zero, precision=precision, optimizer=optimizer, fused=optimizer is None, universal=always)
    client_state = {"universal_checkpoint_info": {}, "iteration": STEP}
    folders = [str(tmp_path / str(hop)) for hop in range(4)]
    ranks(2).run(train, run, STEP, save=folders[0], client_state=client_state)
    for hop, world_size in enumerate((2, 4, 2), start=1):
        there = {"load": folders[hop - 1], "save": folders[hop], "save_first": True}
        outcome = ranks(world_size).run(train, run, STEP + 1, client_state=client_state, **there)
        assert outcome[0].client_state["iteration"] == STEP
        assert differences(Path(folders[0]), Path(folders[hop])) == []
    weights = ranks(2).run(weights_of, run, folders[3], NO_STATES)
    assert weights == ranks(2).run(weights_of, run, folders[0], {})


def weights_of(run: Run, folder: str, options: Mapping[str, Any]) -> list[Any]:
    """On a rank: each whole weight after a load."""
    with fp16_on_cpu():
        engine = build_engine(replace(run, seed=9))
        engine.load_checkpoint(folder, **options)
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            held = [param.detach().float().tolist() for param in engine.module.parameters()]
        engine.destroy()
        return held


@pytest.mark.parametrize("elastic", [True, False])
def test_an_elastic_checkpoint_on_another_data_parallel_size(elastic: bool, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed raises ZeRORuntimeException. Elastic files hold no hyper-parameters."""
    run = mlp(2, zero={"elastic_checkpoint": elastic}, fused=True)
    ranks(4).run(train, run, STEP, save=str(tmp_path / "a"))
    plain = mlp(2, fused=True)
    ranks(2).run(train, plain, STEP + 1, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    found = differences(tmp_path / "a", tmp_path / "b")
    assert [line for line in found if not line.endswith(" only in B")] == []


class Tied(torch.nn.Module):
    """Three layers of which two have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0, self.layer1, self.layer2 = (torch.nn.Linear(size, size) for size in (4, 6, 6))
        self.layer1.weight = self.layer2.weight


def export_tied(folder: str, block: Mapping[str, Any]) -> bool:
    """On a rank: whether DeepSpeed's script for whole fp32 weights finds all of a tied model's."""
    model = Tied()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
        "universal_checkpoint": dict(block),
    }
    engine, *_ = deepspeed.initialize(config=config, model=model, optimizer=torch.optim.Adam(model.parameters()))
    engine.save_checkpoint(folder, tag="checkpoint")
    whole = get_fp32_state_dict_from_zero_checkpoint(folder, tag="checkpoint")
    again = Tied()
    again.load_state_dict(whole, strict=True)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    return all(torch.equal(one.cpu(), other) for one, other in pairs)


def test_tied_weights_are_exported(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2).run(export_tied, str(tmp_path), {"enabled": True}) == [True, True]


def save_under_own_tag(folder: str | None, validation: str) -> bool:
    """On a rank: whether a save is refused whose tag, or empty folder, isn't right."""
    engine = build_engine(mlp(1, config={"checkpoint": {"tag_validation": validation}}))
    try:
        engine.save_checkpoint(folder, tag=f"tag-{dist.get_rank()}")
    except (AssertionError, ValueError, SaveError):
        return True
    finally:
        engine.destroy()
    return False


@pytest.mark.parametrize("validation", ["FAIL", "WARN", "IGNORE"])
def test_tags_that_differ_from_rank_to_rank(validation: str, ranks: Ranks, tmp_path: Path) -> None:
    """Nobody could load what DeepSpeed alone would save after a warning."""
    assert ranks(2).run(save_under_own_tag, str(tmp_path), validation) == [True, True]


@pytest.mark.parametrize("folder", [None, ""])
def test_an_empty_folder_to_save_in(folder: str | None, ranks: Ranks) -> None:
    assert ranks(2).run(save_under_own_tag, folder, "IGNORE") == [True, True]


def test_an_unknown_tag_validation(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="Checkpoint config contains invalid tag_validation"):
        ranks(2).run(train, mlp(1, config={"checkpoint": {"tag_validation": "foo"}}), 1)


def test_no_latest(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing to load is no error."""
    assert ranks(1).run(train, mlp(1), 1, load=str(tmp_path))[0].load_path is None
