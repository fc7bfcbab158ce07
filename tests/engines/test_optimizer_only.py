"""Parameters that the optimizer has and no module, as a learned weight of a loss. DeepSpeed takes them without ZeRO alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import differences
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine.support import REASON
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool, fp16_on_cpu, reset_parallel_state
from ucp_deepspeed.testing.runs import DTYPES, Run, _build_model, _config, _loss, batch_of, train
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

FORMS: dict[str, Run] = {
    "plain": Run("mlp", zero={"stage": 0}),
    "unfused": Run("mlp", zero={"stage": 0}, precision="bf16"),
    "fused": Run("mlp", zero={"stage": 0}, precision="bf16", fused=True),
}
NAME = "optimizer_only.1.0"


def weigh(run: Run, steps: int, load: str | None = None, save: str | None = None) -> tuple[list[float], float, Any]:
    """Train with a learned weight; what it is then, the last loss, and the report."""
    with fp16_on_cpu():
        reset_parallel_state()
        model, mpu = _build_model(run)
        device = get_accelerator().current_device_name()
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=DTYPES[run.precision], device=device))
        groups = [{"params": list(model.parameters())}, {"params": [weight], "lr": 0.1}]
        engine, *_ = deepspeed.initialize(model=model, config=_config(run), mpu=mpu, model_parameters=groups)
        if load:
            _, state = engine.load_checkpoint(load)
            assert "ucp_optimizer_only" not in state
        loss = torch.zeros(())
        for step in range(engine.global_steps, steps):
            share = batch_of(run, step + 1).chunk(dist.get_world_size())[dist.get_rank()]
            loss = _loss(engine, run, share) * 0.1 + (weight.float() ** 2).sum()
            engine.backward(loss)
            engine.step()
            weight.grad = None  # DeepSpeed clears those of modules
        if save:
            engine.save_checkpoint(save, client_state={"mine": 1})
        report = getattr(engine, "universal_checkpoint_report", None)
        return weight.detach().float().tolist(), float(loss), report


@pytest.mark.parametrize("form", FORMS)
def test_they_are_restored_under_a_name_of_their_own(form: str, ranks: Ranks, tmp_path: Path) -> None:
    run = FORMS[form]
    source, _, _ = ranks(2).run(weigh, run, 3, save=str(tmp_path / "0"))[0]
    assert source != [1.0, 2.0, 3.0]
    further, loss, _ = ranks(2).run(weigh, run, 4)[0]
    held = open_checkpoint(tmp_path / "0").parameters[NAME]
    assert (held.kind, held.local_shapes) == ("trainable", ((3,),))
    assert held.states.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
    for world_size in (2, 1):
        again = tmp_path / str(world_size)
        found, _, report = ranks(world_size).run(weigh, run, 3, load=str(tmp_path / "0"), save=str(again))[0]
        assert found == source and (report is None) == (world_size == 2)
        assert differences(tmp_path / "0", again) == []
    found, resumed, _ = ranks(2).run(weigh, run, 4, load=str(tmp_path / "0"))[0]
    assert (found, resumed) == (further, loss)
    convert(UniversalView.of(open_checkpoint(tmp_path / "0")), tmp_path / "u")
    assert ranks(1).run(weigh, run, 3, load=str(tmp_path / "u"))[0][0] == source


def test_from_form_to_form_and_where_there_is_none(ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO has no place for it: DeepSpeed fails when the engine is built. A load without it names it."""
    weigh_at, plain = FORMS["unfused"], FORMS["plain"]
    source = ranks(1).run(weigh, plain, 3, save=str(tmp_path / "0"))[0][0]
    found = ranks(1).run(weigh, weigh_at, 3, load=str(tmp_path / "0"))[0][0]
    assert found == torch.tensor(source).bfloat16().tolist()
    with pytest.raises((RankError, MismatchError), match=f"{NAME}: extra in the checkpoint"):
        ranks(1).run(train, Run("mlp", zero={"stage": 1}, groups="one"), 3, load=str(tmp_path / "0"))


def hold(run: Run, number: float, load: str | None = None, save: str | None = None) -> float:
    """On each pipeline stage an optimizer has one that begins at ``number`` more than the stage's."""
    reset_parallel_state()
    model, mpu = _build_model(run)
    rank = dist.get_rank()
    weight = torch.nn.Parameter(torch.tensor([number + rank], device=get_accelerator().current_device_name()))
    groups = [{"params": [*model.parameters(), weight]}]
    engine, *_ = deepspeed.initialize(model=model, config=_config(run), mpu=mpu, model_parameters=groups)
    if load:
        engine.load_checkpoint(load)
    if save:
        engine.save_checkpoint(save)
    return float(weight)


@pytest.mark.parametrize("load", ["auto", "always"])
def test_each_stage_of_a_pipeline_has_its_own(load: str, ranks: Ranks, tmp_path: Path) -> None:
    run = Run("gpt", pp=2, zero={"stage": 0}, universal={"enabled": True, "load": load})
    ranks(2).run(hold, run, 5.0, save=str(tmp_path))
    assert ranks(2).run(hold, run, 0.0, load=str(tmp_path)) == [5.0, 6.0]


def own_another_models_parameters() -> tuple[str, bool]:
    """At stage 3 DeepSpeed builds such an engine, and trains with it."""
    reset_parallel_state()
    own, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "universal_checkpoint": {"enabled": True},
    }
    deepspeed.initialize(model=own, optimizer=torch.optim.AdamW(own.parameters()), config=config)
    engine, *_ = deepspeed.initialize(model=other, optimizer=torch.optim.AdamW(own.parameters()), config=config)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    return str(getattr(engine, REASON)), engine.global_steps == 1


def test_an_optimizer_of_another_models_parameters(ranks: Ranks) -> None:
    for reason, stepped in ranks(1).run(own_another_models_parameters):
        assert "2 parameters of the optimizer ((4, 4), (4,)) are in no module" in reason and stepped
        assert reason.endswith("give each engine an optimizer over its own model's parameters")
