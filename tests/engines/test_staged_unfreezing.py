"""``requires_grad`` switched off and on while a run goes on: what the optimizer has is trained, whatever the flag says.

The same topology, also without the package, is among the cases of ``test_never_worse.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from checkpoints import differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

Ranks = Callable[[int], RankPool]

LAYER = ("linear_in.weight", "linear_in.bias")


def switch_off(engine: Any) -> None:
    for name, param in engine.module.named_parameters():
        param.requires_grad_(name not in LAYER)


def saved(run: Run, folder: str) -> None:
    """On a rank: a layer is trained for a step, and then isn't."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    switch_off(engine)
    train_step(engine, run, 2)
    engine.save_checkpoint(folder)
    engine.destroy()


def again(run: Run, folder: str, off: bool, to: str) -> tuple[Any, ...]:
    """On a rank: load, and save at once; what wasn't restored."""
    engine = build_engine(run)
    if off:
        switch_off(engine)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(to)
    report = engine.universal_checkpoint_report
    for param in engine.module.parameters():
        param.requires_grad_(True)
    train_step(engine, run, 3)
    engine.destroy()
    return (*report.initialised, *report.dropped)


@pytest.mark.parametrize(
    ("source", "target", "off"),
    [(0, 0, True), (1, 0, True), (1, 0, False), (2, 3, True), (3, 2, False), (3, 3, True)],
)
def test_states_go_on(source: int, target: int, off: bool, ranks: Ranks, tmp_path: Path) -> None:
    always = {"enabled": True, "load": "always"}
    ranks(2).run(saved, Run("mlp", zero={"stage": source}), str(tmp_path / "a"))
    run = Run("mlp", zero={"stage": target}, universal=always, seed=1)
    assert ranks(1).run(again, run, str(tmp_path / "a"), off, str(tmp_path / "b")) == [()]
    assert differences(tmp_path / "a", tmp_path / "b") == []
    parameters = open_checkpoint(tmp_path / "a").parameters
    assert {parameters[name].kind for name in LAYER} == {"trainable"}
    assert all("exp_avg" in parameters[name].states for name in LAYER)


def in_two_groups(run: Run, folder: str, to: str) -> None:
    """On a rank: the layer has a parameter group of its own, and so a buffer of its own."""
    engine = build_apart(run)
    engine.load_checkpoint(folder)
    engine.save_checkpoint(to)
    engine.destroy()


def build_apart(run: Run) -> Any:
    model = build_mlp(seed=run.seed)
    named = dict(model.named_parameters())
    layer = [param for name, param in named.items() if name in LAYER]
    rest = [param for name, param in named.items() if name not in LAYER]
    config = dict(engine_config(run), scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}})
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=[{"params": rest}, {"params": layer}]
    )
    return engine


def test_steps_that_differ_need_buffers_of_their_own(ranks: Ranks, tmp_path: Path) -> None:
    """torch's optimizers count steps for each parameter at stage 0. The refusal says what to do; nothing is lost then."""
    ranks(2).run(saved, Run("mlp", zero={"stage": 0}), str(tmp_path / "a"))
    run = Run("mlp", zero={"stage": 1}, seed=1)
    with pytest.raises(RankError, match=r"give them parameter groups of their own$"):
        ranks(1).run(again, run, str(tmp_path / "a"), False, str(tmp_path / "b"))
    ranks(1).run(in_two_groups, run, str(tmp_path / "a"), str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_a_pipeline_whose_manifest_goes_by_the_flag(ranks: Ranks, tmp_path: Path) -> None:
    """As earlier releases wrote it."""
    run = Run("gpt", pp=2, zero={"stage": 1})
    ranks(2).run(saved_without_norms, run, str(tmp_path / "a"))
    manifest = next((tmp_path / "a").rglob(MANIFEST_NAME))
    text = manifest.read_text()
    found = open_checkpoint(tmp_path / "a").parameters
    norms = [name for name in found if "layernorm" in name]
    assert norms and all(found[name].kind == "trainable" for name in norms)
    for name in norms:
        before, after = text.split(f'"{name}": {{\n', 1)
        text = f'{before}"{name}": {{\n' + after.replace('"kind": "trainable"', '"kind": "frozen"', 1)
    assert text.count('"kind": "frozen"') == len(norms)
    manifest.write_text(text.replace('"sum": ', '"no sum": '))
    ranks(1).run(again, Run("gpt", zero={"stage": 1}, seed=1), str(tmp_path / "a"), False, str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def saved_without_norms(run: Run, folder: str) -> None:
    """On a rank: all is trained for a step, and then norms aren't."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    for name, param in engine.module.named_parameters():
        param.requires_grad_("layernorm" not in name)
    train_step(engine, run, 2)
    engine.save_checkpoint(folder)
    engine.destroy()


def build_idle(run: Run) -> Any:
    """An optimizer that has everything, of which a layer needs no gradient from the beginning."""
    model = build_mlp(seed=run.seed)
    for name, param in model.named_parameters():
        param.requires_grad_(name not in LAYER)
    engine, *_ = deepspeed.initialize(model=model, config=engine_config(run), model_parameters=list(model.parameters()))
    return engine


def engine_config(run: Run) -> dict[str, Any]:
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 4e-3, "torch_adam": True}},
        "zero_optimization": dict(run.zero),
        "universal_checkpoint": dict(run.universal or {}),
    }


def moved(run: Run, target: Run, folder: str, off: bool) -> tuple[Any, ...]:
    """On a rank: save what never needed a gradient, and load it, with the layer still off or on; steps after that."""
    engine = build_idle(run)
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = build_idle(target)
    for param in engine.module.parameters() if not off else ():
        param.requires_grad_(True)
    engine.load_checkpoint(folder)
    train_step(engine, target, 2)
    report = getattr(engine, "universal_checkpoint_report", None)
    engine.destroy()
    return (*report.initialised, *report.dropped) if report else ("native",)


@pytest.mark.parametrize(
    ("source", "target", "off"), [(0, 1, True), (1, 0, True), (3, 0, True), (0, 0, True), (0, 0, False)]
)
def test_what_never_needed_a_gradient_has_nothing_to_lose(
    source: int, target: int, off: bool, ranks: Ranks, tmp_path: Path
) -> None:
    """Stage 0 has it in the optimizer, and the others don't."""
    first, second = (Run("mlp", zero={"stage": stage}) for stage in (source, target))
    assert ranks(1).run(moved, first, second, str(tmp_path), off) == [() if source != target else ("native",)]


def frozen_from_the_start(run: Run, folder: str) -> None:
    engine = build_idle(run)
    engine.load_checkpoint(folder)
    engine.destroy()


def test_states_that_would_be_lost_are_not(ranks: Ranks, tmp_path: Path) -> None:
    """The refusal says how to keep them; that it works is tested above."""
    ranks(2).run(saved, Run("mlp", zero={"stage": 1}), str(tmp_path))
    with pytest.raises(RankError) as caught:
        ranks(1).run(frozen_from_the_start, Run("mlp", zero={"stage": 2}), str(tmp_path))
    assert isinstance(caught.value.original, MismatchError)
    assert (
        "build the engine with requires_grad on and switch it off afterwards, or add its parameter group first"
        in str(caught.value.original)
    )
