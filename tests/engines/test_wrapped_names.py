"""Models whose modules are wrapped, or were renamed by a library: the same parameters under other names."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import differences
from torch import nn

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, batch_of

Ranks = Callable[[int], RankPool]


class Outer(nn.Module):
    """A model inside another, under names of some modules; whatever is called goes to it."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        first, *rest = names
        self.add_module(first, Outer(model, *rest) if rest else model)
        self._first = first

    def forward(self, *tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.get_submodule(self._first)(*tokens)
        return found


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, as PEFT's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(values) + self.lora_B(self.lora_A(values))
        return out


def wrapped(how: str, seed: int) -> nn.Module:
    """The small model in one of its wrappers."""
    model: nn.Module = build_mlp(vocabulary=VOCABULARY, seed=seed, remembers=True)
    if how == "compiled":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if how == "compiled layers":
        for name in ("linear_in", "linear_out"):
            setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    if how == "adapted":
        model.linear_in = Adapted(model.linear_in)  # type: ignore[arg-type]
        return Outer(model, "base_model", "model")
    if how == "a layer renamed":
        model.linear_in = Outer(model.linear_in, "inner")  # type: ignore[assignment,arg-type]
    names = {"data parallel": ["module"], "renamed": ["model", "visual"], "renamed before": ["visual"]}
    return Outer(model, *names[how]) if how in names else model


def run(
    how: str,
    stage: int,
    save: str,
    load: str | None = None,
    steps: int = 0,
    universal: Mapping[str, Any] | None = None,
    seed: int = 1,
) -> Any:
    """Build, load, train and save; returns the report of the load."""
    reset_parallel_state()
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "universal_checkpoint": {"enabled": True, **(universal or {})},
    }
    model = wrapped(how, seed)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    if load is not None:
        engine.load_checkpoint(load)
    for step in range(steps):
        share = batch_of(Run(), step).chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
        engine.backward(engine(share[:, :-1], share[:, 1:]))
        engine.step()
    engine.save_checkpoint(save, tag="t")
    report = getattr(engine, "universal_checkpoint_report", None)
    engine.destroy()
    del engine
    gc.collect()
    return report


TAKE_ALL = {"on_missing": "init", "on_extra": "drop"}


def run_and_listen(*arguments: Any, **settings: Any) -> list[str]:
    """The warnings of a run."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ucp_deepspeed").addHandler(handler)
    try:
        run(*arguments, **settings)
    finally:
        logging.getLogger("ucp_deepspeed").removeHandler(handler)
    return told


def ucp(*arguments: str | Path) -> Any:
    return main([str(argument) for argument in arguments], standalone_mode=False) or 0


@pytest.mark.parametrize(
    ("how", "stage"), [("compiled", 1), ("compiled layers", 3), ("data parallel", 0), ("compiled", 2)]
)
def test_wrappers_are_seen_through(how: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """From the plain model to the wrapped one and back, and planned and compared so."""
    plain, middle, back = (tmp_path / name for name in ("plain", "wrapped", "back"))
    ranks(2).run(run, "plain", stage, str(plain), steps=2)
    assert ranks(2).run(run, how, stage, str(middle), str(plain), seed=2)[0].initialised == ()
    assert all(name not in open_checkpoint(plain).parameters for name in ("_orig_mod.gain", "module.gain"))
    assert ucp("diff", plain, middle) == ucp("diff", middle, plain) == 0
    assert ucp("plan", plain, "--model", middle, "--dp", 3, "--zero", 1) == 0
    ranks(1).run(run, "plain", stage, str(back), str(middle), seed=3)
    assert differences(plain, back) == []


def test_stage_0_without_a_manifest(ranks: Ranks, tmp_path: Path) -> None:
    """The optimizer's states are found by the model's order, and the weights by name."""
    plain, middle = tmp_path / "plain", tmp_path / "wrapped"
    ranks(1).run(run, "plain", 0, str(plain), steps=2)
    (plain / "t" / MANIFEST_NAME).unlink()
    assert ranks(1).run(run, "compiled", 0, str(middle), str(plain), seed=2)[0].initialised == ()
    assert ucp("diff", plain, middle) == 0


def test_adapters_are_added_and_taken_away(ranks: Ranks, tmp_path: Path) -> None:
    """Parameters that PEFT adds keep the model's values. They are left out on the way back."""
    plain, adapted, back = (tmp_path / name for name in ("plain", "adapted", "back"))
    ranks(2).run(run, "plain", 1, str(plain), steps=2)
    report = ranks(2).run(run, "adapted", 1, str(adapted), str(plain), universal={"on_missing": "init"})[0]
    added = [f"base_model.model.linear_in.lora_{which}.weight" for which in "AB"]
    assert list(report.initialised[:2]) == added and report.dropped == ()
    report = ranks(2).run(run, "plain", 1, str(back), str(adapted), universal={"on_extra": "drop"}, seed=3)[0]
    assert sorted(report.dropped) == added and report.initialised == ()
    assert differences(plain, back) == []


def test_a_part_that_was_renamed_is_told_where_policies_let_it_pass(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(run, "plain", 1, str(tmp_path / "a"), steps=1)
    told = ranks(1).run(
        run_and_listen, "a layer renamed", 1, str(tmp_path / "b"), str(tmp_path / "a"), universal=TAKE_ALL
    )[0]
    assert any('{from: "linear_in.inner.**", to: "linear_in.**"}' in message for message in told)


def lines_of(message: str) -> str:
    """Return the lines that a message says to write into a spec, which are a whole one."""
    return message[message.index("family: renamed\n") :]


@pytest.mark.parametrize(
    ("source", "target"), [("renamed before", "renamed"), ("plain", "renamed"), ("renamed", "plain")]
)
def test_what_was_renamed_is_told_how_to_map(source: str, target: str, ranks: Ranks, tmp_path: Path) -> None:
    """The error's lines, written into a spec file, make the load exact."""
    before, after, back = (tmp_path / name for name in ("before", "after", "back"))
    ranks(2).run(run, source, 1, str(before), steps=2)
    with pytest.raises(RankError) as caught:
        ranks(2).run(run, target, 1, str(after), str(before), seed=2)
    assert isinstance(caught.value.original, MismatchError)
    spec = tmp_path / "mine.yaml"
    lines = lines_of(str(caught.value.original))
    spec.write_text(lines)
    with pytest.raises(RankError) as caught:
        ranks(2).run(run, target, 1, str(after), str(before), universal=TAKE_ALL, seed=2)
    assert lines_of(str(caught.value.original)) == lines
    named = {"spec": str(spec)}
    assert ranks(2).run(run, target, 1, str(after), str(before), universal=named, seed=2)[0].initialised == ()
    assert ucp("diff", before, after, "--spec", spec) == 0
    ranks(2).run(run, source, 1, str(back), str(after), universal=named, seed=3)
    assert differences(before, back, str(spec)) == []
