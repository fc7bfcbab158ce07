"""``ucp convert --to dcp``: torch's own DCP loads the folder into plain modules and FSDP2's, and the next step is the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import deepspeed
import fsdp_runs
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import differences
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.dcp.output import DcpOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, train
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.verification import verify

Ranks = Callable[[int], RankPool]


def converted(*arguments: str) -> None:
    """Run the command."""
    with pytest.raises(SystemExit) as left:
        main(["convert", *arguments, "--quiet"])
    assert left.value.code == 0


def plain_run(kind: str, last: int) -> dict[str, torch.Tensor]:
    """A run of plain torch, uninterrupted: its parameters at the end."""
    model = build_mlp(vocabulary=VOCABULARY)
    optimizer = fsdp_runs.optimizer_of(model, kind)
    for number in range(1, last + 1):
        fsdp_runs.step(model, optimizer, number)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def engine_run(folder: str, kind: str, stage: int, steps: int) -> None:
    """On a rank: the same run in an engine, all of whose ranks have the same batch."""
    reset_parallel_state()
    model = build_mlp(vocabulary=VOCABULARY)
    optimizer = fsdp_runs.optimizer_of(model, kind)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "universal_checkpoint": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for number in range(1, steps + 1):
        batch = fsdp_runs.batch_of(Run(), number)
        engine.backward(engine(batch[:, :-1], batch[:, 1:]))
        engine.step()
    engine.save_checkpoint(folder, client_state={"epoch": 7, "odd": ({1: torch.arange(3)}, None)})
    engine.destroy()
    gc.collect()


def go_on(folder: str, kind: str, mesh: str | None, flat: bool, number: int) -> dict[str, torch.Tensor]:
    """Load with torch alone, take one step; the parameters."""
    model: nn.Module = build_mlp(vocabulary=VOCABULARY, seed=5) if mesh is None else fsdp_runs.sharded(mesh)
    optimizer = fsdp_runs.optimizer_of(model, kind)
    options = fsdp_runs.FLAT if flat else None
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder, no_dist=mesh is None)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
    fsdp_runs.step(model, optimizer, number)
    held = get_model_state_dict(model)
    return {name: (each.full_tensor() if isinstance(each, DTensor) else each).clone() for name, each in held.items()}


def on_ranks(folder: str, kind: str, mesh: str, flat: bool, number: int) -> dict[str, torch.Tensor]:
    reset_parallel_state()
    return go_on(folder, kind, mesh, flat, number)


def check_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("kind", "stage"), [("AdamW", 3), ("AdamW", 1), ("SGD", 2)])
def test_the_next_step_is_that_of_the_uninterrupted_run(kind: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(engine_run, str(tmp_path / "saved"), kind, stage, 2)
    converted(str(tmp_path / "saved"), str(tmp_path / "dcp"), "--to", "dcp")
    folder, wanted = open_checkpoint(tmp_path / "dcp").path, plain_run(kind, 3)
    for flat in (False, True):
        check_same(go_on(str(folder), kind, None, flat, 3), wanted)


def test_fsdp_loads_it_on_several_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(engine_run, str(tmp_path / "saved"), "AdamW", 2, 2)
    view = UniversalView.of(open_checkpoint(tmp_path / "saved"))
    convert(view, tmp_path / "dcp", DcpOutput(chunk_numbytes=1000, file_numbytes=9000))
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) > 2
    again = ranks(2).run(on_ranks, str(tmp_path / "dcp"), "AdamW", "fsdp", True, 3)
    straight = go_on(str(tmp_path / "dcp"), "AdamW", None, False, 3)
    for found in again:  # ranks sum gradients in another order
        assert found.keys() == straight.keys()
        for name, value in straight.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    "run",
    [
        Run("mlp", {"remembers": True}, zero={"stage": 2}, precision="bf16", groups="decay", frozen=("norm.bias",)),
        Run("mlp", zero={"stage": 0}, precision="fp16", fused=True),
        Run("gpt", tp=2, zero={"stage": 1}),
    ],
    ids=["bf16", "fp16 fused", "tensor parallel"],
)
def test_nothing_is_lost_on_the_way_there_and_back(run: Run, ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, run, 2, save=str(tmp_path / "saved"))
    converted(str(tmp_path / "saved"), str(tmp_path / "dcp"), "--to", "dcp")
    assert differences(tmp_path / "saved", tmp_path / "dcp") == []
    converted(str(tmp_path / "dcp"), str(tmp_path / "universal"))
    assert differences(tmp_path / "saved", tmp_path / "universal") == []
    there, back = open_checkpoint(tmp_path / "dcp"), open_checkpoint(tmp_path / "universal")
    assert there.run == back.run == open_checkpoint(tmp_path / "saved").run
    assert (there.patterns, there.tied) == (back.patterns, back.tied)
    assert there.client_state()[1].keys() == back.client_state()[1].keys()
    found = verify(tmp_path / "dcp")
    assert (found.problems, found.unchecked) == ((), (there.path / ".metadata").stat().st_size)


def test_an_engine_resumes_from_what_was_written(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 2}, precision="bf16")
    ranks(2).run(train, run, 2, save=str(tmp_path / "saved"))
    converted(str(tmp_path / "saved"), str(tmp_path / "dcp"), "--to", "dcp")
    target = Run("mlp", zero={"stage": 3}, precision="bf16", seed=1)
    losses = [
        ranks(1).run(train, target, 4, load=str(tmp_path / folder), save=str(tmp_path / f"{folder}-on"))[0].losses
        for folder in ("saved", "dcp")
    ]
    assert losses[0] == losses[1] and set(losses[0]) == {3, 4}
    assert differences(tmp_path / "saved-on", tmp_path / "dcp-on") == []


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.words(tokens)).flatten(0, -2), labels.flatten())


def save_tied(folder: str) -> None:
    """On a rank: two steps, and a save."""
    reset_parallel_state()
    model = Tied(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = {"train_micro_batch_size_per_gpu": 8, "zero_allow_untested_optimizer": True}
    config |= {"zero_optimization": {"stage": 1}, "universal_checkpoint": {"enabled": True}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for number in (1, 2):
        batch = fsdp_runs.batch_of(Run(), number)
        engine.backward(engine(batch[:, :-1], batch[:, 1:]))
        engine.step()
    engine.save_checkpoint(folder)
    engine.destroy()


def test_tied_weights_stand_under_both_names(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(save_tied, str(tmp_path / "saved"))
    converted(str(tmp_path / "saved"), str(tmp_path / "dcp"), "--to", "dcp")
    folder = open_checkpoint(tmp_path / "dcp")
    assert folder.tied and differences(tmp_path / "saved", tmp_path / "dcp") == []
    model, straight = Tied(3), Tied(0)
    optimizer, other = (torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, straight))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder.path, no_dist=True)
    assert state["model"].keys() == {"words.weight", "head.weight"}
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    for number in (1, 2, 3):
        fsdp_runs.step(straight, other, number)
    fsdp_runs.step(model, optimizer, 3)
    assert torch.equal(model.head.weight, straight.head.weight)
